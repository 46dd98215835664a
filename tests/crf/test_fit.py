"""Fitting the CRF on cases where a right answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.crf import DenseCRF3D
from medseg.crf.fit import dice, fit_crf


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noisy_blobs(count=3, size=12):
    """Blobs that the image shows and a noisy network half sees."""
    cases = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        field = ndimage.gaussian_filter(rng.standard_normal(3 * (size + seed,)), 2.5)
        label = field > np.quantile(field, 0.75)
        image = 80 + 90 * label + 15 * rng.standard_normal(label.shape)
        p = 1 / (1 + np.exp(1.0 - 2.5 * label - 1.2 * rng.standard_normal(label.shape)))
        arrays = (np.stack([1 - p, p]), image[None], label[None])
        cases.append(tuple(torch.from_numpy(a.astype(np.float32))[None] for a in arrays))
    return cases


def test_a_fit_raises_dice_and_repeats():
    cases = noisy_blobs()
    results = []
    for _ in range(2):
        crf = DenseCRF3D(0.1, 0.7, 0.1, 1.5, 60.0, iterations=2)
        results.append(fit_crf(crf, cases, steps=20, learning_rate=0.15, batch_size=2, evaluate_every=5))
        assert crf.values() == results[-1].after
        assert crf.tolerance == 3e-3
    fit = results[0]
    assert fit == results[1]
    assert fit.before == pytest.approx(DenseCRF3D(0.1, 0.7, 0.1, 1.5, 60.0).values())
    assert fit.dice_after > fit.dice_before + 0.02
    assert fit.dice_after > fit.dice_network
    assert fit.step > 0


def test_a_fit_that_finds_nothing_better_keeps_the_start():
    p, image, _ = noisy_blobs(1)[0]
    crf = DenseCRF3D(1.0, 1.0, 2.0, 2.0, 25.0, iterations=2, tolerance=1e-3)
    with torch.no_grad():
        label = (crf(p, image)[:, 1:] > 0.5).float()
    start = crf.values()
    fit = fit_crf(crf, [(p, image, label)], steps=2, learning_rate=1.0, evaluate_every=1)
    assert fit.dice_before == fit.dice_after == 1
    assert fit.step == 0
    assert crf.values() == start == fit.after


def test_values_stay_within_a_factor_of_100():
    cases = noisy_blobs(1, size=6)
    crf = DenseCRF3D(1.0, 1.0, 2.0, 2.0, 400.0, iterations=1)
    fit = fit_crf(crf, cases, steps=1, learning_rate=50.0)
    assert all(0.009 < fit.after[name] / value < 110 for name, value in fit.before.items())
    assert fit.dice_after >= fit.dice_before


def test_no_steps_only_evaluate():
    cases = noisy_blobs(1)
    crf = DenseCRF3D(iterations=1)
    fit = fit_crf(crf, cases, steps=0)
    p, _, label = cases[0]
    assert fit.dice_network == dice(p[:, 1:] > 0.5, label)
    assert fit.before == fit.after
    assert fit.dice_before == fit.dice_after


def test_dice_by_hand():
    a, b = torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 1])
    assert dice(a, b) == pytest.approx(0.4)
    assert dice(a, a) == 1
    assert dice(a * 0, a * 0) == 1
    assert dice(a, a * 0) == 0


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda p, i, y: (), {}, "no cases"),
        (lambda p, i, y: ((p, i, y),), {"batch_size": 0}, "batch_size 0"),
        (lambda p, i, y: ((p, i, y[..., 1:]),), {}, "case 0: label has shape"),
        (lambda p, i, y: ((p, i, 2 * y),), {}, "other values than 0 and 1"),
        (lambda p, i, y: ((p[:, :1], i, y),), {}, r"pass \(1, 2, D, H, W\)"),
    ],
)
def test_cases_that_cannot_be_meant(change, options, message):
    with pytest.raises(ValueError, match=message):
        fit_crf(DenseCRF3D(), change(*noisy_blobs(1)[0]), **options)
