"""Comparison of configurations on the same cases: what the table of a paper needs, from what MLflow holds.

The unit of all statistics is one case (or, on request, one patient or video): values of one case from several folds
or repeats are averaged first, because they are no independent observations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from medseg.experiments.runs import CASE_COLUMNS, RunRecord, Runs
from medseg.experiments.statistics import bootstrap_ci, friedman, holm, mean_ranks, paired_wilcoxon
from medseg.io.datalist import GROUP_FIELDS
from medseg.metrics import summarise

COLUMNS = [
    "configuration", "metric", "n", "mean", "sd", "ci_low", "ci_high", "p_value", "p_adjusted", "baseline",
]  # fmt: skip

#: A field of the data list is a subgroup field if it has at least 2 and at most so many values.
MAX_SUBGROUPS = 12

#: Numbers with more values than that (an age) are cut into so many ranges with equally many cases.
RANGES = 3

__all__ = ["COLUMNS", "Comparison", "compare"]


@dataclass
class Comparison:
    """A comparison of all configurations of an experiment.

    Attributes:
        runs: what was read.
        baseline: the configuration that the others are tested against.
        unit: ``case``, or the field whose values are averaged over its cases.
        table: one row per configuration and metric, with ``COLUMNS``.
        subgroups: the same per value of each subgroup field, with ``field`` and ``value`` in front.
        ranks: ``configuration``, ``metric``, ``mean_rank``, ``friedman_p``.
        overview: per configuration: runs, failed runs, cases, empty predictions, parameters, seconds of training, ECE.
        values: mean value of each case by metric: index case, one column per configuration.
        notes: what a reader should know about the numbers.
    """

    runs: Runs
    baseline: str
    unit: str
    table: pd.DataFrame
    subgroups: pd.DataFrame
    ranks: pd.DataFrame
    overview: pd.DataFrame
    values: dict[str, pd.DataFrame]
    notes: list[str]

    @property
    def metrics(self) -> list[str]:
        """The compared metrics, in the bundle's order."""
        return list(self.values)


def compare(
    runs: Runs,
    metrics: Sequence[str] = (),
    baseline: str | None = None,
    unit: str = "case",
    common: bool = False,
    seed: int = 0,
) -> Comparison:
    """Compare the configurations of an experiment.

    Args:
        runs: from :func:`medseg.experiments.runs.read_runs`.
        metrics: which ones; all of the bundle's by default.
        baseline: name of the configuration to test against; the one that was run first by default.
        unit: ``case``, or a field of the data list, e.g. ``patient`` or ``video``.
        common: use the cases that all configurations have where they differ.
        seed: of the bootstrap.

    Raises:
        ValueError: if the configurations were not scored on the same cases (the message says which differ), or on an
            unknown metric, baseline or field.
    """
    metrics = _known(metrics or runs.metrics, runs.metrics, "metric")
    baseline = _baseline(runs.configurations, baseline)
    cases = runs.cases()
    notes = _check_same_cases(cases, runs, common)
    if common:
        cases = _common(cases, runs.configurations)
    if unit != "case":
        if unit not in cases:
            raise ValueError(
                f"the data list has no field {unit!r}; choose from {', '.join(_fields(cases, runs.metrics))}"
            )
        lone = cases[unit].astype(str) == ""
        cases["unit"] = cases[unit].astype(str).mask(lone, cases["case"])
    else:
        cases["unit"] = cases["case"]
        notes += _group_notes(cases)
    values = {m: _wide(cases, m, runs.configurations) for m in metrics}
    notes += runs.notes
    return Comparison(
        runs=runs,
        baseline=baseline,
        unit=unit,
        table=_compare(values, runs.configurations, baseline, seed),
        subgroups=_subgroups(cases, runs, metrics, baseline, seed),
        ranks=_ranks(values, runs.modes),
        overview=_overview(runs, cases),
        values=values,
        notes=notes,
    )


def _known(names: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    unknown = [n for n in names if n not in known]
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; the runs have {', '.join(known)}")
    return list(names)


def _baseline(configurations: Sequence[str], name: str | None) -> str:
    if name is None:
        return configurations[0]
    if name in configurations:
        return name
    matching = [c for c in configurations if c.startswith((f"{name}-", f"{name} "))]
    if len(matching) != 1:
        raise ValueError(f"no configuration {name!r} to be the baseline; there are: {', '.join(configurations)}")
    return matching[0]


def _check_same_cases(cases: pd.DataFrame, runs: Runs, common: bool) -> list[str]:
    """Refuse a comparison of different cases; the files behind equal names must be the same too."""
    by_configuration = {c: set(of["case"]) for c, of in cases.groupby("configuration")}
    everything = set().union(*by_configuration.values())
    problems = []
    for configuration, own in by_configuration.items():
        lacking = sorted(everything - own)
        if lacking:
            shown = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
            failed = [f"{r.name} ({r.run.info.status})" for r in runs.failed if r.configuration == configuration]
            why = f"; these runs did not finish: {', '.join(failed)}" if failed else ""
            problems.append(f"{configuration} lacks {len(lacking)} of {len(everything)} cases: {shown}{why}")
    if problems and common:
        return [f"Only cases that all have: {p}." for p in problems]
    if problems:
        raise ValueError(
            "the configurations were not tested on the same cases\n"
            + "\n".join(f"  - {p}" for p in problems)
            + "\nrun what is missing (`medseg crossval` with the same arguments), choose runs with --filter, or pass "
            "--common to compare on the cases that all have"
        )
    contents: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in runs.finished:
        digest = record.run.data.tags.get("datalist.sha256", "")
        contents.setdefault(record.split, {}).setdefault(digest, []).append(record.name)
    for (repeat, fold), digests in contents.items():
        if len(digests) > 1:
            groups = "; ".join(f"{', '.join(names)}: {digest[:8]}" for digest, names in digests.items())
            raise ValueError(
                f"repeat {repeat}, fold {fold}: the runs were made on different data lists or files ({groups}); "
                "choose runs of one data set with --filter"
            )
    return []


def _common(cases: pd.DataFrame, configurations: Sequence[str]) -> pd.DataFrame:
    counts = cases.groupby("case")["configuration"].nunique()
    kept = cases[cases["case"].isin(counts[counts == len(configurations)].index)].copy()
    if kept.empty:
        raise ValueError("no case was scored by all configurations")
    return kept


def _group_notes(cases: pd.DataFrame) -> list[str]:
    notes = []
    for field in GROUP_FIELDS:
        if field in cases:
            groups, units = cases[field].astype(str).replace("", np.nan).nunique(), cases["case"].nunique()
            if 0 < groups < units:
                notes.append(
                    f"{units} cases come from {groups} {field}s and are not independent: intervals and p-values are "
                    f"too narrow; pass --unit {field} for one value per {field}."
                )
    return notes


def _wide(cases: pd.DataFrame, metric: str, configurations: Sequence[str]) -> pd.DataFrame:
    """Mean value per unit (rows) and configuration (columns); a case counts the same however often it was scored."""
    per_case = cases.groupby(["unit", "case", "configuration"], sort=True)[metric].mean()
    return per_case.groupby(["unit", "configuration"]).mean().unstack("configuration").reindex(columns=configurations)


def _compare(values: dict[str, pd.DataFrame], configurations: Sequence[str], baseline: str, seed: int) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for metric, wide in values.items():
        others = [c for c in configurations if c != baseline and c in wide]
        p = [paired_wilcoxon(wide[c], wide[baseline]) for c in others]
        adjusted = dict(zip(others, zip(p, holm(p), strict=True), strict=True))
        for configuration in configurations:
            own = wide[configuration].to_numpy(float)
            summary = summarise(own)
            low, high = bootstrap_ci(own, seed=seed)
            p_value, p_adjusted = adjusted.get(configuration, (np.nan, np.nan))
            rows.append(
                {
                    "configuration": configuration,
                    "metric": metric,
                    **{k: summary[k] for k in ("n", "mean", "sd")},
                    "ci_low": low,
                    "ci_high": high,
                    "p_value": p_value,
                    "p_adjusted": p_adjusted,
                    "baseline": baseline,
                }
            )
    return pd.DataFrame(rows, columns=COLUMNS)


def _fields(cases: pd.DataFrame, metrics: Sequence[str]) -> list[str]:
    own = {*CASE_COLUMNS, *metrics, "case", "unit", "configuration", "repeat", "fold"}
    return [c for c in cases.columns if c not in own]


def _subgroups(cases: pd.DataFrame, runs: Runs, metrics: Sequence[str], baseline: str, seed: int) -> pd.DataFrame:
    tables = []
    for field in _fields(cases, runs.metrics):
        if field in GROUP_FIELDS:
            continue
        kinds = _kinds(cases[field])
        for kind in _in_order(kinds.unique()):
            part = cases[kinds == kind]
            values = {m: _wide(part, m, runs.configurations) for m in metrics}
            table = _compare(values, runs.configurations, baseline, seed)
            tables.append(pd.concat([pd.DataFrame({"field": [field] * len(table), "value": kind}), table], axis=1))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["field", "value", *COLUMNS])


def _kinds(column: pd.Series) -> pd.Series:
    """The subgroup of each case, empty if the field makes none: a number with many values is cut into ranges."""
    text = column.astype(str)
    distinct = [v for v in text.unique() if v != ""]
    if 2 <= len(distinct) <= MAX_SUBGROUPS:
        return text
    numbers = pd.to_numeric(column, errors="coerce")
    if len(distinct) > MAX_SUBGROUPS and numbers[text != ""].notna().all():
        cut = pd.qcut(numbers, RANGES, duplicates="drop")
        spans = numbers.groupby(cut, observed=True).agg(["min", "max"])
        names = {
            interval: f"{low:g} to {high:g}"
            for interval, (low, high) in zip(spans.index, spans.to_numpy(), strict=True)
        }
        return cut.map(names).astype(object).fillna("").astype(str)
    return pd.Series("", index=column.index)


def _in_order(kinds: Iterable[str]) -> list[str]:
    def key(kind: str) -> tuple[float, str]:
        try:
            return float(kind.split(" ")[0]), kind
        except ValueError:
            return float("inf"), kind

    return sorted((k for k in kinds if k), key=key)


def _ranks(values: dict[str, pd.DataFrame], modes: dict[str, str]) -> pd.DataFrame:
    rows = []
    for metric, wide in values.items():
        ranks = mean_ranks(wide.to_numpy(float), modes[metric] == "max")
        p = friedman(wide.to_numpy(float))
        rows += [
            {"configuration": c, "metric": metric, "mean_rank": r, "friedman_p": p}
            for c, r in zip(wide.columns, ranks, strict=True)
        ]
    return pd.DataFrame(rows)


def _overview(runs: Runs, cases: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for configuration in runs.configurations:
        records = [r for r in runs.finished if r.configuration == configuration]
        own = cases[cases["configuration"] == configuration]
        seconds = [r.run.data.metrics["train_seconds"] for r in records if "train_seconds" in r.run.data.metrics]
        rows.append(
            {
                "configuration": configuration,
                "runs": len(records),
                "failed_runs": sum(r.configuration == configuration for r in runs.failed),
                "cases": own["case"].nunique(),
                "scored": len(own),
                "empty_predictions": int(own["empty_prediction"].sum()),
                "parameters": _number(records, "parameters"),
                "trainable_parameters": _number(records, "trainable_parameters"),
                "train_seconds": float(np.mean(seconds)) if seconds else np.nan,
                "ece": _ece(records),
            }
        )
    for name in dict.fromkeys(r.configuration for r in runs.failed):
        if name not in runs.configurations:
            rows.append(
                {"configuration": name, "runs": 0, "failed_runs": sum(r.configuration == name for r in runs.failed)}
            )
    return pd.DataFrame(rows)


def _number(records: Sequence[RunRecord], name: str) -> float:
    found = [r.run.data.params[name] for r in records if name in r.run.data.params]
    return float(found[0]) if found else np.nan


def calibration(records: Sequence[RunRecord]) -> np.ndarray[Any, Any] | None:
    """Bins of all runs together, or ``None`` if their output is no probability."""
    bins = [r.calibration for r in records if r.calibration is not None]
    return np.sum(bins, axis=0) if bins else None


def _ece(records: Sequence[RunRecord]) -> float:
    from medseg.calibration import expected_calibration_error

    bins = calibration(records)
    return np.nan if bins is None else expected_calibration_error(bins)
