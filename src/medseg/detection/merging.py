"""One box per finding from boxes found in overlapping patches of a volume.

``"wbc"``, weighted box clustering (P. F. Jaeger et al., Retina U-Net, ML4H 2020, section 2): boxes that overlap are
averaged, and patches that cover the place without a box there count as votes against it. ``"nms"``, non-maximum
suppression: the best box stays as it is.
"""

from __future__ import annotations

import torch
from monai.data.box_utils import box_iou
from torch import Tensor

from medseg.detection.nms import nms_3d

__all__ = ["merge_boxes", "weighted_box_clustering"]

METHODS = ("nms", "wbc")

Merged = tuple[Tensor, Tensor, list[Tensor]]


def merge_boxes(
    boxes: Tensor,
    scores: Tensor,
    weights: Tensor,
    expected: Tensor,
    method: str = "wbc",
    iou_threshold: float = 0.2,
) -> Merged:
    """Merge boxes of overlapping patches by one of two methods, with one kind of result.

    ``"wbc"`` is :func:`weighted_box_clustering`. ``"nms"`` ranks by score x weight, so that a box cut by the border of
    its patch yields to the whole one of the neighbour; a kept box keeps its corners and its own score, what it removes
    are its members, and ``expected`` has no say.

    Args:
        boxes: (N, 6), (d0, h0, w0, d1, h1, w1) in voxels of the volume.
        scores: (N,) in [0, 1].
        weights: (N,) positive: trust in a box, e.g. 1, and 0.5 near the border of its patch.
        expected: (N,) number of patches that cover the centre of a box, at least 1.
        method: ``"wbc"`` or ``"nms"``.
        iou_threshold: IoU from which on two boxes are one finding (``"wbc"``: at least this, ``"nms"``: above it).

    Returns:
        As :func:`weighted_box_clustering`.

    Raises:
        ValueError: if shapes, values or the method do not fit.
    """
    if method == "wbc":
        return weighted_box_clustering(boxes, scores, weights, expected, iou_threshold)
    if method != "nms":
        raise ValueError(f"method is {method!r}; pass one of {', '.join(map(repr, METHODS))}")
    _check(boxes, scores, weights, expected)
    ranks = scores * weights
    kept = nms_3d(boxes, ranks, iou_threshold)
    members = _members(boxes, ranks, kept, iou_threshold)
    order = torch.argsort(scores[kept], descending=True, stable=True)
    return boxes[kept[order]], scores[kept[order]], [members[i] for i in order.tolist()]


def weighted_box_clustering(
    boxes: Tensor, scores: Tensor, weights: Tensor, expected: Tensor, iou_threshold: float = 0.2
) -> Merged:
    """Average boxes that overlap, and lower the score of those that only some of the covering patches found.

    The box with the highest score takes all boxes with at least ``iou_threshold`` IoU with it into its cluster, the
    best one left does the same, and so on. With score s, weight w and n found of n_expected (mean over the cluster):

        box = sum s w box / sum s w        score = sum s w / (sum w + max(n_expected - n, 0) mean w)

    A box with score 0.8 found in one of four covering patches thus gets 0.2. Two boxes of a cluster from the same patch
    count as two patches: suppress overlapping boxes within each patch first.

    Args:
        boxes: (N, 6), (d0, h0, w0, d1, h1, w1) in voxels of the volume.
        scores: (N,) in [0, 1]. Boxes of a cluster with scores 0 only are averaged by weight alone.
        weights: (N,) positive: trust in a box, e.g. 1, and 0.5 near the border of its patch.
        expected: (N,) number of patches that cover the centre of a box, at least 1.
        iou_threshold: IoU with the best box of a cluster that makes a box a member, in (0, 1].

    Returns:
        boxes: (K, 6) by falling merged score.
        scores: (K,) in [0, 1].
        members: for each, the (n,) int64 indices of the boxes merged, the best one first. No boxes give (0, 6), (0,)
            and an empty list.

    Raises:
        ValueError: if shapes or values do not fit.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [0, 0, 9, 4, 4, 12]])
        >>> found, found_scores, members = weighted_box_clustering(
        ...     boxes, torch.tensor([0.6, 0.6, 0.8]), weights=torch.ones(3), expected=torch.tensor([2, 2, 4])
        ... )
        >>> found.tolist()[:1], [round(s, 3) for s in found_scores.tolist()], [m.tolist() for m in members]
        ([[0.0, 0.0, 0.5, 4.0, 4.0, 4.5]], [0.6, 0.2], [[0, 1], [2]])
    """
    _check(boxes, scores, weights, expected)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold:g}; pass a number in (0, 1], e.g. 0.2")
    clusters = _clusters(boxes, scores, iou_threshold)
    if not clusters:
        return boxes.clone(), scores.clone(), []
    merged = [_average(boxes[m], scores[m], weights[m], expected[m]) for m in clusters]
    merged_scores = torch.stack([score for _, score in merged])
    order = torch.argsort(merged_scores, descending=True, stable=True)
    merged_boxes = torch.stack([box for box, _ in merged])[order]
    return merged_boxes, merged_scores[order], [clusters[i] for i in order.tolist()]


def _clusters(boxes: Tensor, scores: Tensor, iou_threshold: float) -> list[Tensor]:
    """Indices of the boxes of each cluster, by falling score."""
    left = torch.argsort(scores, descending=True, stable=True)
    clusters = []
    while len(left):
        joins = box_iou(boxes[left[:1]], boxes[left])[0] >= iou_threshold
        joins[0] = True  # a box without volume has no IoU, not even with itself
        clusters.append(left[joins])
        left = left[~joins]
    return clusters


def _average(boxes: Tensor, scores: Tensor, weights: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    """Box (6,) and score () of one cluster."""
    votes = (scores * weights).to(boxes.dtype)
    if not votes.sum() > 0:
        votes = weights.to(boxes.dtype)
    missing = (expected.to(weights.dtype).mean() - len(boxes)).clamp_min(0)
    score = (scores * weights).sum() / (weights.sum() + missing * weights.mean())
    return (votes[:, None] * boxes).sum(0) / votes.sum(), score.to(scores.dtype)


def _members(boxes: Tensor, ranks: Tensor, kept: Tensor, iou_threshold: float) -> list[Tensor]:
    """For each kept box, itself and the boxes that it removed, by falling rank."""
    left = torch.argsort(ranks, descending=True, stable=True)
    left = left[~torch.isin(left, kept)]
    members = []
    for best in kept[:, None]:
        removed = box_iou(boxes[best], boxes[left])[0] > iou_threshold
        members.append(torch.cat([best, left[removed]]))
        left = left[~removed]
    return members


def _check(boxes: Tensor, scores: Tensor, weights: Tensor, expected: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 6 or not boxes.is_floating_point():
        found = f"shape {tuple(boxes.shape)} and type {boxes.dtype}"
        raise ValueError(f"boxes has {found}; pass floating-point (N, 6): d0, h0, w0, d1, h1, w1")
    count = len(boxes)
    if not (torch.isfinite(boxes).all() and (boxes[:, 3:] >= boxes[:, :3]).all()):
        raise ValueError("boxes holds NaN, infinity or a maximum below its minimum; remove such boxes")
    for name, values in (("scores", scores), ("weights", weights), ("expected", expected)):
        if values.shape != (count,):
            raise ValueError(f"{name} has shape {tuple(values.shape)} for {count} boxes; pass ({count},)")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("scores holds a value outside [0, 1] or NaN; pass probabilities")
    if not ((weights > 0) & torch.isfinite(weights)).all():
        raise ValueError("weights holds a value that is not positive and finite; leave out boxes that should not count")
    if not ((expected >= 1) & torch.isfinite(expected)).all():
        raise ValueError("expected holds a value below 1 or NaN; each box lies in at least the patch that found it")
