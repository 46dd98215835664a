"""Learn the five scalars of the CRF from a few cases with known segmentation, without ever making them worse."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medseg.crf.dense_crf import DenseCRF3D
from medseg.progress import track

__all__ = ["CRFFit", "dice", "fit_crf"]

#: probabilities (1, 2, D, H, W), image (1, 1, D, H, W), label (1, 1, D, H, W) of 0 and 1
Case = tuple[Tensor, Tensor, Tensor]

#: A derivative with respect to a sigma has about ten times the error of the value.
FIT_TOLERANCE = 1e-3

#: Largest change of a logarithm: a factor of 100. An intensity sigma that runs to 0 would take for ever to compute.
FARTHEST = 4.6


@dataclass(frozen=True)
class CRFFit:
    """What a fit found. Every Dice is a mean over all cases, of the foreground marginal above 0.5.

    Attributes:
        before: the five values at the start.
        after: the best five values seen; those of ``before`` where nothing was better.
        dice_network: of the probabilities alone.
        dice_before: after the CRF with ``before``.
        dice_after: after the CRF with ``after``; never below ``dice_before``. It may still be below
            ``dice_network``: then the CRF is better left out.
        step: the step whose values ``after`` holds; 0 for the start.
    """

    before: dict[str, float]
    after: dict[str, float]
    dice_network: float
    dice_before: float
    dice_after: float
    step: int


def fit_crf(
    crf: DenseCRF3D,
    cases: Sequence[Case],
    steps: int = 100,
    learning_rate: float = 0.05,
    *,
    batch_size: int = 4,
    evaluate_every: int = 10,
    seed: int = 0,
    spacing: Sequence[float] | None = None,
) -> CRFFit:
    """Minimise the mean soft Dice loss over cases by Adam, and keep the values with the best hard Dice on all cases.

    The logarithms of the five values are what is learned, so ``learning_rate`` is a relative change per step; no
    value moves by more than a factor of 100. The cases that choose the values also report them: judge the result on
    others.

    Args:
        crf: where to start; it is left with the values ``after``. Its tolerance is lowered to 1e-3 during the fit, in
            the evaluations too.
        cases: at least one of probabilities (1, 2, D, H, W), image (1, 1, D, H, W) and label (1, 1, D, H, W) in {0, 1};
            the foreground is the second label. Sizes may differ.
        steps: of the optimiser; 0 only evaluates.
        learning_rate: of Adam.
        batch_size: cases per step, drawn without replacement.
        evaluate_every: steps between two evaluations on all cases; the last step is evaluated in any case.
        seed: of the order of the cases.
        spacing: of all cases, as in :class:`DenseCRF3D`.

    Returns:
        Values and Dice before and after. A case without foreground has Dice 1 where nothing is marked, else 0.

    Raises:
        ValueError: if there are no cases, or a label does not fit its probabilities or is not 0 and 1.
    """
    _check(cases, steps, batch_size, evaluate_every)
    fitted = copy.deepcopy(crf)
    fitted.tolerance = min(crf.tolerance, FIT_TOLERANCE)
    optimizer = torch.optim.Adam(fitted.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    before, start = fitted.values(), [value.detach().clone() for value in fitted.parameters()]
    dice_network = _mean([dice(p[:, 1:] > 0.5, label) for p, _, label in cases])
    dice_before = dice_after = _evaluate(fitted, cases, spacing)
    best, best_step = copy.deepcopy(fitted.state_dict()), 0
    order: list[int] = []
    for step in track(range(1, steps + 1), "Fitting the CRF"):
        if len(order) < min(batch_size, len(cases)):
            order = torch.randperm(len(cases), generator=generator).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad()
        for i in chosen:  # one graph at a time
            torch.autograd.backward(_soft_dice_loss(fitted, cases[i], spacing) / len(chosen))
        optimizer.step()
        with torch.no_grad():
            for value, first in zip(fitted.parameters(), start, strict=True):
                value.clamp_(first - FARTHEST, first + FARTHEST)
        if step % evaluate_every == 0 or step == steps:
            score = _evaluate(fitted, cases, spacing)
            if score > dice_after:
                best, best_step, dice_after = copy.deepcopy(fitted.state_dict()), step, score
    fitted.load_state_dict(best)
    crf.load_state_dict(best)
    return CRFFit(before, fitted.values(), dice_network, dice_before, dice_after, best_step)


def dice(prediction: Tensor, label: Tensor) -> float:
    """Overlap of two masks, ``2 |A and B| / (|A| + |B|)``; 1 where both are empty.

    Args:
        prediction: mask of any shape, bool or 0 and 1.
        label: mask of the same shape.
    """
    a, b = prediction.bool(), label.bool()
    size = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / size if size else 1.0


def _soft_dice_loss(crf: DenseCRF3D, case: Case, spacing: Sequence[float] | None) -> Tensor:
    """``1 - (2 sum PG + 1) / (sum P + sum G + 1)``, the loss of the paper's equation (15)."""
    probabilities, image, label = case
    marginal, truth = crf(probabilities.detach(), image, spacing)[:, 1:], label.float()
    loss: Tensor = 1 - (2 * (marginal * truth).sum() + 1) / (marginal.sum() + truth.sum() + 1)
    return loss


@torch.no_grad()
def _evaluate(crf: DenseCRF3D, cases: Sequence[Case], spacing: Sequence[float] | None) -> float:
    return _mean([dice(crf(p, image, spacing)[:, 1:] > 0.5, label) for p, image, label in cases])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _check(cases: Sequence[Case], steps: int, batch_size: int, evaluate_every: int) -> None:
    if not cases:
        raise ValueError("no cases to fit the CRF on; pass at least one (probabilities, image, label)")
    if steps < 0 or batch_size < 1 or evaluate_every < 1:
        raise ValueError(
            f"steps is {steps}, batch_size {batch_size}, evaluate_every {evaluate_every}; pass at least 0, 1 and 1"
        )
    for number, (probabilities, _, label) in enumerate(cases):
        expected = (1, 1, *probabilities.shape[2:])
        if probabilities.ndim != 5 or probabilities.shape[:2] != (1, 2):
            raise ValueError(
                f"case {number}: probabilities have shape {tuple(probabilities.shape)}; pass (1, 2, D, H, W),"
                " background first"
            )
        if tuple(label.shape) != expected:
            raise ValueError(f"case {number}: label has shape {tuple(label.shape)}; it must have {expected}")
        if not bool(((label == 0) | (label == 1)).all()):
            raise ValueError(f"case {number}: label holds other values than 0 and 1; pass a mask, e.g. label > 0")
