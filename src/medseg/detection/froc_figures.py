"""Figures of FROC curves, drawn with matplotlib (the paper's figures 2 to 6)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from medseg.detection.free_response import Froc
from medseg.detection.froc_statistics import AreaInterval

#: Panels beside each other in the figure of subgroups.
ACROSS = 5

__all__ = ["froc_figure", "png", "subgroup_figure"]


def png(figure: Figure) -> bytes:
    """A figure as PNG; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150, metadata={"Software": None})
    return content.getvalue()


def froc_figure(
    curves: Mapping[str, Mapping[str, Froc]], bands: Mapping[str, AreaInterval], limit: float, rule: str
) -> Figure:
    """FROC curves of several methods, breast-based and lesion-based beside each other.

    Args:
        curves: by method, then by ``breast`` and ``lesion``.
        bands: pointwise interval of the breast-based curve by method.
        limit: right end of the axis, in false positives.
        rule: hit rule, for the title.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, by in zip(panels, ("breast", "lesion"), strict=True):
        for i, (name, both) in enumerate(curves.items()):
            _step(axes, both[by], limit, f"C{i % 10}", f"{name} (area {both[by].area(limit):.3f})")
            if by == "breast" and name in bands:
                band = bands[name]
                axes.fill_between(
                    band.rates, *band.sensitivity_interval, step="post", color=f"C{i % 10}", alpha=0.15, linewidth=0
                )
        first = next(iter(curves.values()))[by]
        what = f"{first.truths} masses, {first.units} breasts" if by == "breast" else f"{first.truths} masses in views"
        axes.set_title(f"{by}-based: {what}; hit: {rule}", fontsize="medium")
        axes.set_xlabel(f"false positives per {by}")
        _frame(axes, limit)
        axes.legend(fontsize="small", loc="lower right")
    panels[0].set_ylabel("sensitivity (band: 95 % interval)" if bands else "sensitivity")
    return figure


def subgroup_figure(groups: Sequence[tuple[str, str, Mapping[str, Froc]]], limit: float) -> Figure:
    """Breast-based FROC curves of every subgroup, a row of panels (or several) per field.

    Args:
        groups: field, value, and the curve by method.
        limit: right end of the axes, in false positives per breast.
    """
    rows: list[list[tuple[str, str, Mapping[str, Froc]]]] = []
    for group in groups:
        if not rows or rows[-1][0][0] != group[0] or len(rows[-1]) == ACROSS:
            rows.append([])
        rows[-1].append(group)
    figure = Figure(figsize=(2.4 * ACROSS, 2.5 * len(rows) + 0.4), layout="constrained")
    panels = figure.subplots(len(rows), ACROSS, sharey=True, squeeze=False)
    for line, row in zip(panels, rows, strict=True):
        for axes, (field, value, curves) in zip(line, row, strict=False):
            for i, (name, curve) in enumerate(curves.items()):
                _step(axes, curve, limit, f"C{i % 10}", name)
            breasts = next(iter(curves.values())).units
            axes.set_title(f"{field} {value} (n = {breasts})", fontsize="small")
            _frame(axes, limit)
        for axes in line[len(row) :]:
            axes.set_axis_off()
        line[0].set_ylabel("sensitivity", fontsize="small")
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 5), fontsize="small")
    figure.supxlabel("false positives per breast", fontsize="medium")
    return figure


def _step(axes: Any, curve: Froc, limit: float, colour: str, label: str) -> None:
    """The curve as the step it is: from 0 through its points, and on to the limit."""
    if not curve.truths or not curve.units:
        axes.plot([], [], color=colour, label=label)
        return
    x = np.concatenate([[0.0], curve.false_positives, [max([limit, *curve.false_positives[-1:]])]])
    y = np.concatenate([[0.0], curve.sensitivity, curve.sensitivity[-1:] if len(curve.sensitivity) else [0.0]])
    axes.step(x, y, where="post", color=colour, label=label, linewidth=1.5)


def _frame(axes: Any, limit: float) -> None:
    axes.set_xlim(0, limit)
    axes.set_ylim(0, 1.01)
    axes.grid(alpha=0.3)
