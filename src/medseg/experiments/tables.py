"""A comparison as tables: plain text, Markdown, LaTeX and CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from medseg.experiments.compare import Comparison

__all__ = ["FORMATS", "Table", "comparison_tables", "render"]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: what it shows.
        header: names of the columns; the first one is a name, the others are numbers.
        rows: text of the cells.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def comparison_tables(comparison: Comparison) -> list[Table]:
    """All tables of a comparison: one per metric, one per subgroup and metric, and the overview."""
    tables = [_metric_table(comparison, metric, comparison.table) for metric in comparison.metrics]
    for field, part in comparison.subgroups.groupby("field", sort=False):
        tables += [_metric_table(comparison, metric, part, str(field)) for metric in comparison.metrics]
    return [*tables, _overview(comparison)]


def _metric_table(comparison: Comparison, metric: str, rows: pd.DataFrame, field: str = "") -> Table:
    """Scores of one metric: of all cases, or with ``field`` of its subgroups."""
    better = "higher" if comparison.runs.modes[metric] == "max" else "lower"
    title = f"{metric}{f' by {field}' if field else ''} ({better} is better)"
    if not field and not math.isnan(p := _friedman(comparison, metric)):
        title += f"; Friedman p {p_text(p) if p < 0.0001 else f'= {p_text(p)}'}"
    ranks = comparison.ranks.set_index(["configuration", "metric"])["mean_rank"]
    first = f"{field}: configuration" if field else "configuration"
    header = [first, "n", "mean ± sd", "95 % CI", *([] if field else ["mean rank"]), "p", "p (Holm)"]
    records = rows[rows["metric"] == metric].to_dict("records")
    decimals = 4 if all(_missing(r["mean"]) or abs(r["mean"]) < 10 for r in records) else 2
    body = []
    for row in records:
        name, is_baseline = row["configuration"], row["configuration"] == comparison.baseline
        values = {k: number(row[k], decimals) for k in ("mean", "sd", "ci_low", "ci_high")}
        cells = [(f"{row['value']}: " if field else "") + name + (" (baseline)" if is_baseline else ""), str(row["n"])]
        cells += [f"{values['mean']} ± {values['sd']}", f"[{values['ci_low']}, {values['ci_high']}]"]
        cells += [] if field else [f"{ranks[name, metric]:.2f}"]
        body.append([*cells, *("" if is_baseline else p_text(row[k]) for k in ("p_value", "p_adjusted"))])
    return Table(title, header, body)


def _friedman(comparison: Comparison, metric: str) -> float:
    return float(comparison.ranks.loc[comparison.ranks["metric"] == metric, "friedman_p"].iloc[0])


def _overview(comparison: Comparison) -> Table:
    header = [
        "configuration",
        "runs",
        "failed",
        "cases",
        "empty predictions",
        "parameters",
        "trained",
        "training",
        "ECE",
    ]
    rows = []
    for row in comparison.overview.to_dict("records"):
        seconds = row["train_seconds"]
        counts = [count_text(row[k]) for k in ("cases", "empty_predictions", "parameters", "trainable_parameters")]
        time = "" if _missing(seconds) else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"
        ece = "" if _missing(row["ece"]) else f"{row['ece']:.4f}"
        rows.append([row["configuration"], str(row["runs"]), str(row["failed_runs"]), *counts, time, ece])
    return Table("runs (training: mean per run; ECE: expected calibration error over all pixels)", header, rows)


def number(value: float, decimals: int = 4) -> str:
    """A number with so many decimals; a dash where nothing is defined."""
    return "–" if _missing(value) else f"{value:.{decimals}f}"


def p_text(value: float) -> str:
    """A p-value; what is smaller than 0.0001 is only called that."""
    return "–" if _missing(value) else "<0.0001" if value < 0.0001 else f"{value:.4f}"


def count_text(value: float) -> str:
    """A whole number with separators between thousands."""
    return "" if _missing(value) else f"{int(value):,}"


def _missing(value: float) -> bool:
    return value is None or math.isnan(value)


def _text(comparison: Comparison) -> str:
    blocks = []
    for table in comparison_tables(comparison):
        widths = [max(len(r[i]) for r in (table.header, *table.rows)) for i in range(len(table.header))]
        lines = [table.title]
        for row in (table.header, *table.rows):
            cells = [
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, *(f"Note: {note}" for note in comparison.notes)]) + "\n"


def _markdown(comparison: Comparison) -> str:
    blocks = []
    for table in comparison_tables(comparison):
        rule = ["---", *["---:"] * (len(table.header) - 1)]
        rows = [table.header, rule, *table.rows]
        blocks.append(f"**{table.title}**\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join([*blocks, *(f"Note: {note}" for note in comparison.notes)]) + "\n"


def _latex(comparison: Comparison) -> str:
    """Tables for the package booktabs."""
    blocks = []
    for table in comparison_tables(comparison):
        columns = "l" + "r" * (len(table.header) - 1)
        lines = [" & ".join(_escape(cell) for cell in row) + r" \\" for row in (table.header, *table.rows)]
        blocks.append(
            "\\begin{table}\n\\caption{" + _escape(table.title) + "}\n\\begin{tabular}{" + columns + "}\n\\toprule\n"
            + lines[0] + "\n\\midrule\n" + "\n".join(lines[1:]) + "\n\\bottomrule\n\\end{tabular}\n\\end{table}"
        )  # fmt: skip
    return "\n\n".join([*blocks, *(f"% {note}" for note in comparison.notes)]) + "\n"


def _escape(text: str) -> str:
    for character in "&%_#$":
        text = text.replace(character, "\\" + character)
    return text.replace("±", r"$\pm$").replace("–", "--").replace("<", "$<$")


def _csv(comparison: Comparison) -> str:
    return str(comparison.table.to_csv(index=False))


#: Text of a comparison by name of the format, with the ending of its file.
FORMATS: dict[str, tuple[str, Callable[[Comparison], str]]] = {
    "table": ("txt", _text),
    "markdown": ("md", _markdown),
    "latex": ("tex", _latex),
    "csv": ("csv", _csv),
}


def render(comparison: Comparison, form: str) -> str:
    """A comparison in one of the ``FORMATS``."""
    return FORMATS[form][1](comparison)
