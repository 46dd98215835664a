"""Intervals and tests of FROC curves against the tables themselves, resampled and swapped."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from froc_cases import AWAY, MASS, detections, truths, views

from medseg.detection import froc_statistics as statistics
from medseg.detection.free_response import froc, outcomes
from medseg.detection.froc_statistics import bootstrap_area, compare_areas, compare_outcomes


def sample(patients: int, seed: int, noise: float = 3, power: float = 1, **shift: float) -> list[pd.DataFrame]:
    """Views, truths and the detections of several methods, each with its shift of the hits' scores."""
    rng = np.random.default_rng(seed)
    known = views(*((f"{p}{v}", f"p{p}", f"{p}L") for p in range(patients) for v in ("cc", "mlo")))
    true = truths(*((v, "a", MASS) for v in known["view"]))
    methods = []
    for name in shift or {"a": 1.0}:
        rows = []
        for v in known["view"]:
            if rng.random() < 0.9:
                rows.append((v, MASS, rng.normal(shift.get(name, 1.0))))
            rows += [(v, AWAY, s) for s in rng.normal(size=rng.poisson(noise))]
        table = detections(*rows)
        methods.append(table.assign(score=np.exp(table["score"] * (power if name == "b" else 1))))
    return [true, known, *methods]


def test_intervals_agree_with_resampling_the_tables():
    true, known, found = sample(12, 0)
    got = bootstrap_area(found, true, known, rates=[1.0], resamples=2000, seed=3)
    weights = np.random.default_rng(3).multinomial(12, np.full(12, 1 / 12), size=2000)
    areas, sensitivities = [], []
    for draw in weights[:25]:  # the tables themselves, every copy of a patient under a new name
        copies = [(p, f"p{p}#{c}") for p in range(12) for c in range(draw[p])]

        def copied(table: pd.DataFrame, copies: list[tuple[int, str]] = copies) -> pd.DataFrame:
            owner = table["view"].map(known.set_index("view")["patient"])
            parts = [table[owner == f"p{p}"].assign(view=lambda t, n=n: t["view"] + n, patient=n, breast=n)
                     for p, n in copies]  # fmt: skip
            return pd.concat(parts)

        one = froc(copied(found), copied(true), copied(known))
        areas.append(one.area())
        sensitivities.append(one.at_false_positives(1.0))
    fast = bootstrap_samples(found, true, known, weights[:25])
    np.testing.assert_allclose(fast[0], areas)
    np.testing.assert_allclose(fast[1], sensitivities)
    all_areas = bootstrap_samples(found, true, known, weights)[0]
    np.testing.assert_allclose(got.area_interval, np.quantile(all_areas, [0.025, 0.975]))
    assert got.area == froc(found, true, known).area()


def bootstrap_samples(found, true, known, weights):
    counted = outcomes(found, true, known)
    counts = statistics._count(counted, statistics._thresholds(counted.truths["score"]))
    weights = weights.astype(float)
    return counts.areas(weights, 4.0), counts.sensitivities(weights, np.array([1.0]))[:, 0]


def test_interval_covers_the_area_of_the_population():
    true, known, found = sample(3000, 99)
    truth = froc(found, true, known).area()
    covered = 0
    for seed in range(60):
        true, known, found = sample(30, seed)
        low, high = bootstrap_area(found, true, known, resamples=300, seed=seed).area_interval
        covered += low <= truth <= high
    assert covered >= 51  # 95 % of 60 is 57; fewer than 51 has a probability of 1 in 200


def test_a_seed_gives_the_same_interval_and_confidence_widens_it():
    true, known, found = sample(20, 1)
    a, b = (bootstrap_area(found, true, known, by="lesion", seed=4) for _ in range(2))
    assert a.area_interval == b.area_interval
    np.testing.assert_array_equal(a.sensitivity_interval, b.sensitivity_interval)
    narrow = bootstrap_area(found, true, known, by="lesion", seed=4, confidence=0.5).area_interval
    assert a.area_interval[0] < narrow[0] < a.area < narrow[1] < a.area_interval[1]
    assert bootstrap_area(found, true, known, seed=5).area_interval != b.area_interval
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_area(found, true, known, resamples=0)
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_area(found, true, known, confidence=95)


def test_one_patient_has_no_interval():
    true, known, found = sample(1, 0)
    assert np.isnan(bootstrap_area(found, true, known).area_interval).all()
    assert np.isnan(compare_areas(found, found, true, known).p_permutation)


def test_a_better_method_is_found_better():
    true, known, a, b = sample(60, 0, a=2.5, b=0.5)
    found, turned = compare_areas(a, b, true, known), compare_areas(b, a, true, known)
    assert found.difference == pytest.approx(froc(a, true, known).area() - froc(b, true, known).area())
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    assert found.p_bootstrap == pytest.approx(2 / 1001)
    assert found.p_permutation == pytest.approx(1 / 1001)  # the least there is: nothing is ever 0
    assert turned.difference == pytest.approx(-found.difference)
    assert turned.p_permutation == found.p_permutation
    assert turned.interval == pytest.approx((-found.interval[1], -found.interval[0]))


def test_equal_methods_do_not_differ():
    true, known, found = sample(10, 0)
    same = compare_areas(found, found.assign(score=found["score"] ** 3 * 0.001), true, known)
    assert (same.difference, same.p_bootstrap, same.p_permutation) == (pytest.approx(0, abs=1e-12), 1, 1)
    assert same.interval == pytest.approx((0, 0), abs=1e-12)


def test_p_values_are_about_uniform_when_the_methods_do_not_differ():
    p = []
    for seed in range(100):  # the second method's scores are on another scale
        true, known, a, b = sample(20, seed, power=5, a=1.0, b=1.0)
        found = compare_areas(a, b, true, known, resamples=99, seed=seed)
        p.append((found.p_bootstrap, found.p_permutation))
    for values in np.transpose(p):
        assert np.mean(values <= 0.05) <= 0.13
        assert 0.38 <= np.mean(values <= 0.5) <= 0.65
        assert 0.4 <= values.mean() <= 0.6


def test_permutation_agrees_with_all_swaps_of_the_tables():
    """Few patients and one scale: all swaps counted with the tables themselves."""
    true, known, a, b = sample(5, 3, a=1.5, b=0.5)
    patient = known.set_index("view")["patient"]
    ranks = [m.assign(score=-outcomes(m, true, known).rates(m["score"])) for m in (a, b)]

    def swapped(code: int) -> float:
        one, two = [t["view"].map(patient).str[1:].astype(int).map(lambda p: code >> p & 1) == 1 for t in ranks]
        first = pd.concat([ranks[0][~one], ranks[1][two]])
        second = pd.concat([ranks[1][~two], ranks[0][one]])
        return froc(first, true, known).area() - froc(second, true, known).area()

    differences = np.array([swapped(code) for code in range(32)])
    exact = np.mean(np.abs(differences) >= abs(differences[0]) - 1e-12)
    found = compare_areas(a, b, true, known, resamples=4000)
    assert found.difference == pytest.approx(differences[0])
    assert found.p_permutation == pytest.approx(exact, abs=0.03)


def test_methods_on_different_truths_are_not_compared():
    true, known, found = sample(4, 0)
    with pytest.raises(ValueError, match="different truths"):
        compare_outcomes(outcomes(found, true, known), outcomes(found, true[2:], known))
    with pytest.raises(ValueError, match="different truths"):
        compare_outcomes(outcomes(found, true, known), outcomes(found, true, known, "lesion"))
