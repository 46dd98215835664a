from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance
from skimage.metrics import hausdorff_distance as skimage_hausdorff

from medseg.metrics import dice, fnr, fnsr, fpsr, hausdorff_distance, precision

PRED = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], bool)
TRUTH = np.array([[0, 1, 1, 1], [0, 0, 0, 0]], bool)
EMPTY = np.zeros((2, 4), bool)


def test_hand_computed_case():
    # |X| = 2, |Y| = 3, |X & Y| = 1
    assert dice(PRED, TRUTH) == pytest.approx(2 / 5)
    assert fpsr(PRED, TRUTH) == pytest.approx(1 / 5)
    assert fnsr(PRED, TRUTH) == pytest.approx(2 / 5)
    assert precision(PRED, TRUTH) == pytest.approx(1 / 2)
    assert fnr(PRED, TRUTH) == pytest.approx(2 / 3)
    # pixel (0, 3) of the truth is 2 from the prediction; pixel (0, 0) of the prediction is 1 from the truth
    assert hausdorff_distance(PRED, TRUTH) == 2
    assert hausdorff_distance(PRED, TRUTH, spacing=(1, 0.5)) == 1


def test_empty_masks_are_undefined_not_a_number_someone_chose():
    assert [f(EMPTY, TRUTH) for f in (dice, fpsr, fnsr)] == [0, 0, 1]
    assert [f(PRED, EMPTY) for f in (dice, fpsr, fnsr)] == [0, 1, 0]
    assert all(math.isnan(f(EMPTY, EMPTY)) for f in (dice, fpsr, fnsr, hausdorff_distance))
    assert (precision(PRED, EMPTY), fnr(EMPTY, TRUTH)) == (0, 1)
    assert math.isnan(precision(EMPTY, TRUTH))
    assert math.isnan(fnr(PRED, EMPTY))
    assert math.isnan(hausdorff_distance(EMPTY, TRUTH))
    assert math.isnan(hausdorff_distance(PRED, EMPTY))


@pytest.mark.parametrize("shape", [(17, 23), (9, 8, 7)])
@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
def test_identity_and_skimage(shape, density):
    rng = np.random.default_rng(3)
    for _ in range(5):
        x, y = rng.random(shape) < density, rng.random(shape) < density
        if not (x.any() and y.any()):
            continue
        assert dice(x, y) + fpsr(x, y) + fnsr(x, y) == pytest.approx(1)
        assert hausdorff_distance(x, y) == pytest.approx(skimage_hausdorff(x, y))


def test_maximum_runs_over_all_pixels_not_the_boundary(disc):
    # The farthest point of a disc from the ring around it is the disc's centre, which is on no boundary.
    ring = disc(41, 18) & ~disc(41, 15)
    assert hausdorff_distance(disc(41, 18), ring) == pytest.approx(skimage_hausdorff(disc(41, 18), ring))
    assert hausdorff_distance(disc(41, 18), ring) > hausdorff_distance(disc(41, 18), ring, percentile=100)


@pytest.mark.parametrize("percentile", [50, 95])
def test_percentile_agrees_with_monai(disc, percentile):
    x, y = disc(64, 14, (30, 28)), disc(64, 17, (33, 36))
    expected = compute_hausdorff_distance(
        torch.tensor(x)[None, None], torch.tensor(y)[None, None], include_background=True, percentile=percentile
    )
    assert hausdorff_distance(x, y, percentile=percentile) == pytest.approx(float(expected), rel=1e-5)


def test_distance_is_symmetric_and_ignores_empty_surroundings(disc):
    x, y = disc(32, 6, (12, 12)), disc(32, 5, (18, 20))
    assert hausdorff_distance(x, y) == hausdorff_distance(y, x)
    assert hausdorff_distance(np.pad(x, 40), np.pad(y, 40)) == hausdorff_distance(x, y)


def test_tensors_with_gradients_and_integer_masks():
    assert dice(torch.tensor(PRED), TRUTH.astype(np.uint8)) == pytest.approx(0.4)
    assert dice(torch.tensor(PRED.astype(float), requires_grad=True), TRUTH) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PRED, TRUTH[:, :2]), "shape"),
        ((PRED * 0.3, TRUTH), "threshold it first"),
        ((PRED, np.where(TRUTH, np.nan, 0)), "truth holds values"),
    ],
)
def test_bad_masks(arguments, message):
    with pytest.raises(ValueError, match=message):
        dice(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"spacing": (1, 1, 1)}, "3 values"), ({"spacing": 0}, "positive"), ({"percentile": 0}, "percentile")],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        hausdorff_distance(PRED, TRUTH, **options)
