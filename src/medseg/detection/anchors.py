"""Anchor sizes fitted to the boxes of a data list.

Source: k-means on box sizes with the distance 1 - IoU of boxes with a common centre, after J. Redmon and A. Farhadi,
YOLO9000, CVPR 2017, section 2 (Dimension Clusters), with medians as centres and in 3D.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["fit_anchors", "mean_best_iou"]

Array = npt.NDArray[np.float64]

#: Starts of k-means, of which the best counts: one alone can end in a poor place.
STARTS = 10

#: Rounds of one start; it ends sooner as a rule, when no size changes its anchor.
ROUNDS = 100


def fit_anchors(sizes_mm: npt.ArrayLike, count: int, seed: int = 0) -> Array:
    """Anchor sizes under which the boxes have a high mean IoU with their best anchor.

    Args:
        sizes_mm: (N, 3) extents of the boxes along d, h and w in mm.
        count: anchors to fit, at most the number of different sizes.
        seed: of the random starts; the result is a function of the arguments.

    Returns:
        (count, 3) sizes in mm, by rising volume.

    Raises:
        ValueError: if the shape does not fit, a size is not positive and finite, or there are too few different sizes.

    Example:
        >>> fit_anchors([[9, 9, 8], [9, 9, 9], [9, 9, 10], [30, 40, 40], [30, 40, 41], [30, 40, 42]], count=2).tolist()
        [[9.0, 9.0, 9.0], [30.0, 40.0, 41.0]]
    """
    sizes = _checked("sizes_mm", sizes_mm)
    if count < 1:
        raise ValueError(f"count is {count}; pass at least 1 anchor")
    different = len(np.unique(sizes, axis=0))
    if different < count:
        raise ValueError(
            f"sizes_mm has {different} different sizes for {count} anchors; pass more boxes or a smaller count"
        )
    starts = np.random.SeedSequence(seed).spawn(STARTS)
    fits = [_one_fit(sizes, count, np.random.default_rng(start)) for start in starts]
    best = max(fits, key=lambda anchors: mean_best_iou(sizes, anchors))
    return best[np.lexsort((*best.T[::-1], best.prod(1)))]


def mean_best_iou(sizes: npt.ArrayLike, anchors: npt.ArrayLike) -> float:
    """Mean over boxes of the IoU with the anchor that fits best, both with the same centre.

    Args:
        sizes: (N, 3) extents of the boxes along d, h and w.
        anchors: (A, 3) extents of the anchors in the same unit.

    Returns:
        Value in (0, 1].

    Raises:
        ValueError: if a shape does not fit, or a size is not positive and finite.
    """
    return float(_ious(_checked("sizes", sizes), _checked("anchors", anchors)).max(1).mean())


def _one_fit(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """The best anchors on the way of one start: medians can lower the mean IoU."""
    anchors = _first_anchors(sizes, count, rng)
    best, best_iou, owner_before = anchors, 0.0, np.full(len(sizes), -1)
    for _ in range(ROUNDS):
        ious = _ious(sizes, anchors)
        owner, iou = ious.argmax(1), float(ious.max(1).mean())
        if iou > best_iou:
            best, best_iou = anchors, iou
        if (owner == owner_before).all():
            break
        # An anchor that no box prefers stays where it is: its place is that of some box or median of boxes.
        used = [np.median(sizes[owner == i], axis=0) if (owner == i).any() else anchors[i] for i in range(count)]
        anchors, owner_before = np.stack(used), owner
    return best


def _first_anchors(sizes: Array, count: int, rng: np.random.Generator) -> Array:
    """Different sizes of boxes, each drawn in proportion to its distance from those before it (k-means++)."""
    anchors: Array = sizes[rng.integers(len(sizes))][None]
    while len(anchors) < count:
        taken = (sizes[:, None] == anchors).all(-1).any(1)
        # Rounding must neither draw a size twice nor forbid one that differs by little.
        distance = np.where(taken, 0, np.maximum(1 - _ious(sizes, anchors).max(1), 1e-12))
        anchors = np.concatenate([anchors, sizes[rng.choice(len(sizes), p=distance / distance.sum())][None]])
    return anchors


def _ious(sizes: Array, anchors: Array) -> Array:
    """(N, A) IoUs of boxes with a common centre."""
    inter = np.minimum(sizes[:, None], anchors[None]).prod(-1)
    union = sizes.prod(-1)[:, None] + anchors.prod(-1)[None] - inter
    ious: Array = inter / union
    return ious


def _checked(name: str, values: npt.ArrayLike) -> Array:
    sizes: Array = np.asarray(values, dtype=np.float64)
    if sizes.ndim != 2 or sizes.shape[1] != 3 or not len(sizes):
        raise ValueError(f"{name} has shape {sizes.shape}; pass (N, 3) with N >= 1: extents along d, h and w")
    wrong = np.flatnonzero(~(np.isfinite(sizes) & (sizes > 0)).all(1))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] is {sizes[wrong[0]].tolist()}; extents are positive: drop empty boxes")
    return sizes
