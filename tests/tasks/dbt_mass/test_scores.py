"""Scores of a whole part, spread over its views."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.detection.free_response import froc
from medseg.tasks.dbt_mass.scores import BOX, FrocArea, SensitivityAt, view_table
from medseg.training.module import Case

COLUMNS = ["view", *BOX]


def box(at: float, size: float = 10.0) -> dict[str, float]:
    return dict(zip(BOX, [0.0, at, at, size, at + size, at + size], strict=True))


def tables(found, true, views):
    """Rows (view, place, score), (view, place, mass) and views (name, patient, breast) as tables."""
    return (
        pd.DataFrame([{"view": v, **box(at), "score": s} for v, at, s in found], columns=[*COLUMNS, "score"]),
        pd.DataFrame([{"view": v, **box(at), "mass": m} for v, at, m in true], columns=[*COLUMNS, "mass"]),
        pd.DataFrame(views, columns=["view", "patient", "breast"]),
    )


@pytest.fixture
def two_breasts():
    """One mass each in both views; the first is hit in one view, the second in none but for a low score."""
    return tables(
        [("a", 0, 0.9), ("a", 50, 0.8), ("b", 70, 0.6), ("c", 0, 0.3), ("d", 90, 0.7)],
        [("a", 0, "1"), ("b", 0, "1"), ("c", 0, "1"), ("d", 0, "1")],
        [("a", "P1", "P1-L"), ("b", "P1", "P1-L"), ("c", "P2", "P2-R"), ("d", "P2", "P2-R")],
    )


def test_both_views_of_a_breast_share_its_value(two_breasts):
    """3 false positives above 0.3 over 2 breasts: the second mass counts from a rate of 1.5, of 4."""
    values = FrocArea()(*two_breasts)
    assert values == pytest.approx([1, 1, 1 - 1.5 / 4, 1 - 1.5 / 4])
    by_lesion = FrocArea(by="lesion")(*two_breasts)
    assert by_lesion == pytest.approx([1, 0, 1 - 0.75 / 4, 0]), "each view stands for itself; 3 of 4 masses"


@pytest.mark.parametrize(("rate", "expected"), [(0.0, [1, 1, 0, 0]), (1.0, [1, 1, 0, 0]), (1.5, [1, 1, 1, 1])])
def test_sensitivity_at_a_rate(two_breasts, rate, expected):
    values = SensitivityAt(rate=rate)(*two_breasts)
    assert values == expected
    assert np.mean(values) == froc(*two_breasts).at_false_positives(rate)


def test_the_rule_decides():
    found, true, views = tables([("a", 4, 0.9)], [("a", 0, "1")], [("a", "P1", "P1-L")])
    assert FrocArea("iou>0.5")(found, true, views) == [0]  # IoU 360 / 1640
    assert FrocArea("centre")(found, true, views) == [1]


def test_views_without_a_mass_have_no_value(two_breasts):
    found, true, views = two_breasts
    views = pd.concat([views, pd.DataFrame([["e", "P3", "P3-L"]], columns=list(views))], ignore_index=True)
    for score in (FrocArea(), SensitivityAt()):
        values = score(found, true, views)
        assert math.isnan(values[4])
        assert not any(map(math.isnan, values[:4]))


def test_nothing_found_and_nothing_to_find():
    empty = tables([], [("a", 0, "1")], [("a", "P1", "P1-L")])
    assert FrocArea()(*empty) == [0]
    assert SensitivityAt()(*empty) == [0]
    assert math.isnan(FrocArea()(*tables([("a", 0, 0.5)], [], [("a", "P1", "P1-L")]))[0])
    assert math.isnan(FrocArea()(*tables([], [], [("a", "P1", "P1-L")]))[0])


def test_a_view_with_two_masses_has_their_mean():
    found, true, views = tables([("a", 0, 0.9)], [("a", 0, "1"), ("a", 40, "2")], [("a", "P1", "P1-L")])
    assert FrocArea()(found, true, views) == [0.5]


scores = st.floats(0.02, 1, allow_nan=False)
findings = st.lists(st.tuples(st.integers(0, 7), st.sampled_from([0.0, 30.0, 60.0]), scores), max_size=30)


@settings(max_examples=15, deadline=None)
@given(findings, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from(["breast", "lesion"]))
def test_the_mean_over_views_is_the_area(findings, limit, by):
    """With one mass per breast and two views of each."""
    views = [(f"v{i}", f"P{i // 2}", f"P{i // 2}-L") for i in range(8)]
    parts = tables([(f"v{i}", at, s) for i, at, s in findings], [(f"v{i}", 0, "1") for i in range(8)], views)
    curve = froc(*parts, by)
    assert np.mean(FrocArea(by=by, limit=limit)(*parts)) == pytest.approx(curve.area(limit), abs=1e-9)
    assert np.mean(SensitivityAt(by=by, rate=limit)(*parts)) == pytest.approx(curve.at_false_positives(limit), abs=1e-9)


def test_the_table_of_views():
    cases = [Case("a.dcm", {}, False, False, {"patient": "P1", "breast": "P1-L", "density": 3, "view": "CC"})]
    (row,) = view_table(cases).to_dict("records")
    assert row == {"view": "a.dcm", "patient": "P1", "breast": "P1-L", "density": 3}
