"""Does a probability mean what it says? Reliability of a binary probability, and its expected calibration error.

Source: C. Guo, G. Pleiss, Y. Sun, K. Q. Weinberger, On Calibration of Modern Neural Networks, ICML 2017, equation (5),
with the probability of the positive class in the place of the confidence in the predicted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Bins of equal width over [0, 1].
BINS = 15

__all__ = ["expected_calibration_error", "reliability_bins", "reliability_figure", "reliability_table"]


def reliability_bins(probability: Any, truth: Any, bins: int = BINS) -> Array:
    """Sort pixels (or cases) by their probability; bins of several cases add up.

    Args:
        probability: of the positive class, in [0, 1], any shape.
        truth: mask or labels of the same shape, 0 and 1.
        bins: number of bins of equal width; the last one includes 1.

    Returns:
        (3, bins): how many values fell into each bin, the sum of their probabilities, and how many were true.

    Raises:
        ValueError: if the shapes differ or a probability is outside [0, 1] or ``nan``.
    """
    p, y = np.asarray(probability, dtype=np.float64).ravel(), np.asarray(truth).astype(bool).ravel()
    if p.shape != y.shape:
        raise ValueError(f"{p.size} probabilities for {y.size} truth values; both must be of the same case")
    if p.size and not (p.min() >= 0 and p.max() <= 1):
        raise ValueError(
            f"probabilities lie in [{p.min():g}, {p.max():g}]; they must be in [0, 1] (missing a sigmoid?)"
        )
    where = np.minimum((p * bins).astype(np.intp), bins - 1)
    return np.stack([np.bincount(where, weights, minlength=bins) for weights in (np.ones_like(p), p, y)])


def expected_calibration_error(bins: Array) -> float:
    """Mean distance between probability and frequency over the bins, each weighted by its number of values.

    Args:
        bins: (3, bins) from :func:`reliability_bins`, or a sum of several.

    Returns:
        A value in [0, 1]; ``nan`` without values. Background that is certain and right pulls it down: compare it
        between models on the same cases, not between data sets.
    """
    count, probability, true = np.asarray(bins, float)
    if not count.sum():
        return float("nan")
    return float(np.abs(probability - true).sum() / count.sum())


def reliability_table(bins: Array) -> dict[str, Any]:
    """The bins as plain numbers for JSON: ``ece``, and per bin ``count``, ``probability`` (sum) and ``true``."""
    count, probability, true = np.asarray(bins, float)
    return {
        "ece": expected_calibration_error(bins),
        "count": count.astype(int).tolist(),
        "probability": probability.tolist(),
        "true": true.astype(int).tolist(),
    }


def reliability_figure(curves: Mapping[str, Sequence[Any] | Array]) -> Any:
    """Frequency over probability per bin, a line for each model, and how many values the bins hold.

    Args:
        curves: (3, bins) by name.

    Returns:
        A matplotlib ``Figure``.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5.6), layout="constrained")
    upper, lower = figure.subplots(2, height_ratios=[4, 1], sharex=True)
    upper.plot([0, 1], [0, 1], color="0.6", linestyle=":", label="perfect")
    for name, bins in curves.items():
        count, probability, true = np.asarray(bins, float)
        filled = count > 0
        x, y = probability[filled] / count[filled], true[filled] / count[filled]
        ece = expected_calibration_error(np.asarray(bins, float))
        upper.plot(x, y, marker="o", markersize=4, label=f"{name} (ECE {ece:.4f})")
        lower.step((np.arange(len(count)) + 0.5) / len(count), count, where="mid")
    upper.set(ylabel="frequency of truth", xlim=(0, 1), ylim=(0, 1))
    upper.legend(fontsize="small")
    lower.set(xlabel="probability", ylabel="pixels", yscale="log")
    return figure
