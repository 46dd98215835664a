"""Scores of the masks that a finished run finds: Dice, precision, FNR and AP50, with fuzzy C-means beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data.box_utils import box_iou

from medseg.bundles.configs import read_config
from medseg.detection.patches import paste_masks
from medseg.metrics import dice, fnr, precision
from medseg.progress import track
from medseg.tasks.dbt_mass.fuzzy_c_means import SpatialFuzzyCMeans
from medseg.tasks.dbt_mass.views import boxes_of, masks_of
from medseg.training.module import plain_tensor

Tensor = torch.Tensor
Segment = Callable[[Tensor, Tensor], Tensor]

#: IoU of boxes from which on a mask counts in Dice, precision and FNR; IoU of masks of a hit in AP50.
BOX_IOU = MASK_IOU = 0.5

#: Where masks come from: the network's head; fuzzy C-means in the boxes found; fuzzy C-means in the true boxes.
SOURCES = ("head", "found", "true")

__all__ = ["BOX_IOU", "MASK_IOU", "SOURCES", "MaskScores", "average_precision", "hits", "score_masks"]


@dataclass
class MaskScores:
    """What a run's masks are worth on the test part.

    Attributes:
        masses: of each source and mass with a mask ``source``, ``view``, ``mass``, ``dice``, ``precision``, ``fnr``.
        detections: of each source and detection ``source``, ``view``, ``score``, ``hit`` (0 or 1).
        network: ``parameters``, ``megabytes`` of weights, ``milliseconds`` of a view (median), ``views`` and ``masses``
            (all, found or not).
    """

    masses: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] = field(default_factory=list)
    network: dict[str, float] = field(default_factory=dict)


def average_precision(scores: npt.ArrayLike, hit: npt.ArrayLike, truths: int) -> float:
    """Area under the precision-recall curve of detections over all images: AP50 if a hit is a mask IoU > 0.5.

    At each distinct score all detections from it on count; precision at a recall is the highest at that recall or a
    higher one (the envelope of PASCAL VOC 2010 and COCO, without COCO's 101 steps).

    Args:
        scores: (n,).
        hit: (n,) whether the detection is the one that takes a truth; further detections of it do not hit.
        truths: number of truths.

    Returns:
        In [0, 1]; ``nan`` without a truth, 0 without a detection.

    Raises:
        ValueError: if there are more hits than truths, or a score is no number.

    Example:
        >>> average_precision([0.9, 0.8, 0.7], [True, False, True], truths=2)
        0.8333333333333333
    """
    values, right = np.asarray(scores, float).ravel(), np.asarray(hit, bool).ravel()
    if len(values) != len(right):
        raise ValueError(f"there are {len(values)} scores and {len(right)} hits; give one of each per detection")
    if not np.isfinite(values).all():
        raise ValueError("a score is not finite; do the weights hold NaN?")
    if right.sum() > truths:
        raise ValueError(f"there are {right.sum()} hits of {truths} truths; each truth is hit once at most")
    if not truths:
        return float("nan")
    order = np.argsort(-values, kind="stable")
    last = np.append(np.diff(values[order]) < 0, True)[: len(values)]  # equal scores come together
    found = np.cumsum(right[order])[last]
    share = found / (np.flatnonzero(last) + 1)
    envelope = np.maximum.accumulate(share[::-1])[::-1]
    return float((np.diff(found, prepend=0) / truths * envelope).sum())


def hits(iou: npt.NDArray[np.float64], threshold: float = MASK_IOU) -> npt.NDArray[np.bool_]:
    """Which detections of an image take a truth: by falling score, each truth once, its best free one by IoU.

    Args:
        iou: (n, truths), detections by falling score.
        threshold: a hit has an IoU above.
    """
    free = np.ones(iou.shape[1], bool)
    hit = np.zeros(len(iou), bool)
    for i, row in enumerate(iou):
        left = np.where(free, row, -1.0)
        if left.size and left.max() > threshold:
            hit[i] = True
            free[int(left.argmax())] = False
    return hit


def score_masks(run: Path, *, head: bool = True, fuzzy: bool = True, limit: int | None = None) -> MaskScores:
    """Score the masks of a finished run on the test part of its data list.

    Fuzzy C-means runs in the boxes that the network finds, the fair choice, and in the true boxes, an upper bound; both
    enlarged by 20 % as :class:`~medseg.tasks.dbt_mass.fuzzy_c_means.SpatialFuzzyCMeans` does it.

    Args:
        run: folder of the run.
        head: score the network's own masks.
        fuzzy: score those of fuzzy C-means.
        limit: views at most, e.g. to measure the time alone.

    Returns:
        The scores, on the network's grid.

    Raises:
        FileNotFoundError: if this is no finished run.
    """
    parser = _parser(run)
    module, views = parser.get_parsed_content("module"), parser.get_parsed_content("validate::dataset")
    network, inferer = module.network.eval(), module.val_inferer
    device = next(network.parameters()).device
    found, seconds, masses = MaskScores(), [], 0
    with torch.no_grad():
        for i in track(range(len(views) if limit is None else min(limit, len(views))), "score masks"):
            item = views[i]
            image, label = (plain_tensor(item[k]).to(device) for k in ("image", "label"))
            start = time.perf_counter()
            result = {k: v[0] for k, v in inferer(image[None], network).items()}
            seconds.append(time.perf_counter() - start)
            masses += len(boxes_of(label))
            name = str(item["image"].meta["filename_or_obj"])
            for source, boxes, masks in _masks(image[0], boxes_of(label), result, head, fuzzy):
                _add(found, source, name, result["scores"], boxes, masks, label)
    found.network = {
        **_size(network),
        "milliseconds": 1000 * float(np.median(seconds)) if seconds else float("nan"),
        "views": len(seconds),
        "masses": masses,
    }
    return found


def _parser(run: Path) -> Any:
    from monai.bundle import ConfigParser

    config, weights = run / "configs" / "evaluate.yaml", run / "models" / "model.pt"
    for file in (config, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{run} is no finished run: {file} is missing")
    text = {k: v for k, v in read_config(config).items() if k not in ("initialize", "run", "finalize")}
    return ConfigParser({**text, "part": "test", "mode": "mask_head", "ckpt_path": str(weights)})


def _masks(
    volume: Tensor, true: Tensor, result: Mapping[str, Tensor], head: bool, fuzzy: bool
) -> list[tuple[str, Tensor, Tensor]]:
    """Source, boxes and masks."""
    boxes = result["boxes"].float()
    made = [("head", boxes, result["masks"].float())] if head else []
    if fuzzy:
        segment: Segment = SpatialFuzzyCMeans()
        made += [(source, own, segment(volume, own)) for source, own in (("found", boxes), ("true", true))]
    return made


def _add(
    found: MaskScores, source: str, view: str, scores: Tensor, boxes: Tensor, masks: Tensor, label: Tensor
) -> None:
    """Score the masks of one view from one source."""
    truths = masks_of(label)
    whole = [_pasted(box, mask, label.shape[1:]) for box, mask in zip(boxes, masks, strict=True)]
    if source != "true":
        iou = np.array([[_iou(mask, truth) for truth in truths] for mask in whole], float)
        for score, hit in zip(scores.tolist(), hits(iou.reshape(len(whole), len(truths))), strict=True):
            found.detections.append({"source": source, "view": view, "score": score, "hit": int(hit)})
    if not len(boxes) or not len(truths):
        return
    quality = box_iou(boxes, boxes_of(label))
    for number, truth in enumerate(truths):
        best = int(quality[:, number].argmax())
        if float(quality[best, number]) > BOX_IOU:
            pair = whole[best].cpu().numpy(), truth.cpu().numpy()
            values = {"dice": dice(*pair), "precision": precision(*pair), "fnr": fnr(*pair)}
            found.masses.append({"source": source, "view": view, "mass": number + 1, **values})


def _pasted(box: Tensor, mask: Tensor, shape: Sequence[int]) -> Tensor:
    where, part = next(paste_masks(box[None], mask[None], shape))
    whole = torch.zeros(tuple(shape), dtype=torch.bool, device=mask.device)
    whole[where] = part > 0.5
    return whole


def _iou(mask: Tensor, truth: Tensor) -> float:
    union = int((mask | truth).sum())
    return int((mask & truth).sum()) / union if union else 0.0


def _size(network: torch.nn.Module) -> dict[str, float]:
    """Parameters, and MB (of 10^6 bytes) of all weights as they are stored."""
    stored = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    return {"parameters": sum(p.numel() for p in network.parameters()), "megabytes": stored / 1e6}
