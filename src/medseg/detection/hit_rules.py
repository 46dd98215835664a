"""When a detection hits a true mass: the hit rules, and which detection takes which truth.

Boxes are six numbers (d0, h0, w0, d1, h1, w1), half-open edges in voxels of the view's own grid; the centre of a box
is the mean of its corners. The grid of a view matters only to the rule ``bcs-dbt``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Array = npt.NDArray[np.float64]

#: Columns of a box, in this order.
BOX = ["d0", "h0", "w0", "d1", "h1", "w1"]

#: Columns of a view that the rule ``bcs-dbt`` needs.
GRID = ["slices", "spacing_h", "spacing_w", "pixel_mm"]

#: What a detection is worth, where it is not the row of the truth that it takes.
FALSE_POSITIVE, DUPLICATE = -1, -2

#: The rule ``bcs-dbt``: distance in original pixels, and share of the slices.
BCS_PIXELS, BCS_SLICES = 100, 0.25

__all__ = ["BOX", "DUPLICATE", "FALSE_POSITIVE", "GRID", "box_hits", "check_frames", "match_detections", "require"]


def box_hits(
    detections: npt.ArrayLike, truths: npt.ArrayLike, rule: str = "iou>0.5", grid: Sequence[float] | None = None
) -> npt.NDArray[np.bool_]:
    """Which detections of one view hit which of its true masses, before any truth is given to one of them.

    Rules:

    - ``iou>X`` with X in [0, 1), e.g. ``iou>0.5`` (the paper's) or ``iou>0.3``: the intersection of the boxes over
      their union is greater than X;
    - ``centre``: the centre of the detection lies inside the true box (edges as of voxels: ``low <= centre < high``);
    - ``bcs-dbt``: the centres are, within the slice, at most 100 original pixels or half the diagonal of the true
      box apart, whichever is more, and along d at most a quarter of the number of slices. The rule of the public
      BCS-DBT challenge, here in millimetres so that it holds in resampled grids; it is far looser than ``iou>0.5``
      (100 pixels are 8.5 to 10 mm). The challenge's true boxes have one slice s: give them d0 = s, d1 = s + 1.

    Args:
        detections: (N, 6) boxes.
        truths: (M, 6) boxes.
        rule: name of the rule.
        grid: number of slices of the view, its spacing along h and along w in mm, and the size of an original pixel
            in mm; for ``bcs-dbt``.

    Returns:
        (N, M).

    Raises:
        ValueError: if the rule is unknown or lacks its grid.

    Source: M. Fan et al., the IoU rule (evaluation section); M. Buda et al., JAMA Network Open 4(8), 2021 (BCS-DBT).
    """
    found, true = (np.asarray(b, float).reshape(-1, 6) for b in (detections, truths))
    geometry = None if grid is None else np.asarray(grid, float).reshape(1, 1, 4)
    return _judge(found[:, None], true[None], rule, geometry)[0]


def match_detections(
    detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame, rule: str = "iou>0.5"
) -> npt.NDArray[np.int64]:
    """Give every truth of every view to at most one detection, by falling score.

    A detection takes the truth it fits best (greatest IoU, nearest centre) among those it hits that are still free.
    Equal scores: the better fitting pair comes first, so that the order of the rows does not matter.

    Args:
        detections: columns ``view``, the box, ``score``.
        truths: columns ``view``, the box.
        views: column ``view``; for ``bcs-dbt`` those in :data:`GRID` too.
        rule: as in :func:`box_hits`.

    Returns:
        For each detection the row (position) of the truth that it takes, ``FALSE_POSITIVE`` (-1) if it hits none, or
        ``DUPLICATE`` (-2) if better detections took all that it hits.

    Raises:
        ValueError: if the rule is unknown, or a column or number that it needs is missing.
    """
    pairs = pd.merge(
        pd.DataFrame({"view": detections["view"].to_numpy(), "found": np.arange(len(detections))}),
        pd.DataFrame({"view": truths["view"].to_numpy(), "true": np.arange(len(truths))}),
        on="view",
    )
    found, true = pairs["found"].to_numpy(int), pairs["true"].to_numpy(int)
    grid = None
    if rule == "bcs-dbt":
        require(views, GRID, f"views (the rule {rule!r} needs them)")
        unknown = ~(views[GRID].to_numpy(float) > 0).all(axis=1) & views["view"].isin(truths["view"]).to_numpy()
        _refuse(unknown, views, f"views: the rule {rule!r} needs positive numbers for {', '.join(GRID)}")
        grid = views.set_index("view").loc[pairs["view"], GRID].to_numpy(float)
    hit, fit = _judge(_boxes(detections)[found], _boxes(truths)[true], rule, grid)
    outcome = np.full(len(detections), FALSE_POSITIVE, np.int64)
    outcome[found[hit]] = DUPLICATE
    found, true, fit = found[hit], true[hit], fit[hit]
    free = np.ones(len(truths), bool)
    for i in np.lexsort((true, found, -fit, -detections["score"].to_numpy(float)[found])):
        if outcome[found[i]] == DUPLICATE and free[true[i]]:
            outcome[found[i]] = true[i]
            free[true[i]] = False
    return outcome


def check_frames(detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame) -> None:
    """Refuse tables that do not fit together.

    Raises:
        ValueError: for a missing column, a view or a mass of a view listed twice, boxes or scores of a view that is
            not listed, a score that is not a finite number, an empty true box or one that is turned round.
    """
    require(views, ["view", "patient", "breast"], "views")
    require(truths, ["view", "mass", *BOX], "truths")
    require(detections, ["view", "score", *BOX], "detections")
    _refuse(views["view"].duplicated(), views, "views: listed twice; every view has one row")
    _refuse(truths["mass"].isna(), truths, "truths: no mass; name it, the same in both views of a breast")
    _refuse(truths.duplicated(["view", "mass"]), truths, "truths: a mass has two boxes in one view; give each its name")
    for name, frame, shortest in (("truths", truths, 0.0), ("detections", detections, -np.finfo(float).tiny)):
        _refuse(~frame["view"].isin(views["view"]), frame, f"{name}: the view is not among the views")
        boxes = _boxes(frame)
        wrong = ~np.isfinite(boxes).all(axis=1) | ~(boxes[:, 3:] - boxes[:, :3] > shortest).all(axis=1)
        _refuse(wrong, frame, f"{name}: not a box; give finite {', '.join(BOX)} with d0 < d1, h0 < h1 and w0 < w1")
    scores = detections["score"].to_numpy(float)
    _refuse(~np.isfinite(scores), detections, "detections: the score is not a finite number; leave such a box out")


def require(frame: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    """Refuse a table without all of these columns.

    Raises:
        ValueError: naming the table, what is missing and what is there.
    """
    missing = [c for c in columns if c not in frame.columns]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(missing)}; there are {', '.join(map(str, frame.columns))}")


def _refuse(wrong: Any, frame: pd.DataFrame, message: str) -> None:
    mask = np.asarray(wrong, bool)
    if mask.any():
        first = frame["view"].to_numpy()[mask][0]
        raise ValueError(f"{message} ({int(mask.sum())} rows, the first of view {first!r})")


def _boxes(frame: pd.DataFrame) -> Array:
    boxes: Array = frame[BOX].to_numpy(float)
    return boxes


def _judge(found: Array, true: Array, rule: str, grid: Array | None) -> tuple[npt.NDArray[np.bool_], Array]:
    """Whether detections hit truths, and how well they fit (greater is better), broadcast over (..., 6) boxes."""
    if iou := re.fullmatch(r"iou>(0?\.\d+|0)", rule):
        overlap = _iou(found, true)
        return overlap > float(iou[1]), overlap
    centre = (found[..., :3] + found[..., 3:]) / 2
    size = true[..., 3:] - true[..., :3]
    offset = centre - (true[..., :3] + true[..., 3:]) / 2
    if rule == "centre":
        inside = (centre >= true[..., :3]) & (centre < true[..., 3:])
        return np.asarray(inside.all(axis=-1)), -np.linalg.norm(offset / size, axis=-1)
    if rule == "bcs-dbt":
        if grid is None:
            raise ValueError("the rule 'bcs-dbt' needs grid=(slices, spacing_h, spacing_w, pixel_mm)")
        distance = np.linalg.norm(offset[..., 1:] * grid[..., 1:3], axis=-1)
        radius = np.linalg.norm(size[..., 1:] * grid[..., 1:3], axis=-1) / 2
        near = distance <= np.maximum(BCS_PIXELS * grid[..., 3], radius)
        return near & (np.abs(offset[..., 0]) <= BCS_SLICES * grid[..., 0]), -distance
    raise ValueError(f"unknown hit rule {rule!r}; give iou>0.5, iou>0.3 (any number below 1), centre or bcs-dbt")


def _iou(a: Array, b: Array) -> Array:
    """Intersection over union of (..., 6) boxes; 0 where both are empty."""
    low, high = np.maximum(a[..., :3], b[..., :3]), np.minimum(a[..., 3:], b[..., 3:])
    shared = np.clip(high - low, 0, None).prod(axis=-1)
    union = (a[..., 3:] - a[..., :3]).prod(axis=-1) + (b[..., 3:] - b[..., :3]).prod(axis=-1) - shared
    overlap: Array = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return overlap
