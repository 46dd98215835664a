"""Overlap and boundary metrics of one case, on boolean masks of any dimension, and their summary over cases.

Every metric takes two masks of one case, a prediction X and a truth Y, as NumPy arrays or tensors of equal shape
(bool, or numbers that are only 0 and 1), and returns a float. Where a metric is undefined the result is ``nan``,
never a stand-in value, so that a mean has to decide (and report) what it leaves out.

Source: W. Hou et al., Surgical Innovation 2024, equations (1) to (5).
Identity: ``dice + fpsr + fnsr == 1`` for every case with ``|X| + |Y| > 0``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]

__all__ = ["dice", "fnr", "fnsr", "fpsr", "hausdorff_distance", "precision", "summarise"]


def dice(pred: Any, truth: Any) -> float:
    """Dice coefficient, equation (1): ``2 |X & Y| / (|X| + |Y|)``.

    Args:
        pred: mask X of any shape.
        truth: mask Y of the same shape.

    Returns:
        A value in [0, 1]; 0 if exactly one mask is empty, ``nan`` if both are.

    Raises:
        ValueError: if the shapes differ or a mask holds anything but 0 and 1.

    Example:
        >>> dice([[True, True]], [[True, False]])
        0.6666666666666666
    """
    x, y = _masks(pred, truth)
    return _ratio(2 * int(np.count_nonzero(x & y)), x, y)


def fpsr(pred: Any, truth: Any) -> float:
    """False positive segmentation rate, equation (4): ``|X - Y| / (|X| + |Y|)``.

    The denominator is the sum of both sizes: this is not the false positive rate FP / (FP + TN).

    Args:
        pred: mask X of any shape.
        truth: mask Y of the same shape.

    Returns:
        A value in [0, 1]; 0 for an empty prediction of a non-empty truth, ``nan`` if both are empty.

    Raises:
        ValueError: if the shapes differ or a mask holds anything but 0 and 1.
    """
    x, y = _masks(pred, truth)
    return _ratio(int(np.count_nonzero(x & ~y)), x, y)


def fnsr(pred: Any, truth: Any) -> float:
    """False negative segmentation rate, equation (5): ``|Y - X| / (|X| + |Y|)``.

    The denominator is the sum of both sizes: this is not the false negative rate FN / (FN + TP).

    Args:
        pred: mask X of any shape.
        truth: mask Y of the same shape.

    Returns:
        A value in [0, 1]; 1 for an empty prediction of a non-empty truth, ``nan`` if both are empty.

    Raises:
        ValueError: if the shapes differ or a mask holds anything but 0 and 1.
    """
    x, y = _masks(pred, truth)
    return _ratio(int(np.count_nonzero(y & ~x)), x, y)


def precision(pred: Any, truth: Any) -> float:
    """Share of the prediction that is true, ``TP / (TP + FP)``.

    Args:
        pred: mask of any shape.
        truth: mask of the same shape.

    Returns:
        A value in [0, 1]; ``nan`` for an empty prediction.

    Raises:
        ValueError: if the shapes differ or a mask holds anything but 0 and 1.
    """
    x, y = _masks(pred, truth)
    return int(np.count_nonzero(x & y)) / int(np.count_nonzero(x)) if x.any() else float("nan")


def fnr(pred: Any, truth: Any) -> float:
    """False negative rate, ``FN / (TP + FN)``: the share of the truth that the prediction misses.

    Args:
        pred: mask of any shape.
        truth: mask of the same shape.

    Returns:
        A value in [0, 1]; 1 for an empty prediction, ``nan`` for an empty truth.

    Raises:
        ValueError: if the shapes differ or a mask holds anything but 0 and 1.
    """
    x, y = _masks(pred, truth)
    return int(np.count_nonzero(y & ~x)) / int(np.count_nonzero(y)) if y.any() else float("nan")


def hausdorff_distance(
    pred: Any,
    truth: Any,
    spacing: float | Sequence[float] | None = None,
    percentile: float | None = None,
) -> float:
    """Hausdorff distance, equations (2) and (3): ``max(h(X, Y), h(Y, X))``, ``h(X, Y) = max_x min_y d(x, y)``.

    Without ``percentile`` the maximum runs over **all** pixels of both sets, as the paper writes it. With it, the
    distances are those between the boundary pixels (4-connected in 2D, 6-connected in 3D) and the larger of the two
    directed percentiles is returned, which is what MONAI and most papers call HD95.

    Args:
        pred: mask X of any shape.
        truth: mask Y of the same shape.
        spacing: size of a pixel along each array axis (one number for all), e.g. in mm. ``None`` gives pixels.
        percentile: ``None``, or a value in (0, 100], e.g. 95.

    Returns:
        A distance >= 0 in the unit of ``spacing`` (pixels without it); ``nan`` if either mask is empty.

    Raises:
        ValueError: on differing shapes, values other than 0 and 1, a spacing that is not positive or has the wrong
            number of values, or a percentile outside (0, 100].
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    x, y = _masks(pred, truth)
    sampling = _spacing(spacing, x.ndim)
    if percentile is not None and not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; give a value in (0, 100], e.g. 95, or None for the maximum")
    if not x.any() or not y.any():
        return float("nan")
    # Both sets lie in their joint bounding box, so the distances inside it are exact and the transform is cheap.
    box = _bounding_box(x | y)
    x, y = x[box], y[box]
    if percentile is not None:
        x, y = (m & ~binary_erosion(m) for m in (x, y))
    to_y = distance_transform_edt(~y, sampling=sampling)[x]
    to_x = distance_transform_edt(~x, sampling=sampling)[y]
    if percentile is None:
        return float(max(to_y.max(), to_x.max()))
    return float(max(np.percentile(to_y, percentile), np.percentile(to_x, percentile)))


def summarise(values: Iterable[float]) -> dict[str, float]:
    """Mean and sample standard deviation over the cases where a metric is defined.

    Args:
        values: one per case, ``nan`` where undefined.

    Returns:
        ``mean``, ``sd`` (``nan`` for fewer than one and two defined values) and ``n``, the number of defined values.
    """
    defined = np.asarray([v for v in values if np.isfinite(v)])
    return {
        "mean": float(defined.mean()) if len(defined) else float("nan"),
        "sd": float(defined.std(ddof=1)) if len(defined) > 1 else float("nan"),
        "n": len(defined),
    }


def _masks(pred: Any, truth: Any) -> tuple[Mask, Mask]:
    x, y = _mask(pred, "pred"), _mask(truth, "truth")
    if x.shape != y.shape:
        raise ValueError(f"pred has shape {x.shape} and truth {y.shape}; both must be masks of the same case")
    return x, y


def _mask(value: Any, name: str) -> Mask:
    # A tensor may live on a GPU and carry a gradient; looking for `detach` keeps torch out of this module's imports.
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    if array.dtype == np.bool_:
        return array
    mask: Mask = array == 1
    if not np.all(mask | (array == 0)):
        raise ValueError(f"{name} holds values other than 0 and 1; threshold it first, e.g. probability >= 0.5")
    return mask


def _ratio(numerator: int, x: Mask, y: Mask) -> float:
    total = int(np.count_nonzero(x)) + int(np.count_nonzero(y))
    return float(numerator) / total if total else float("nan")


def _spacing(spacing: float | Sequence[float] | None, ndim: int) -> list[float]:
    values = [1.0] * ndim if spacing is None else np.atleast_1d(np.asarray(spacing, dtype=float)).tolist()
    if len(values) == 1:
        values = values * ndim
    if len(values) != ndim:
        raise ValueError(f"spacing has {len(values)} values for a {ndim}D mask; pass {ndim}, one per array axis")
    if not all(np.isfinite(v) and v > 0 for v in values):
        raise ValueError(f"spacing is {values}; every value must be positive and finite")
    return values


def _bounding_box(mask: Mask) -> tuple[slice, ...]:
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
