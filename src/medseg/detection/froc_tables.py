"""The tables of an FROC analysis as Markdown, with what they mean below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medseg.detection.free_response import SENSITIVITIES
from medseg.detection.froc_statistics import RATES
from medseg.experiments.tables import Table, number, p_text

#: The paper's Table 2 on 3D images, hit by IoU > 0.5: false positives at 60, 70, 80, 85, 90 and 95 % sensitivity.
PAPER = {
    ("3D Mask R-CNN", "breast"): (0.08, 0.22, 0.34, 0.57, 0.83, 1.02),
    ("2D Mask R-CNN", "breast"): (0.19, 0.34, 0.77, 1.06, 1.24, 2.80),
    ("3D Mask R-CNN", "lesion"): (0.10, 0.16, 0.33, 0.57, 0.80, 1.10),
    ("2D Mask R-CNN", "lesion"): (0.22, 0.38, 0.69, 0.91, 1.30, 2.38),
    ("Faster R-CNN", "lesion"): (0.29, 0.54, 1.18, 1.66, 2.37, 4.05),
}

TABLE2_NOTE = (
    "The paper's rows are of its own 163 test breasts, each with one mass, and of IoU > 0.5; they are no baseline for "
    "other data. Its breast-based column of Faster R-CNN on 3D images repeats that of the 2D images in every row: one "
    "of them is a copy, so it is no reference and left out."
)

TEST_NOTE = (
    "Differences are to {baseline}, paired by patient; p (bootstrap) resamples patients, p (permutation) swaps the two "
    "methods' outputs patient by patient; both are two-sided, at least 1 / {least} and not adjusted for the number of "
    "comparisons."
)

__all__ = ["PAPER", "froc_markdown"]


def froc_markdown(
    tables: Mapping[str, pd.DataFrame],
    *,
    rule: str,
    limit: float,
    baseline: str,
    duplicates: str,
    without_breast: int,
    resamples: int,
) -> str:
    """The text of an FROC analysis.

    Args:
        tables: ``areas.csv``, ``table2.csv`` and, with subgroups, ``table3.csv``.
        rule: hit rule.
        limit: greatest rate of false positives of the areas.
        baseline: name of the run that the others are compared with.
        duplicates: what further detections of a mass count.
        without_breast: number of views whose laterality is unknown.
        resamples: bootstrap samples.
    """
    areas = tables["areas.csv"]
    counts = {by: areas[areas["by"] == by].iloc[0] for by in ("breast", "lesion")}
    ignored = "are ignored" if duplicates == "ignore" else "count as false positives"
    lines = [
        f"A detection hits a mass by the rule `{rule}`; each mass is taken by one detection, and further detections of "
        f"it {ignored}. Breast-based: {counts['breast']['truths']} masses, hit in either view; false positives of all "
        f"views per breast ({counts['breast']['units']} breasts). Lesion-based: every mass of every view; false "
        f"positives per mass and view ({counts['lesion']['units']}). A dash: not reached, or not defined."
    ]
    if without_breast:
        lines.append(
            f"{without_breast} views have no breast (laterality unknown) and are in lesion-based counting only."
        )
    note = TEST_NOTE.format(baseline=baseline, least=resamples + 1) if areas["run"].nunique() > 1 else ""
    interval = f"Intervals: 95 %, percentiles of {resamples} bootstrap samples of patients."
    parts = ["# FROC analysis", *lines]
    parts += [_block(_table2(tables["table2.csv"], by)) for by in ("breast", "lesion")]
    parts += [f"Note: {TABLE2_NOTE}"]
    parts += [_block(_areas(areas, by, limit, baseline)) for by in ("breast", "lesion")]
    parts += [f"Note: {interval} {note}".rstrip()]
    if "table3.csv" in tables:
        few = "With n masses, sensitivity moves in steps of 1 / n: the rate given is that of the next step."
        one = "A breast with several values has the greatest number, or all texts joined by a slash."
        parts += [_block(_table3(tables["table3.csv"], limit, baseline)), f"Note: {few} {one} {note}".rstrip()]
    return "\n\n".join(parts) + "\n"


def _table2(table: pd.DataFrame, by: str) -> Table:
    columns = [f"{100 * s:g}" for s in SENSITIVITIES]
    rows = [
        [str(r["run"]), str(r["truths"]), *(number(r[c], 2) for c in columns)]
        for r in table[table["by"] == by].to_dict("records")
    ]
    rows += [[f"paper: {n}", "", *(number(v, 2) for v in values)] for (n, b), values in PAPER.items() if b == by]
    header = ["run", "truths", *(f"{c} %" for c in columns)]
    return Table(f"False positives per {by} at given sensitivities (Table 2)", header, rows)


def _areas(table: pd.DataFrame, by: str, limit: float, baseline: str) -> Table:
    several = table["run"].nunique() > 1
    header = ["run", f"area, 0-{limit:g} FP", *(f"sensitivity at {r:g} FP" for r in RATES)]
    header += ["difference", "p (bootstrap)", "p (permutation)"] if several else []
    rows = []
    for r in table[table["by"] == by].to_dict("records"):
        cells = [str(r["run"]), _interval(r, "area"), *(_interval(r, f"sensitivity_{rate:g}") for rate in RATES)]
        rows.append([*cells, *(_difference(r, baseline) if several else [])])
    return Table(f"Area under the {by}-based FROC curve, and sensitivity at false positives per {by}", header, rows)


def _table3(table: pd.DataFrame, limit: float, baseline: str) -> Table:
    rates = [c for c in table.columns if str(c).isdigit()]
    several = table["run"].nunique() > 1
    header = ["subgroup", "breasts", "masses", "run", *(f"FP at {c} %" for c in rates), f"area, 0-{limit:g} FP"]
    header += ["difference", "p (bootstrap)", "p (permutation)"] if several else []
    rows = []
    for r in table.to_dict("records"):
        cells = [f"{r['field']} {r['value']}", str(r["breasts"]), str(r["masses"]), str(r["run"])]
        cells += [*(number(r[c], 2) for c in rates), number(r["area"], 3)]
        rows.append([*cells, *(_difference(r, baseline) if several else [])])
    return Table("False positives per breast by subgroup (Table 3)", header, rows)


def _interval(row: Mapping[Any, Any], name: str) -> str:
    return f"{number(row[name], 3)} [{number(row[f'{name}_low'], 3)}, {number(row[f'{name}_high'], 3)}]"


def _difference(row: Mapping[Any, Any], baseline: str) -> list[str]:
    if row["run"] == baseline:
        return ["baseline", "", ""]
    return [_interval(row, "difference"), p_text(row["p_bootstrap"]), p_text(row["p_permutation"])]


def _block(table: Table) -> str:
    rule = ["---", *["---:"] * (len(table.header) - 1)]
    rows: Sequence[Sequence[str]] = [table.header, rule, *table.rows]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in cells)
