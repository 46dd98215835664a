"""The FROC analysis of finished predictions: tables and figures from the files of one or several runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medseg.detection.free_response import LIMIT, Froc, Outcomes, outcomes, sensitivity_table
from medseg.detection.froc_figures import froc_figure, png, subgroup_figure
from medseg.detection.froc_statistics import RATES, AreaDifference, bootstrap_outcomes, compare_outcomes
from medseg.detection.froc_subgroups import Subgroup, subgroups
from medseg.detection.froc_tables import froc_markdown
from medseg.detection.hit_rules import BOX, GRID, check_frames, require
from medseg.io.files import write_atomically

#: Files of a run's folder.
VIEWS, DETECTIONS, TRUTHS = "per_image.csv", "detections.csv", "truths.csv"

#: Sensitivities of the table of subgroups.
SUBGROUP_SENSITIVITIES = (0.8, 0.9)

__all__ = ["find_runs", "read_run", "write_froc_report"]


@dataclass(frozen=True)
class _Settings:
    rule: str
    duplicates: str
    limit: float
    baseline: str
    seed: int
    resamples: int


Run = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def read_run(folder: Path) -> Run:
    """Detections, truths and views from a run's folder.

    The column ``image`` of each file is the view's name, or else ``view``; where both exist, ``view`` is kept as
    ``view_position``.

    Args:
        folder: holds ``per_image.csv`` (patient, breast and fields of every view), ``detections.csv`` (boxes and
            scores) and ``truths.csv`` (boxes of masses).

    Raises:
        OSError: if a file is missing.
        ValueError: naming the file, if a column is missing or a number is none, or the tables do not fit together.
    """
    views = _read(folder / VIEWS, ["view", "patient", "breast"], ())
    truths = _read(folder / TRUTHS, ["view", "mass"], BOX)
    detections = _read(folder / DETECTIONS, ["view"], [*BOX, "score"])
    try:
        check_frames(detections, truths, views)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return detections, truths, views


def find_runs(runs: Sequence[str], part: str = "test") -> dict[str, Path]:
    """The folders of the scores of runs, by name.

    Args:
        runs: folders of runs, of cross-validation's children or of one part's scores; ``NAME=FOLDER`` gives a name, by
            default the folder's own.
        part: part of the data list: ``RUN/evaluation/PART`` or ``RUN/PART`` is taken where there is one.

    Raises:
        ValueError: if two runs have one name.
    """
    found: dict[str, Path] = {}
    for text in runs:
        name, _, folder = text.rpartition("=")
        root = Path(folder)
        name = name or root.resolve().name
        if name in found:
            raise ValueError(f"two runs are called {name}; name them: NAME=FOLDER")
        places = [root / "evaluation" / part, root / part, root]
        found[name] = next((place for place in places if (place / DETECTIONS).is_file()), root)
    return found


def write_froc_report(
    runs: Mapping[str, Path],
    out: Path,
    rule: str = "iou>0.5",
    limit: float = LIMIT,
    baseline: str | None = None,
    *,
    seed: int = 0,
    duplicates: str = "ignore",
    resamples: int = 1000,
    fields: Sequence[str] | None = None,
) -> list[Path]:
    """Write the FROC analysis of one or several methods on the same views.

    Args:
        runs: folder of every method by its name, each as :func:`read_run` reads it.
        out: folder, made if needed.
        rule: hit rule, as in :func:`medseg.detection.hit_rules.box_hits`.
        limit: greatest rate of false positives of the areas and figures.
        baseline: name of the method that the others are compared with; by default the first one.
        seed: seed of intervals and tests.
        duplicates: as in :func:`medseg.detection.free_response.outcomes`.
        resamples: bootstrap samples, and random swaps.
        fields: fields to divide by, as in :func:`medseg.detection.froc_subgroups.subgroups`.

    Returns:
        What was written: ``froc.csv`` (the curves), ``table2.csv`` (false positives at sensitivities), ``areas.csv``
        (areas, sensitivities at rates, paired tests), ``truth_areas.csv`` (what every mass contributes),
        ``froc_tables.md``, ``froc.png``; with fields to divide by ``table3.csv`` and ``froc_subgroups.png`` too.

    Raises:
        OSError: if a file is missing.
        ValueError: if there is no run, the baseline is none of them, a file is wrong, or views or truths differ.
    """
    if not runs:
        raise ValueError("runs is empty; give at least one folder by its name")
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"baseline is {baseline!r}, which is none of the runs: {', '.join(runs)}")
    settings = _Settings(rule, duplicates, limit, baseline, seed, resamples)
    read = {name: read_run(Path(folder)) for name, folder in runs.items()}
    _refuse_different({name: Path(folder) for name, folder in runs.items()}, read)
    _, truths, views = next(iter(read.values()))
    read = {name: (detections, truths, views) for name, (detections, _, _) in read.items()}  # in the same order

    counted = {name: {by: _outcomes(run, by, settings) for by in ("breast", "lesion")} for name, run in read.items()}
    curves = {name: {by: found.curve() for by, found in both.items()} for name, both in counted.items()}
    tables = {"areas.csv": _areas(counted, settings), "table2.csv": _table2(curves)}
    groups = [(g, {n: _outcomes(_part(r, g), "breast", settings) for n, r in read.items()})
              for g in subgroups(views, truths, fields)]  # fmt: skip
    if groups:
        tables["table3.csv"] = _table3(groups, settings)
    figures = {"froc.png": froc_figure(curves, _bands(counted, settings), limit, rule)}
    if groups:
        panels = [(g.field, g.value, {n: o.curve() for n, o in by_run.items()}) for g, by_run in groups]
        figures["froc_subgroups.png"] = subgroup_figure(panels, limit)

    content = {"froc.csv": _points(curves), **tables, "truth_areas.csv": _items(counted, limit)}
    files = {name: table.to_csv(index=False).encode() for name, table in content.items()}
    files["froc_tables.md"] = froc_markdown(
        tables, rule=rule, limit=limit, baseline=baseline, duplicates=duplicates,
        without_breast=int(views["breast"].eq("").sum()), resamples=resamples,
    ).encode()  # fmt: skip
    files |= {name: png(figure) for name, figure in figures.items()}
    for name, data in files.items():
        write_atomically(out / name, data)
    return [out / name for name in files]


def _read(path: Path, texts: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except pd.errors.EmptyDataError as error:
        raise ValueError(f"{path}: the file is empty; it needs at least its header") from error
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise ValueError(f"{path}: not a CSV table ({error})") from error
    if "image" in table.columns:
        table = table.rename(columns={"view": "view_position", "image": "view"})
    require(table, [*texts, *numbers], str(path))
    for column in numbers:
        table[column] = _numbers(table[column], path)
    for column in (c for c in GRID if c in table.columns and not numbers):
        table[column] = _numbers(table[column].replace("", "nan"), path)
    return table


def _numbers(values: pd.Series, path: Path) -> pd.Series:
    try:
        return values.astype(float)
    except ValueError as error:
        raise ValueError(f"{path}: column {values.name} is not a number in every row ({error})") from error


def _refuse_different(folders: Mapping[str, Path], read: Mapping[str, Run]) -> None:
    """Refuse to compare runs on different views or truths."""
    first, *others = read
    for other in others:
        for i, file, keys, numbers in (
            (2, VIEWS, ["view", "patient", "breast"], []),
            (1, TRUTHS, ["view", "mass"], BOX),
        ):
            a, b = (read[n][i].set_index(keys)[numbers].sort_index() for n in (first, other))
            where = f"{folders[other] / file} and {folders[first] / file}"
            if len(odd := a.index.symmetric_difference(b.index)):
                raise ValueError(f"{where} differ: {odd[0]} is only in one of them; compare runs on the same views")
            if not np.allclose(a.to_numpy(float), b.to_numpy(float), atol=1e-3):
                raise ValueError(f"{where} have different boxes; compare runs with the same truths in the same grid")


def _outcomes(run: Run, by: str, settings: _Settings) -> Outcomes:
    detections, truths, views = run
    return outcomes(detections, truths, views, by, settings.rule, duplicates=settings.duplicates)


def _part(run: Run, group: Subgroup) -> Run:
    """A run on the breasts of a subgroup: its truths, and false positives there only."""
    detections, truths, views = run
    kept = views[views["breast"].isin(group.breasts)]
    return detections[detections["view"].isin(kept["view"])], truths[truths["view"].isin(kept["view"])], kept


def _bands(counted: Mapping[str, Mapping[str, Outcomes]], settings: _Settings) -> dict[str, Any]:
    rates = np.linspace(0, settings.limit, 161).tolist()
    return {
        name: bootstrap_outcomes(both["breast"], rates=rates, resamples=settings.resamples, seed=settings.seed)
        for name, both in counted.items()
    }


def _points(curves: Mapping[str, Mapping[str, Froc]]) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"run": name, "by": by, "threshold": c.thresholds, "sensitivity": c.sensitivity,
                      "false_positives": c.false_positives})
        for name, both in curves.items() for by, c in both.items()
    ]  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def _items(counted: Mapping[str, Mapping[str, Outcomes]], limit: float) -> pd.DataFrame:
    rows = [found.areas(limit).assign(run=name, by=by) for name, both in counted.items() for by, found in both.items()]
    columns = ["run", "by", "patient", "breast", "view", "mass", "score", "false_positives", "area"]
    return pd.concat(rows, ignore_index=True).reindex(columns=columns)


def _table2(curves: Mapping[str, Mapping[str, Froc]]) -> pd.DataFrame:
    parts = [sensitivity_table({name: both[by] for name, both in curves.items()}) for by in ("breast", "lesion")]
    return pd.concat(parts, ignore_index=True).rename(columns={"name": "run"})


def _areas(counted: Mapping[str, Mapping[str, Outcomes]], settings: _Settings) -> pd.DataFrame:
    rows = []
    for by in ("breast", "lesion"):
        for name, both in counted.items():
            found = both[by]
            interval = bootstrap_outcomes(found, limit=settings.limit, resamples=settings.resamples, seed=settings.seed)
            low, high = interval.area_interval
            row: dict[str, Any] = {"run": name, "by": by, "truths": len(found.truths), "units": int(found.units.sum())}
            row |= {"area": interval.area, "area_low": low, "area_high": high}
            for i, rate in enumerate(RATES):
                row[f"sensitivity_{rate:g}"] = interval.sensitivity[i]
                row[f"sensitivity_{rate:g}_low"], row[f"sensitivity_{rate:g}_high"] = interval.sensitivity_interval[
                    :, i
                ]
            rows.append(row | _test(found, counted[settings.baseline][by], name, settings))
    return pd.DataFrame(rows)


def _table3(groups: Sequence[tuple[Subgroup, Mapping[str, Outcomes]]], settings: _Settings) -> pd.DataFrame:
    rows = []
    for group, by_run in groups:
        for name, found in by_run.items():
            one = found.curve()
            row = {"field": group.field, "value": group.value, "run": name, "breasts": one.units, "masses": one.truths}
            row |= {f"{100 * s:g}": one.false_positives_at(s) for s in SUBGROUP_SENSITIVITIES}
            row |= {"area": one.area(settings.limit), **_test(found, by_run[settings.baseline], name, settings)}
            rows.append(row)
    return pd.DataFrame(rows)


def _test(found: Outcomes, reference: Outcomes, name: str, settings: _Settings) -> dict[str, float]:
    """Paired difference to the baseline; nothing for the baseline itself."""
    if name == settings.baseline:
        tested = AreaDifference(np.nan, np.nan, np.nan, (np.nan, np.nan), np.nan, np.nan)
    else:
        tested = compare_outcomes(
            found, reference, limit=settings.limit, resamples=settings.resamples, seed=settings.seed
        )
    low, high = tested.interval
    return {"difference": tested.difference, "difference_low": low, "difference_high": high,
            "p_bootstrap": tested.p_bootstrap, "p_permutation": tested.p_permutation}  # fmt: skip
