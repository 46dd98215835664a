"""The statistics against scipy and statsmodels on fixed numbers, and against what can be said by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from medseg.experiments.statistics import bootstrap_ci, friedman, holm, mean_ranks, paired_wilcoxon

A = [0.82, 0.91, 0.77, 0.64, 0.95, 0.88, 0.71, 0.80, 0.93, 0.69]
B = [0.80, 0.86, 0.79, 0.55, 0.92, 0.89, 0.60, 0.72, 0.90, 0.61]


def test_wilcoxon_is_that_of_scipy():
    assert paired_wilcoxon(A, B) == pytest.approx(stats.wilcoxon(A, B).pvalue)
    # exact by hand: all of 6 differences positive, so p = 2 / 2^6
    assert paired_wilcoxon([1, 2, 3, 4, 5, 6], [0.9, 1.8, 2.7, 3.6, 4.5, 5.4]) == pytest.approx(2 / 64)
    assert paired_wilcoxon(A, B) == paired_wilcoxon(B, A)


def test_wilcoxon_leaves_out_what_is_undefined_or_equal():
    assert paired_wilcoxon([*A, np.nan, 0.5], [*B, 0.3, np.nan]) == paired_wilcoxon(A, B)
    assert paired_wilcoxon([*A, 0.5], [*B, 0.5]) == paired_wilcoxon(A, B)
    assert paired_wilcoxon(A, A) == 1.0
    assert np.isnan(paired_wilcoxon([np.nan], [1.0]))
    assert np.isnan(paired_wilcoxon([], []))
    with pytest.raises(ValueError, match="10 values against 3"):
        paired_wilcoxon(A, B[:3])


@pytest.mark.parametrize("p", [[0.01, 0.04, 0.03], [0.5, 0.0001, 0.5, 0.02, 0.02], [0.9, 0.8], [0.03]])
def test_holm_is_that_of_statsmodels(p):
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_holm_passes_over_what_was_not_tested():
    adjusted = holm([0.01, np.nan, 0.02])
    np.testing.assert_allclose(adjusted[[0, 2]], holm([0.01, 0.02]))
    assert np.isnan(adjusted[1])
    assert holm([]).tolist() == []
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        holm([1.5])


def test_bootstrap_is_reproducible_and_close_to_theory():
    values = np.random.default_rng(1).normal(10, 2, 400)
    low, high = bootstrap_ci(values)
    assert bootstrap_ci(values) == (low, high)
    expected = stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))
    np.testing.assert_allclose((low, high), expected, atol=0.03)
    assert bootstrap_ci(values, confidence=0.5)[0] > low


def test_bootstrap_covers_the_mean_of_skewed_values():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_ci(rng.exponential(1.0, 40), resamples=500)
        hits += low <= 1.0 <= high
    assert 0.88 <= hits / 200 <= 0.99  # the percentile interval reaches about 0.92 here


def test_bootstrap_of_degenerate_values():
    assert bootstrap_ci([0.7, 0.7, 0.7]) == (0.7, 0.7)
    assert bootstrap_ci([0.7, np.nan, 0.9]) == bootstrap_ci([0.7, 0.9])
    assert np.isnan(bootstrap_ci([0.7])).all()
    assert np.isnan(bootstrap_ci([])).all()
    for bad in ({"confidence": 95}, {"resamples": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            bootstrap_ci(A, **bad)
    with pytest.raises(ValueError, match="infinity"):
        bootstrap_ci([1.0, np.inf])


def test_ranks():
    table = np.array([[0.9, 0.8, 0.7], [0.9, 0.9, 0.1], [np.nan, 0.5, 0.6]])
    np.testing.assert_allclose(mean_ranks(table), [(1 + 1.5 + 3) / 3, (2 + 1.5 + 2) / 3, (3 + 3 + 1) / 3])
    np.testing.assert_allclose(mean_ranks(table[:1], higher_is_better=False), [3, 2, 1])


def test_friedman_is_that_of_scipy():
    table = np.random.default_rng(0).random((12, 4))
    assert friedman(table) == pytest.approx(stats.friedmanchisquare(*table.T).pvalue)
    assert friedman(np.ones((5, 3))) == 1.0
    assert np.isnan(friedman(table[:, :2]))
