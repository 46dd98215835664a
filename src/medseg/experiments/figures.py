"""The figures of a comparison, drawn with matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from medseg.calibration import reliability_figure
from medseg.experiments.compare import Comparison, calibration
from medseg.experiments.statistics import bootstrap_ci

Curve = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

WIDTH = 7.0

__all__ = ["box_figure", "curve_figure", "difference_figure", "reliability", "svg"]


def svg(figure: Figure) -> bytes:
    """A figure as SVG; dots are drawn as a picture in it, so that thousands of cases stay small."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", dpi=200, metadata={"Date": None})
    return content.getvalue()


def box_figure(comparison: Comparison, metric: str) -> Figure:
    """Every case of every configuration, with quartiles and the mean's interval."""
    wide = comparison.values[metric]
    intervals = comparison.table[comparison.table["metric"] == metric].set_index("configuration")
    figure, axes = _rows(list(wide.columns))
    for y, configuration in enumerate(wide.columns):
        values = wide[configuration].dropna().to_numpy(float)
        if not len(values):
            continue
        axes.boxplot(
            values, positions=[y], orientation="horizontal", widths=0.6, showfliers=False, manage_ticks=False,
            medianprops={"color": "black"},
        )  # fmt: skip
        axes.scatter(values, y + _jitter(len(values)), s=9, alpha=0.5, linewidths=0, rasterized=True)
        low, high = intervals.loc[configuration, ["ci_low", "ci_high"]]
        axes.errorbar(
            values.mean(), y, xerr=[[max(0, values.mean() - low)], [max(0, high - values.mean())]], fmt="D",
            color="crimson", markersize=4, capsize=3, zorder=5,
        )  # fmt: skip
    axes.set_xlabel(metric)
    axes.set_title("box: quartiles; red: mean and its 95 % interval; dots: cases", fontsize="small")
    return figure


def difference_figure(comparison: Comparison, metric: str) -> Figure | None:
    """Difference of every case to the baseline, with the mean's interval; ``None`` without a second configuration."""
    wide = comparison.values[metric]
    others = [c for c in wide.columns if c != comparison.baseline]
    if not others:
        return None
    figure, axes = _rows(others)
    better = comparison.runs.modes[metric] == "max"
    for y, configuration in enumerate(others):
        difference = (wide[configuration] - wide[comparison.baseline]).dropna().to_numpy(float)
        if not len(difference):
            continue
        good = difference > 0 if better else difference < 0
        colours = np.where(difference == 0, "0.5", np.where(good, "tab:green", "tab:red"))
        axes.scatter(difference, y + _jitter(len(difference)), s=9, alpha=0.6, linewidths=0, c=colours, rasterized=True)
        low, high = bootstrap_ci(difference)
        mean = difference.mean()
        axes.errorbar(
            mean, y, xerr=[[max(0, mean - low)], [max(0, high - mean)]], fmt="D", color="black", markersize=4,
            capsize=3, zorder=5,
        )  # fmt: skip
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_xlabel(f"{metric}: difference to {comparison.baseline}")
    axes.set_title("green: better than the baseline on that case; black: mean and its 95 % interval", fontsize="small")
    return figure


def curve_figure(curves: Mapping[str, Mapping[str, Sequence[Curve]]]) -> Figure:
    """Learning curves: a panel per quantity, a thin line per run, a thick one for the mean of a configuration.

    Args:
        curves: (steps, values) of each run, by quantity and configuration.
    """
    figure = Figure(figsize=(WIDTH, 2.6 * len(curves)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(curves), 1, sharex=True))
    for axes, (quantity, by_configuration) in zip(panels, curves.items(), strict=True):
        for i, (configuration, runs) in enumerate(by_configuration.items()):
            colour = f"C{i % 10}"
            for steps, values in runs:
                axes.plot(steps + 1, values, color=colour, alpha=0.25, linewidth=0.8)
            steps = np.unique(np.concatenate([s for s, _ in runs]))
            mean = [np.mean([v[s == step] for s, v in runs if (s == step).any()]) for step in steps]
            axes.plot(steps + 1, mean, color=colour, linewidth=1.8, label=configuration)
        axes.set_ylabel(quantity)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize="x-small", ncols=2)
    panels[-1].set_xlabel("epoch")
    return figure


def reliability(comparison: Comparison) -> Figure | None:
    """Reliability of every configuration whose output is a probability; ``None`` if there is none."""
    curves = {}
    for configuration in comparison.runs.configurations:
        bins = calibration([r for r in comparison.runs.finished if r.configuration == configuration])
        if bins is not None:
            curves[configuration] = bins
    return reliability_figure(curves) if curves else None


def _rows(names: Sequence[str]) -> tuple[Figure, Any]:
    """A panel with one row per configuration. Fixed margins: matplotlib's own layout takes longer than the drawing."""
    height = 1.1 + 0.5 * len(names)
    left = min(0.3 + 0.075 * max(map(len, names)), WIDTH / 2)
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left / WIDTH, 0.55 / height, 1 - (left + 0.2) / WIDTH, 1 - 0.9 / height))
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _jitter(count: int) -> npt.NDArray[np.float64]:
    """The same for the same number of dots: a report does not change when it is written again."""
    return np.random.default_rng(0).uniform(-0.2, 0.2, count)
