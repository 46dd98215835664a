"""Non-maximum suppression of 3D boxes: of boxes that overlap, the one with the highest score stays.

Greedy as everywhere, box by box in falling score. Two observations make it fast:

- 128 boxes at a time are settled among themselves by one matrix of IoUs; only the winners meet the boxes after them.
- Two boxes with IoU > t overlap by more than t times the longer length along every axis. Centres of boxes that matter
  to one of length q are therefore closer than q (1 - t) max(1, 1 / 2t), and a grid of centres finds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["nms_3d"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

#: Boxes settled by one matrix: fewer mean more steps in Python, more mean IoUs of boxes that are lost anyway.
BLOCK = 128

#: Cells along one axis of the grid. Their numbers then fit into 16 bits, which NumPy sorts ten times faster than 32.
MOST_CELLS = 40


def nms_3d(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes that no better kept box overlaps by more than ``iou_threshold``.

    The lists are those of MONAI's ``non_max_suppression`` (same IoU in float32, same order of ties), found at least ten
    times faster (``benchmarks/detection.py``). The work is done on the CPU, wherever the tensors are.

    Args:
        boxes: (N, 6), (d0, h0, w0, d1, h1, w1), any unit. Boxes without volume overlap nothing.
        scores: (N,), any finite numbers; of equal ones the box that comes first is the better.
        iou_threshold: in [0, 1]; a box is removed where the IoU is above it, not where it is equal.

    Returns:
        (K,) int64 indices by falling score, on the device of ``boxes``; (0,) where there are no boxes.

    Raises:
        ValueError: if shapes do not fit, a number is NaN or infinite, a box has its maximum below its minimum or a
            volume beyond float32, or the threshold is outside [0, 1].

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [0, 0, 8, 4, 4, 12]])
        >>> nms_3d(boxes, torch.tensor([0.6, 0.9, 0.3]), iou_threshold=0.5).tolist()
        [1, 2]
    """
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold is {iou_threshold:g}; pass a number in [0, 1], e.g. 0.5")
    _check(boxes, scores)
    if not len(boxes):
        return torch.zeros(0, dtype=torch.int64, device=boxes.device)
    order = _falling(scores.detach().cpu().double().numpy())
    corners = np.ascontiguousarray(boxes.detach().cpu().float().numpy()[order].T)
    with np.errstate(over="ignore"):
        volumes = _product(corners[3:] - corners[:3])
    if not np.isfinite(volumes).all():
        raise ValueError("boxes holds a volume too large for float32 numbers; pass coordinates in voxels or mm")
    kept = _greedy(_Boxes(corners, volumes, _float32_limit(iou_threshold, boxes.dtype)))
    return torch.from_numpy(order[kept]).to(boxes.device)


def _falling(scores: Doubles) -> Indices:
    """Indices by falling score, equal ones in their order; NumPy's stable sort is half as fast."""
    order = np.argsort(-scores).astype(np.int64)
    new = np.diff(scores[order], prepend=np.nan) != 0
    tied = np.flatnonzero(~new | ~np.append(new[1:], True))
    run, index = np.cumsum(new)[tied], order[tied]
    order[tied] = index[np.lexsort((index, run))]
    return order


def _check(boxes: Tensor, scores: Tensor) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 6:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; pass (N, 6): d0, h0, w0, d1, h1, w1")
    if scores.shape != boxes.shape[:1]:
        raise ValueError(f"scores has shape {tuple(scores.shape)} for {len(boxes)} boxes; pass ({len(boxes)},)")
    for name, values in (("boxes", boxes), ("scores", scores)):
        wrong = (~torch.isfinite(values)).nonzero()
        if len(wrong):
            raise ValueError(f"{name} holds NaN or infinity, first at index {int(wrong[0, 0])}; remove such boxes")
    inverted = (boxes[:, 3:] < boxes[:, :3]).any(1).nonzero()
    if len(inverted):
        first = int(inverted[0, 0])
        raise ValueError(f"boxes[{first}] has a maximum below its minimum; pass (d0, h0, w0, d1, h1, w1)")


def _float32_limit(threshold: float, dtype: torch.dtype) -> np.float32:
    """The threshold that float32 IoUs are compared with.

    MONAI compares float32 IoUs with the threshold as a float32, but for boxes in float64 with the threshold itself:
    the largest float32 number not above it decides the same.
    """
    limit = np.float32(threshold)
    if dtype == torch.float64 and float(limit) > threshold:
        limit = np.nextafter(limit, np.float32(-1))
    return limit


@dataclass(frozen=True)
class _Boxes:
    """Boxes by falling score.

    Attributes:
        corners: (6, N).
        volumes: (N,).
        limit: IoU above which the worse of two boxes goes.
    """

    corners: Floats
    volumes: Floats
    limit: np.float32

    def overlap(self, first: Indices, second: Indices) -> Flags:
        """Whether IoUs of boxes ``first`` and ``second`` (index arrays that broadcast) are above the limit."""
        sides = []
        for axis in range(3):
            low = np.maximum(self.corners[axis][first], self.corners[axis][second])
            side = np.minimum(self.corners[axis + 3][first], self.corners[axis + 3][second])
            side -= low
            sides.append(np.maximum(side, 0, out=side))
        inter = _product(sides)
        union = self.volumes[first] + self.volumes[second]
        union -= inter
        union += np.finfo(np.float32).eps
        above: Flags = np.divide(inter, union, out=inter) > self.limit
        return above


def _product(sides: Floats | list[Floats]) -> Floats:
    """Product of three lengths, in the order in which MONAI multiplies: rounding is part of the result."""
    return np.asarray(sides[0] * sides[1] * sides[2], dtype=np.float32)


def _greedy(boxes: _Boxes) -> Indices:
    """Indices of the kept boxes, ascending: the boxes come by falling score."""
    open_ = np.ones(len(boxes.volumes), dtype=bool)
    kept: list[Indices] = []
    places = _Places(boxes)
    grid: _Grid | None = None
    remaining = np.flatnonzero(open_)
    while len(remaining):
        block, rest = remaining[:BLOCK], remaining[BLOCK:]
        winners = _settle(boxes, block)
        kept.append(winners)
        open_[block] = False
        if len(rest):
            if grid is None or 2 * len(rest) < grid.count:
                grid = _Grid(places, rest)
            winner, other = grid.neighbours(winners, open_)
            open_[other[boxes.overlap(winner, other)]] = False
        remaining = rest[open_[rest]]
    return np.concatenate(kept)


def _settle(boxes: _Boxes, block: Indices) -> Indices:
    """The boxes of a block that survive the better ones in it."""
    above = boxes.overlap(block[:, None], block[None, :])
    np.fill_diagonal(above, val=False)
    alive = np.ones(len(block), dtype=bool)
    for i in np.flatnonzero(above.any(1)):
        if alive[i]:
            alive[i:] &= ~above[i, i:]
    return block[alive]


class _Places:
    """Where the boxes are, and how far from there others matter.

    Lengths p >= q with centres x apart overlap by at most q, and by at most (p + q) / 2 - x; the overlap has to exceed
    limit * p. The largest possible x for a given length, over all lengths of the other box, is the factor below.
    """

    def __init__(self, boxes: _Boxes) -> None:
        low, high = boxes.corners[:3].astype(np.float64), boxes.corners[3:].astype(np.float64)
        limit = float(boxes.limit)
        self.centres = (low + high) / 2
        lengths = high - low
        factor = (1 - limit) * max(1.0, 0.5 / max(limit, 1e-9))
        reach = np.minimum(lengths * factor, (lengths + lengths.max(1, keepdims=True)) / 2)
        self.reach = reach + 1e-5 * max(abs(low.min()), abs(high.max()))  # what rounding could add
        self.typical_reach = np.median(self.reach[:, : 8 * BLOCK], axis=1)


class _Grid:
    """The centres of some boxes in cells, so that those near a box are found without a look at the others."""

    def __init__(self, places: _Places, members: Indices) -> None:
        self._places = places
        self.count = len(members)
        centres = np.take(places.centres, members, axis=1)
        self._origin = centres.min(1)
        extent = centres.max(1) - self._origin
        # Cells as wide as a typical reach, but not many more cells than boxes: empty ones cost time too.
        wanted = extent / np.maximum(places.typical_reach, 1e-30)
        self._shape = np.clip(wanted, 1, min(1.5 * self.count ** (1 / 3), MOST_CELLS)).astype(np.int64)
        self._per_unit = self._shape / np.maximum(extent, 1e-30)
        d, h, w = self._cells(centres)
        cell = ((d * self._shape[1] + h) * self._shape[2] + w).astype(np.uint16)
        self._members = members[np.argsort(cell, kind="stable")]
        self._starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=self._shape.prod()))])

    def _cells(self, points: Doubles) -> Indices:
        position = (points - self._origin[:, None]) * self._per_unit[:, None]
        cells: Indices = np.clip(position, 0, self._shape[:, None] - 1).astype(np.int64)
        return cells

    def neighbours(self, queries: Indices, wanted: Flags) -> tuple[Indices, Indices]:
        """Pairs of a query and a wanted member that could overlap by more than the limit."""
        centres, reach = self._places.centres[:, queries], self._places.reach[:, queries]
        low, high = self._cells(centres - reach), self._cells(centres + reach)
        sizes = high - low + 1
        # A query's cells are rows along w: one run of members each.
        row_of, row = _expand(np.zeros_like(queries), sizes[0] * sizes[1])
        d, h = low[0][row_of] + row // sizes[1][row_of], low[1][row_of] + row % sizes[1][row_of]
        first = (d * self._shape[1] + h) * self._shape[2]
        starts = self._starts[first + low[2][row_of]]
        run_of, place = _expand(starts, self._starts[first + high[2][row_of] + 1] - starts)
        members = self._members[place]
        chosen = np.flatnonzero(wanted[members])
        return queries[row_of[run_of[chosen]]], members[chosen]


def _expand(starts: Indices, counts: Indices) -> tuple[Indices, Indices]:
    """All numbers of the runs ``start, start + 1, ...`` of the given lengths, and for each the index of its run."""
    run = np.repeat(np.arange(len(counts)), counts)
    first = np.cumsum(counts) - counts
    return run, np.arange(len(run)) - (first - starts)[run]
