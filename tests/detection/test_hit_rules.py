"""Hit rules and matching, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
from froc_cases import AWAY, MASS, TWO, detections, truths

from medseg.detection.free_response import froc
from medseg.detection.hit_rules import DUPLICATE, FALSE_POSITIVE, box_hits, match_detections


def test_iou_must_be_greater_than_the_limit():
    half = (0, 0, 0, 5, 20, 20)  # intersection 2,000 of a union of 4,000
    assert not box_hits([half], [MASS], "iou>0.5")[0, 0]
    assert box_hits([half], [MASS], "iou>0.49")[0, 0]
    assert box_hits([half], [MASS], "iou>0.3")[0, 0]
    assert box_hits([(0, 0, 0, 6, 20, 20)], [MASS])[0, 0]
    assert box_hits([half, MASS, AWAY], [MASS, AWAY]).tolist() == [[False, False], [True, False], [False, True]]
    assert not box_hits([(3, 3, 3, 3, 3, 3)], [MASS], "iou>0")[0, 0]
    assert box_hits(np.empty((0, 6)), [MASS]).shape == (0, 1)


def test_centre_lies_in_the_half_open_box():
    def hit(d: float, h: float, w: float) -> bool:
        return bool(box_hits([(d - 1, h - 1, w - 1, d + 1, h + 1, w + 1)], [MASS], "centre")[0, 0])

    assert hit(0, 0, 0)
    assert hit(9.99, 19.99, 19.99)
    assert not hit(10, 5, 5)
    assert not hit(5, 20, 5)
    assert not hit(5, 5, -0.01)


def test_bcs_dbt_measures_original_pixels_in_any_grid():
    # 100 pixels of 0.1 mm are 10 mm; in a grid of 0.4 mm that is 25 voxels; half the diagonal of MASS is 14.1 voxels
    grid = (40, 0.4, 0.4, 0.1)

    def hit(d: float, h: float, size: tuple[int, int, int] = (2, 2, 2), truth: tuple[float, ...] = MASS) -> bool:
        box = [d - size[0] / 2, h - size[1] / 2, 9, d + size[0] / 2, h + size[1] / 2, 11]
        return bool(box_hits([box], [truth], "bcs-dbt", grid)[0, 0])

    assert hit(5, 35)  # exactly 25 voxels
    assert not hit(5, 35.1)
    assert hit(15, 35)  # exactly a quarter of 40 slices
    assert not hit(15.1, 35)
    large = (0, -40, -30, 10, 60, 50)  # 100 x 80 voxels: half the diagonal is 64.03
    assert hit(5, 74, truth=large)
    assert not hit(5, 74.1, truth=large)
    anisotropic = (40, 0.2, 0.8, 0.1)
    assert box_hits([[4, 59, 9, 6, 61, 11]], [MASS], "bcs-dbt", anisotropic)[0, 0]
    assert not box_hits([[4, 9, 59, 6, 11, 61]], [MASS], "bcs-dbt", anisotropic)[0, 0]


@pytest.mark.parametrize("rule", ["iou", "iou>1", "iou>1.5", "iou>=0.5", "IoU>0.5", "center", ""])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(ValueError, match="unknown hit rule"):
        box_hits([MASS], [MASS], rule)


def test_bcs_dbt_without_grid_says_what_is_missing():
    with pytest.raises(ValueError, match="needs grid="):
        box_hits([MASS], [MASS], "bcs-dbt")
    with pytest.raises(ValueError, match="no column slices, spacing_h, spacing_w, pixel_mm"):
        froc(detections(("cc", MASS, 1)), truths(("cc", "a", MASS)), TWO, rule="bcs-dbt")
    known = TWO.assign(slices=40, spacing_h=0.4, spacing_w=0.4, pixel_mm=0.1)
    near = (4, 33, 9, 6, 35, 11)
    assert froc(detections(("cc", near, 1)), truths(("cc", "a", MASS)), known, rule="bcs-dbt").sensitivity == [1]
    with pytest.raises(ValueError, match=r"positive numbers for slices.*'cc'"):
        froc(detections(("cc", near, 1)), truths(("cc", "a", MASS)), known.assign(pixel_mm=np.nan), rule="bcs-dbt")


def test_each_truth_is_taken_once_by_the_highest_score():
    found = detections(("cc", MASS, 0.3), ("cc", (0, 0, 0, 9, 20, 20), 0.8), ("cc", AWAY, 0.9), ("mlo", MASS, 0.1))
    true = truths(("cc", "a", MASS), ("mlo", "a", MASS))
    assert match_detections(found, true, TWO).tolist() == [DUPLICATE, 0, FALSE_POSITIVE, 1]


def test_a_detection_takes_the_truth_it_fits_best_and_leaves_the_other():
    near = (0, 0, 2, 10, 20, 22)
    true = truths(("cc", "a", MASS), ("cc", "b", near))
    found = detections(("cc", near, 0.9), ("cc", (0, 0, 1, 10, 20, 21), 0.5))
    assert match_detections(found, true, TWO).tolist() == [1, 0]


def test_the_order_of_equal_scores_does_not_matter():
    true = truths(("cc", "a", MASS), ("cc", "b", (0, 0, 4, 10, 20, 24)))
    found = detections(("cc", (0, 0, 1, 10, 20, 21), 0.5), ("cc", MASS, 0.5), ("cc", (0, 0, 3, 10, 20, 23), 0.5))
    forward = match_detections(found, true, TWO)
    backward = match_detections(found[::-1], true, TWO)[::-1]
    assert forward.tolist() == backward.tolist() == [DUPLICATE, 0, 1]
