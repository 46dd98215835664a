"""The report of a comparison: one HTML file that opens offline, with every figure and picture inside it."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medseg.experiments.compare import Comparison
from medseg.experiments.figures import Curve, box_figure, curve_figure, difference_figure, reliability, svg
from medseg.experiments.runs import PER_RUN, RunRecord, fetch_artifact
from medseg.experiments.tables import FORMATS, comparison_tables, number, render
from medseg.io.files import write_atomically

#: Parts of a config whose values follow from others, or that only record.
DERIVED = ("recorder.", "train.handlers.", "train.trainer.", "validate.evaluator.", "validate.handlers.")

#: Pictures per configuration, and their side in pixels: a report has to fit into a mail.
WORST, SIDE = 4, 420

#: Runs per configuration whose learning curves are drawn.
MAX_CURVES = 6

__all__ = ["html_report", "write_comparison"]


def html_report(comparison: Comparison) -> str:
    """The report as HTML. It has no script and refers to nothing outside itself."""
    from jinja2 import Environment

    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    runs, tables = comparison.runs, comparison_tables(comparison)
    count = len(comparison.metrics)
    unit = "cases" if comparison.unit == "case" else f"{comparison.unit}s (cases of one are averaged first)"
    text: str = Environment(autoescape=True, trim_blocks=True).from_string(template).render(
        title=f"Comparison of {runs.experiment}",
        subtitle=f"{len(runs.finished)} runs of {len(runs.configurations)} configurations, part {runs.part}; "
        f"store {runs.uri}; written {time.strftime('%Y-%m-%d %H:%M')}",
        notes=comparison.notes,
        unit=unit,
        baseline=comparison.baseline,
        scores=list(zip(comparison.metrics, tables[:count], strict=True)),
        subgroups=tables[count:-1],
        overview=tables[-1],
        failures=[f"{r.name}: {r.run.info.status}" for r in runs.failed],
        figures=[(caption, _image(svg(figure), "svg+xml")) for caption, figure in _figures(comparison)],
        gallery=list(_gallery(comparison)),
        gallery_metric=comparison.metrics[0],
        differences=list(_differences(comparison)),
        environment=list(_environment(comparison)),
    )  # fmt: skip
    return text


def write_comparison(comparison: Comparison, out: Path, form: str = "table") -> list[Path]:
    """Write a comparison into a folder.

    Args:
        comparison: what to write.
        out: folder, made if needed.
        form: further format of the tables, from :data:`medseg.experiments.tables.FORMATS`.

    Returns:
        ``comparison.csv``, ``report.html``, ``subgroups.csv``, ``ranks.csv``, ``runs.csv`` and the tables' file.
    """
    files = {
        "comparison.csv": render(comparison, "csv"),
        "ranks.csv": comparison.ranks.to_csv(index=False),
        "runs.csv": comparison.overview.to_csv(index=False),
        **({} if comparison.subgroups.empty else {"subgroups.csv": comparison.subgroups.to_csv(index=False)}),
        **({f"comparison.{FORMATS[form][0]}": render(comparison, form)} if form in FORMATS else {}),
        "report.html": html_report(comparison),
    }
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    return [out / name for name in files]


def _figures(comparison: Comparison) -> Iterator[tuple[str, Any]]:
    for metric in comparison.metrics:
        yield f"{metric} of every case", box_figure(comparison, metric)
    for metric in comparison.metrics:
        figure = difference_figure(comparison, metric)
        if figure is not None:
            yield f"{metric}: paired differences", figure
    curves = _curves(comparison)
    if curves:
        yield "learning curves", curve_figure(curves)
    figure = reliability(comparison)
    if figure is not None:
        yield "reliability of the probability, over all pixels", figure


def _curves(comparison: Comparison) -> dict[str, dict[str, list[Curve]]]:
    """Training loss and the first metric's validation score per epoch."""
    quantities = ("train_loss", f"val_{comparison.runs.metrics[0]}")
    curves: dict[str, dict[str, list[Curve]]] = {q: {} for q in quantities}
    drawn: dict[str, int] = {}
    for record in comparison.runs.finished:
        drawn[record.configuration] = drawn.get(record.configuration, 0) + 1
        if drawn[record.configuration] > MAX_CURVES:
            continue
        for quantity in quantities:
            if quantity in record.run.data.metrics:
                history = comparison.runs.client.get_metric_history(record.run_id, quantity)
                by_step = {m.step: m.value for m in history if np.isfinite(m.value)}
                if by_step:
                    steps = np.array(sorted(by_step), float)
                    values = np.array([by_step[int(s)] for s in steps])
                    curves[quantity].setdefault(record.configuration, []).append((steps, values))
    return {q: c for q, c in curves.items() if c}


def _gallery(comparison: Comparison) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    metric = comparison.metrics[0]
    ascending = comparison.runs.modes[metric] == "max"
    for configuration in comparison.runs.configurations:
        worst: list[tuple[float, str, str, RunRecord]] = []
        for record in comparison.runs.finished:
            if record.configuration == configuration and "overlay" in record.cases:
                ranked = record.cases.sort_values(metric, ascending=ascending, na_position="first").head(WORST)
                worst += [(v, c, o, record) for v, c, o in ranked[[metric, "case", "overlay"]].itertuples(index=False)]
        worst.sort(key=lambda w: -np.inf if np.isnan(w[0]) else w[0] if ascending else -w[0])
        pictures = []
        for value, case, overlay, record in worst[:WORST]:
            try:
                content = fetch_artifact(record, comparison.runs.client, f"{comparison.runs.part}/overlays/{overlay}")
                pictures.append((f"{case}: {metric} {number(value)} ({record.name})", _thumbnail(content)))
            except OSError:  # the store keeps the worst overlays of each run only, or none
                continue
        if pictures:
            yield configuration, pictures


def _thumbnail(content: bytes) -> str:
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=85)
    return _image(encoded.getvalue(), "jpeg")


def _image(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _differences(comparison: Comparison) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Settings that are not the same in all configurations, each with its values and who has them.

    What differs within a configuration is its folds', not its own.
    """
    by_configuration: dict[str, list[dict[str, str]]] = {}
    for record in comparison.runs.finished:
        folder = record.run.data.params.get("output_dir") or "\0"
        settings = {k: v for k, v in record.run.data.params.items() if folder not in v}
        by_configuration.setdefault(record.configuration, []).append(settings)
    keys = sorted({k for group in by_configuration.values() for settings in group for k in settings})
    for key in keys:
        if key.split(".")[0] in PER_RUN - {"network_name", "mode"} or key.startswith(DERIVED):
            continue
        if any(s.get(key, "")[:1] in ("@", "$") for group in by_configuration.values() for s in group):
            continue  # not resolved in some run: what it refers to is listed itself
        values = [sorted({s.get(key, "–") for s in group}) for group in by_configuration.values()]
        if len({tuple(v) for v in values}) > 1 and all(len(v) <= 3 for v in values):
            owners: dict[str, list[str]] = {}
            for configuration, own in zip(by_configuration, values, strict=True):
                owners.setdefault(", ".join(own), []).append(configuration)
            most = max(owners, key=lambda value: len(owners[value]))
            yield (
                key,
                [(v, "all others" if v == most and len(n) > 2 else ", ".join(n)) for v, n in owners.items()],
            )


def _environment(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Packages, machine and commit; where runs differ, all of them."""
    tags: dict[str, set[str]] = {}
    for record in comparison.runs.finished:
        for key, value in record.run.data.tags.items():
            if key.startswith("version.") or key in ("machine", "mlflow.source.git.commit", "mlflow.user"):
                tags.setdefault(key.removeprefix("version.").removeprefix("mlflow."), set()).add(value)
    for key in sorted(tags):
        yield key, ", ".join(sorted(tags[key]))
