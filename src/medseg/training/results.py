"""What a scored part of a data list leaves in a run's folder: tables and overlays."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from medseg.calibration import reliability_figure, reliability_table
from medseg.io.files import write_atomically, write_csv
from medseg.io.images import write_png
from medseg.io.overlay import overlay_of_file
from medseg.metrics import summarise
from medseg.training.module import Case

#: Picture (h, w) or (h, w, 3) uint8 of a case: its image with prediction and truth drawn on it.
Draw = Callable[[Case], Any]

__all__ = [
    "Draw",
    "by_file_name",
    "by_part",
    "draw_case",
    "table",
    "typical_cases",
    "worst_first",
    "write_overlays",
    "write_results",
]


def write_results(folder: Path, cases: list[Case]) -> dict[str, Any]:
    """Write ``per_image.csv``, ``metrics.json`` and, where there are probabilities, ``reliability.png``.

    Args:
        folder: where to.
        cases: at least one.

    Returns:
        Mean, standard deviation and number of defined values per metric, and the counts of cases, empty predictions
        and empty truths, and the ``calibration`` over all pixels if there are probabilities. Empty cases are counted,
        never given a stand-in value.
    """
    write_csv(folder / "per_image.csv", [c.row() for c in cases])
    summary: dict[str, Any] = {
        "cases": len(cases),
        "empty_predictions": sum(c.empty_prediction for c in cases),
        "empty_truths": sum(c.empty_truth for c in cases),
        "metrics": {name: summarise([c.metrics[name] for c in cases]) for name in cases[0].metrics},
    }
    reliabilities = [c.reliability for c in cases if c.reliability is not None]
    if reliabilities:
        bins = np.sum(reliabilities, axis=0)
        summary["calibration"] = reliability_table(bins)
        picture = io.BytesIO()
        reliability_figure({folder.name: bins}).savefig(picture, dpi=120)
        write_atomically(folder / "reliability.png", picture.getvalue())
    write_atomically(folder / "metrics.json", (json.dumps(_no_nan(summary), indent=1) + "\n").encode())
    return summary


def by_part(cases: list[Case]) -> dict[str, list[Case]]:
    """Cases by the part of the data list that they were scored for."""
    return {part: [c for c in cases if c.part == part] for part in dict.fromkeys(c.part for c in cases)}


def worst_first(cases: list[Case]) -> list[Case]:
    """Cases in the order of the first metric; undefined ones count as worst."""
    first = next(iter(cases[0].metrics))
    return sorted(cases, key=lambda c: float(np.nan_to_num(c.metrics[first], nan=-np.inf)))


def typical_cases(cases: list[Case]) -> dict[str, Case]:
    """The worst, the median and the best case by the first metric."""
    ranked = worst_first(cases)
    return {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}


def write_overlays(folder: Path, cases: dict[str, Case], draw: Draw) -> list[Path]:
    """Draw truth (green) and prediction (yellow) on the images of some cases.

    Args:
        folder: where to.
        cases: with masks, by file name.
        draw: gives the picture of a case.

    Returns:
        The files written.
    """
    files = []
    for name, case in cases.items():
        files.append(folder / f"{name}.png")
        write_png(files[-1], draw(case))
    return files


def draw_case(case: Case) -> Any:
    """Outlines of prediction and truth on a 2D image, see :func:`medseg.io.overlay.overlay_of_file`."""
    return overlay_of_file(case.image, *case.unpacked())


def by_file_name(cases: list[Case]) -> dict[str, Case]:
    """Cases by file name, with their place in the list in front if two images have the same one."""
    stems = [Path(c.image).stem for c in cases]
    unique = len(set(stems)) == len(stems)
    names = stems if unique else [f"{i:04d}_{stem}" for i, stem in enumerate(stems)]
    return dict(zip(names, cases, strict=True))


def table(summary: dict[str, Any]) -> str:
    """The summary of :func:`write_results` for people."""
    lines = [f"{'metric':<20} {'mean':>10} {'sd':>10} {'n':>5}"]
    for name, value in summary["metrics"].items():
        lines.append(f"{name:<20} {value['mean']:>10.4f} {value['sd']:>10.4f} {value['n']:>5}")
    lines.append(
        f"{summary['cases']} cases, {summary['empty_predictions']} with an empty prediction, "
        f"{summary['empty_truths']} with an empty truth"
    )
    if "calibration" in summary:
        lines.append(
            f"expected calibration error of the probability, over all pixels: {summary['calibration']['ece']:.4f}"
        )
    return "\n".join(lines)


def _no_nan(value: Any) -> Any:
    """``nan`` is no JSON: ``null`` says undefined."""
    if isinstance(value, dict):
        return {k: _no_nan(v) for k, v in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
