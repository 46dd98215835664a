"""Anchor fitting: cases with a known answer, an exhaustive search, and determinism."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from medseg.detection.anchors import fit_anchors, mean_best_iou


def groups(rng, centres, n=60, spread=0.05):
    return np.concatenate([np.array(c) * np.exp(spread * rng.standard_normal((n, 3))) for c in centres])


def test_well_separated_groups_are_found_as_their_medians():
    centres = [[8, 20, 20], [30, 35, 30], [50, 90, 110], [10, 10, 80]]
    sizes = groups(np.random.default_rng(0), centres)
    expected = np.array(sorted((np.median(g, axis=0) for g in np.split(sizes, 4)), key=np.prod))
    np.testing.assert_allclose(fit_anchors(sizes, 4), expected)


def test_one_anchor_is_the_median_or_better():
    sizes = np.random.default_rng(1).lognormal(3, 0.5, (101, 3))
    anchors = fit_anchors(sizes, 1)
    assert anchors.shape == (1, 3)
    assert mean_best_iou(sizes, anchors) >= mean_best_iou(sizes, np.median(sizes, axis=0)[None])


def test_close_to_the_best_choice_of_boxes():
    """Over all pairs of given sizes as anchors."""
    sizes = np.random.default_rng(2).lognormal(3, 0.4, (25, 3))
    best = max(mean_best_iou(sizes, sizes[list(pair)]) for pair in itertools.combinations(range(25), 2))
    assert mean_best_iou(sizes, fit_anchors(sizes, 2)) > best - 0.02


def test_more_anchors_fit_better_and_come_by_volume():
    sizes = np.random.default_rng(3).lognormal(3, 0.6, (300, 3))
    fits = [fit_anchors(sizes, count) for count in (1, 2, 4, 8)]
    assert (np.diff([mean_best_iou(sizes, anchors) for anchors in fits]) > 0.02).all()
    assert all((np.diff(anchors.prod(1)) >= 0).all() for anchors in fits)


def test_same_arguments_same_anchors():
    sizes = np.random.default_rng(4).lognormal(3, 0.6, (200, 3))
    before = sizes.copy()
    first = fit_anchors(sizes, 3, seed=7)
    assert np.array_equal(first, fit_anchors(sizes, 3, seed=7))
    assert np.array_equal(sizes, before)
    assert mean_best_iou(sizes, first) == pytest.approx(mean_best_iou(sizes, fit_anchors(sizes, 3, seed=8)), abs=0.02)


def test_as_many_anchors_as_different_sizes():
    sizes = [[3, 3, 3], [1, 1, 1], [2, 2, 2], [1, 1, 1]]
    assert fit_anchors(sizes, 3).tolist() == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]


def test_sizes_that_differ_by_rounding():
    assert fit_anchors([[1, 1, 1], [1 + 1e-15, 1, 1], [1 + 1e-14, 1, 1]], 3).shape == (3, 3)


def test_mean_best_iou_by_hand():
    # 1/2 with (2, 2, 2), 1 with (4, 1, 1): inter 2, union 10 with the other.
    assert mean_best_iou([[2, 2, 1], [4, 1, 1]], [[2, 2, 2]]) == pytest.approx((1 / 2 + 2 / 10) / 2)
    assert mean_best_iou([[2, 2, 1], [4, 1, 1]], [[2, 2, 2], [4, 1, 1]]) == pytest.approx((1 / 2 + 1) / 2)


@pytest.mark.parametrize(
    ("sizes", "count", "message"),
    [
        ([[1, 1, 1]], 0, "count is 0"),
        ([[1, 1, 1], [1, 1, 1]], 2, "sizes_mm has 1 different sizes for 2 anchors"),
        ([], 1, r"sizes_mm has shape \(0,\)"),
        (np.zeros((0, 3)), 1, r"sizes_mm has shape \(0, 3\)"),
        ([[1, 1]], 1, r"sizes_mm has shape \(1, 2\)"),
        ([[1, 1, 1], [1, 0, 1]], 1, r"sizes_mm\[1\] is \[1.0, 0.0, 1.0\]; extents are positive"),
        ([[1, 1, float("nan")]], 1, r"sizes_mm\[0\]"),
    ],
)
def test_says_what_is_wrong(sizes, count, message):
    with pytest.raises(ValueError, match=message):
        fit_anchors(sizes, count)


def test_no_anchors_or_no_sizes():
    with pytest.raises(ValueError, match=r"anchors has shape \(0, 3\)"):
        mean_best_iou([[1, 1, 1]], np.zeros((0, 3)))
    with pytest.raises(ValueError, match=r"sizes has shape \(0, 3\)"):
        mean_best_iou(np.zeros((0, 3)), [[1, 1, 1]])
