"""FROC curves against cases counted by hand and against a count by brute force."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pandas as pd
import pytest
from froc_cases import AWAY, MASS, TWO, detections, truths, views
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.detection import free_response
from medseg.detection.free_response import Froc, froc, sensitivity_table, truth_areas
from medseg.detection.froc_statistics import bootstrap_area


def test_a_mass_counts_once_per_breast_and_once_per_view():
    found = detections(
        ("mlo", MASS, 0.9), ("cc", AWAY, 0.8), ("cc", MASS, 0.7), ("other", AWAY, 0.6), ("other", MASS, 0.5)
    )  # fmt: skip
    true = truths(("cc", "a", MASS), ("mlo", "a", MASS), ("other", "a", MASS))
    breast, lesion = froc(found, true, TWO), froc(found, true, TWO, "lesion")
    assert (breast.truths, breast.units, lesion.truths, lesion.units) == (2, 2, 3, 3)
    np.testing.assert_array_equal(breast.thresholds, [0.9, 0.8, 0.7, 0.6, 0.5])
    np.testing.assert_allclose(breast.sensitivity, [0.5, 0.5, 0.5, 0.5, 1])
    np.testing.assert_allclose(breast.false_positives, [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(lesion.sensitivity, np.array([1, 1, 2, 2, 3]) / 3)
    np.testing.assert_allclose(lesion.false_positives, np.array([0, 1, 1, 2, 2]) / 3)
    assert breast.area(4) == pytest.approx(0.5 * 1 + 0.5 * 3 / 4)
    assert breast.area(0.5) == pytest.approx(0.5)
    assert lesion.area(1) == pytest.approx((1 + 2 / 3 + 1 / 3) / 3)


def test_points_at_distinct_scores_only():
    found = detections(("cc", MASS, 0.5), ("cc", AWAY, 0.5), ("other", AWAY, 0.5))
    one = froc(found, truths(("cc", "a", MASS)), TWO)
    assert (one.thresholds.tolist(), one.sensitivity.tolist(), one.false_positives.tolist()) == ([0.5], [1], [1])
    assert one.area(4) == pytest.approx(0.75)
    assert one.at_false_positives(0.99) == 0
    assert one.at_false_positives(1) == 1


def test_duplicates_can_count_as_false_positives():
    found, true = detections(("cc", MASS, 0.5), ("cc", MASS, 0.4)), truths(("cc", "a", MASS))
    assert froc(found, true, TWO).false_positives.tolist() == [0, 0]
    assert froc(found, true, TWO, duplicates="false_positive").false_positives.tolist() == [0, 0.5]


def test_breasts_without_a_mass_count_in_the_denominator():
    normal = views(("cc", "1", "1L"), ("b", "1", "1R"), ("c", "2", "2L"), ("d", "2", "2R"))
    one = froc(detections(("b", AWAY, 0.9), ("cc", MASS, 0.5)), truths(("cc", "a", MASS)), normal)
    assert (one.units, one.false_positives.tolist(), one.sensitivity.tolist()) == (4, [0.25, 0.25], [0, 1])


@pytest.mark.parametrize("unknown", ["", None, np.nan])
def test_views_without_a_breast_are_lesion_based_only(unknown):
    known = views(("cc", "1", "1L"), ("x", "2", unknown))
    found, true = detections(("x", MASS, 0.9), ("x", AWAY, 0.8)), truths(("cc", "a", MASS), ("x", "a", MASS))
    breast, lesion = froc(found, true, known), froc(found, true, known, "lesion")
    assert (breast.truths, breast.units, len(breast.thresholds)) == (1, 1, 0)
    assert (lesion.truths, lesion.sensitivity.tolist(), lesion.false_positives.tolist()) == (2, [0.5, 0.5], [0, 0.5])


def test_reading_the_curve_never_extrapolates():
    one = Froc(np.array([0.9, 0.8, 0.7]), np.array([0.5, 0.7, 0.9]), np.array([0.25, 1, 3]), 10, 4, "breast")
    assert [one.false_positives_at(s) for s in (0.1, 0.5, 0.51, 0.9)] == [0.25, 0.25, 1, 3]
    assert np.isnan(one.false_positives_at(0.95))
    assert [one.at_false_positives(r) for r in (0, 0.25, 0.99, 3, 100)] == [0, 0.5, 0.5, 0.9, 0.9]
    assert one.area(4) == pytest.approx((0.75 * 0.5 + 2 * 0.7 + 1 * 0.9) / 4)
    for wrong in (0, -0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="sensitivity is"):
            one.false_positives_at(wrong)
    with pytest.raises(ValueError, match="rate is"):
        one.at_false_positives(-1)
    for wrong in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="limit is"):
            one.area(wrong)


def test_empty_cases():
    none, true = detections(), truths(("cc", "a", MASS))
    nothing_found = froc(none, true, TWO)
    assert (nothing_found.area(), nothing_found.at_false_positives(2), len(nothing_found.thresholds)) == (0, 0, 0)
    assert np.isnan(nothing_found.false_positives_at(0.5))
    for by in ("breast", "lesion"):
        nothing_true = froc(detections(("cc", AWAY, 0.5)), truths(), TWO, by)
        assert nothing_true.truths == 0
        assert np.isnan([nothing_true.area(), nothing_true.at_false_positives(1), *nothing_true.sensitivity]).all()
    assert froc(none, truths(), views()).units == 0
    assert np.isnan(bootstrap_area(none, truths(), TWO).area_interval).all()
    assert truth_areas(none, truths(), TWO).empty


def test_sensitivity_table():
    one = Froc(np.array([0.9, 0.8]), np.array([0.6, 0.85]), np.array([0.25, 1]), 10, 4, "breast")
    row = sensitivity_table({"a": one}).iloc[0]
    assert row[["name", "by", "truths", "units", "60", "70", "80", "85"]].tolist() == [
        "a",
        "breast",
        10,
        4,
        0.25,
        1,
        1,
        1,
    ]
    assert np.isnan(row[["90", "95"]].astype(float)).all()


def test_the_example_of_the_docstring():
    assert doctest.testmod(free_response).failed == 0


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_scores_must_be_numbers(score):
    with pytest.raises(ValueError, match=r"score is not a finite number.*'mlo'"):
        froc(detections(("cc", MASS, 0.5), ("mlo", MASS, score)), truths(), TWO)


def test_tables_that_do_not_fit_are_refused():
    found, true = detections(("cc", MASS, 0.5)), truths(("cc", "a", MASS))
    for wrong, message in (
        ((found.drop(columns="score"), true, TWO), "detections: no column score"),
        ((found, true.drop(columns=["mass", "h1"]), TWO), "truths: no column mass, h1"),
        ((found, true, TWO.drop(columns="breast")), "views: no column breast"),
        ((found, true, pd.concat([TWO, TWO])), "listed twice"),
        ((found, pd.concat([true, true]), TWO), "two boxes in one view"),
        ((found, true.assign(mass=None), TWO), "no mass"),
        ((found, true, TWO[1:]), "truths: the view is not among the views"),
        ((found, true[:0], TWO[1:]), "detections: the view is not among the views"),
        ((found, true.assign(d1=0), TWO), "truths: not a box"),
        ((found.assign(w1=-1), true, TWO), "detections: not a box"),
        ((found.assign(w1=np.nan), true, TWO), "detections: not a box"),
        ((found, true, TWO.assign(patient="")), "no patient for view 'cc'"),
        ((found, true, TWO.assign(breast="L")), "more than one patient"),
    ):
        with pytest.raises(ValueError, match=message):
            froc(*wrong)
    with pytest.raises(ValueError, match="by is 'view'"):
        froc(found, true, TWO, "view")
    with pytest.raises(ValueError, match="duplicates is"):
        froc(found, true, TWO, duplicates="count")


@st.composite
def studies(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """A few patients with one or two breasts and views; boxes on a coarse grid, scores with ties."""

    def box() -> tuple[int, ...]:
        low = [draw(st.integers(0, 3)) for _ in range(3)]
        return (*low, *(v + draw(st.integers(1, 3)) for v in low))

    known, true, found = [], [], []
    for p in range(draw(st.integers(1, 4))):
        for v in range(draw(st.integers(1, 3))):
            name = f"{p}{v}"
            known.append((name, f"p{p}", draw(st.sampled_from(["", f"{p}L", f"{p}R"]))))
            true += [(name, m, box()) for m in draw(st.sets(st.sampled_from("ab")))]
            found += [(name, box(), draw(st.integers(1, 5)) / 5) for _ in range(draw(st.integers(0, 4)))]
    return detections(*found), truths(*true), views(*known)


def by_brute_force(found: pd.DataFrame, true: pd.DataFrame, known: pd.DataFrame, by: str, rule: str, extra: bool):
    """(threshold, hits, false positives) counted anew at every threshold, and the denominators."""
    where = {v: (p, b) for v, p, b in known[["view", "patient", "breast"]].itertuples(index=False)}
    used = {v for v in where if by == "lesion" or where[v][1]}

    def item(row: Any) -> tuple[str, str]:
        return (where[row.view][1] if by == "breast" else row.view, row.mass)

    items = {item(t) for t in true.itertuples() if t.view in used}
    units = len(items) if by == "lesion" else len({where[v][1] for v in used})
    points = []
    for threshold in sorted({d.score for d in found.itertuples() if d.view in used}, reverse=True):
        hits, wrong = set(), 0
        for view in used:
            rows = [d for d in found.itertuples() if d.view == view and d.score >= threshold]
            masses = [t for t in true.itertuples() if t.view == view]
            fits = []
            for i, d in enumerate(rows):
                for j, t in enumerate(masses):
                    a, b = np.array(d[2:8], float), np.array(t[3:9], float)
                    inter = np.prod(np.clip(np.minimum(a[3:], b[3:]) - np.maximum(a[:3], b[:3]), 0, None))
                    iou = inter / (np.prod(a[3:] - a[:3]) + np.prod(b[3:] - b[:3]) - inter)
                    if iou > float(rule.removeprefix("iou>")):
                        fits.append((-d.score, -iou, i, j))
            taken: dict[int, int] = {}
            for _, _, i, j in sorted(fits):
                if i not in taken and j not in taken.values():
                    taken[i] = j
            hits |= {item(masses[j]) for j in taken.values()}
            touching = {i for _, _, i, _ in fits}
            wrong += sum(i not in touching for i in range(len(rows))) + extra * len(touching - set(taken))
        points.append((threshold, len(hits), wrong))
    return points, len(items), units


@settings(max_examples=60, deadline=None)
@given(studies(), st.sampled_from(["breast", "lesion"]), st.sampled_from(["iou>0.1", "iou>0.3"]), st.booleans())
def test_curve_area_and_items_agree_with_brute_force(study, by, rule, extra):
    duplicates = "false_positive" if extra else "ignore"
    points, items, units = by_brute_force(*study, by, rule, extra)
    one = froc(*study, by, rule, duplicates=duplicates)
    assert (one.truths, one.units) == (items, units)
    assert one.thresholds.tolist() == [t for t, _, _ in points]
    if not items:
        assert np.isnan(one.area())
        return
    sensitivity, rate = (np.array([p[i] / n for p in points]) for i, n in ((1, items), (2, units)))
    np.testing.assert_allclose(one.sensitivity, sensitivity)
    np.testing.assert_allclose(one.false_positives, rate)
    for limit in (0.7, 4.0):
        corners = np.unique([0, limit, *rate[rate < limit]])
        height = [max((s for s, r in zip(sensitivity, rate, strict=True) if r <= x), default=0) for x in corners[:-1]]
        assert one.area(limit) == pytest.approx(np.dot(height, np.diff(corners)) / limit)
        each = truth_areas(*study, by, rule, duplicates=duplicates, limit=limit)
        assert len(each) == items
        assert each["area"].mean() == pytest.approx(one.area(limit), abs=1e-12)
    for s in (0.3, 0.5, 1.0):
        reached = [r for r, v in zip(rate, sensitivity, strict=True) if v >= s]
        assert one.false_positives_at(s) == pytest.approx(min(reached, default=np.nan), nan_ok=True)
