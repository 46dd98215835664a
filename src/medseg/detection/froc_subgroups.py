"""Subgroups of breasts for FROC analysis: by age, histology, mass type, density, diameter (the paper's Table 3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from medseg.detection.hit_rules import BOX, GRID

#: Greatest number of values of a field that becomes subgroups as it is.
MAX_VALUES = 12

#: Columns that say which view, where and how large, not what kind of patient or mass.
STRUCTURE = {"view", "patient", "breast", "mass", "study", "score", "spacing_d", *BOX, *GRID}

__all__ = ["FIELDS", "MAX_VALUES", "Subgroup", "subgroups"]


@dataclass(frozen=True)
class Subgroup:
    """Breasts that share a value of a field.

    Attributes:
        field: name of the field, e.g. ``age``.
        value: what they share, e.g. ``40-49``.
        breasts: their names.
    """

    field: str
    value: str
    breasts: Sequence[str]


def subgroups(views: pd.DataFrame, truths: pd.DataFrame, fields: Sequence[str] | None = None) -> list[Subgroup]:
    """Divide breasts by what is known about them.

    A breast has one value of a field: that of its masses where ``truths`` has the field, otherwise of its views; the
    greatest of several numbers (a diameter differs between two views), several texts joined by a slash. A breast
    without a value is in no subgroup, one without a mass only where its views have the field.

    Args:
        views: ``view``, ``breast`` and fields.
        truths: ``view`` and fields.
        fields: those to divide by; by default ``age``, ``histology``, ``mass_type``, ``density`` and ``diameter_mm``
            where they exist, and every other field of text with 2 to 12 values that several breasts share.

    Returns:
        By field and value: age in decades, density as non-dense (ACR 1, 2 or a, b) and dense (3, 4 or c, d), the
        diameter as in Table 3, other fields as they are.

    Raises:
        ValueError: if a field that is asked for does not exist, has more than 12 values, or age or diameter is not a
            number.
    """
    known = [c for c in dict.fromkeys([*FIELDS, *truths.columns, *views.columns]) if c not in STRUCTURE]
    existing = [f for f in known if f in truths.columns or f in views.columns]
    if missing := [f for f in fields or () if f not in existing]:
        raise ValueError(f"no field {missing[0]!r} to divide by; there are {', '.join(existing)}")
    found = []
    for field in existing if fields is None else fields:
        values = _values(views, truths, field)
        names = _ordered(values, field)
        if field not in FIELDS:
            if fields is None and not (_is_text(values) and 2 <= len(names) <= MAX_VALUES and len(names) < len(values)):
                continue
            if len(names) > MAX_VALUES:
                raise ValueError(f"field {field!r} has {len(names)} values; divide by one with at most {MAX_VALUES}")
        found += [Subgroup(field, name, values.index[values == name].tolist()) for name in names]
    return found


def _values(views: pd.DataFrame, truths: pd.DataFrame, field: str) -> pd.Series:
    """Name of the subgroup by breast, of the breasts that have one."""
    breast = views.set_index("view")["breast"]
    table = truths if field in truths.columns else views
    frame = pd.DataFrame({"breast": table["view"].map(breast).to_numpy(), "value": table[field].to_numpy()})
    frame = frame[frame["breast"].notna() & (frame["breast"] != "") & frame["value"].notna() & (frame["value"] != "")]
    if field in NUMBERS:
        try:
            frame["value"] = frame["value"].astype(float)
        except ValueError as error:
            raise ValueError(f"field {field!r} is not a number in every row ({error})") from error
        return frame.groupby("breast")["value"].max().map(NUMBERS[field])
    if field == "density":
        frame["value"] = frame["value"].map(_density)
    return frame["value"].map(str).groupby(frame["breast"]).agg(lambda v: "/".join(sorted(set(v))))


def _ordered(values: pd.Series, field: str) -> list[str]:
    names = values.unique().tolist()
    order = FIELDS.get(field) or sorted(names)
    return [n for n in order if n in names] + sorted(n for n in names if n not in order)


def _is_text(values: pd.Series) -> bool:
    """Numbers of a field nobody knows are measurements, not groups."""
    return bool(pd.to_numeric(values, errors="coerce").isna().any())


def _age(years: float) -> str:
    return "<40" if years < 40 else ">=70" if years >= 70 else f"{int(years // 10)}0-{int(years // 10)}9"


def _diameter(millimetres: float) -> str:
    return next(name for below, name in ((10, "<10"), (30, "10-30"), (50, "30-50"), (math.inf, ">=50"))
                if millimetres < below or below == math.inf)  # fmt: skip


def _density(value: object) -> str:
    """ACR class as non-dense or dense; anything else stays as it is."""
    name = str(value).strip().lower().removesuffix(".0")
    return "non-dense" if name in ("1", "2", "a", "b") else "dense" if name in ("3", "4", "c", "d") else str(value)


NUMBERS: dict[str, Callable[[float], str]] = {"age": _age, "diameter_mm": _diameter}

#: The fields of the paper's Table 3, in its order, and the order of their values where it is fixed.
FIELDS: dict[str, Sequence[str]] = {
    "age": ("<40", "40-49", "50-59", "60-69", ">=70"),
    "histology": (),
    "mass_type": (),
    "density": ("non-dense", "dense"),
    "diameter_mm": ("<10", "10-30", "30-50", ">=50"),
}
