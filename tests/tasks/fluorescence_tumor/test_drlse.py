from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from medseg.metrics import dice
from medseg.tasks.fluorescence_tumor.drlse import DRLSE, edge_indicator, evolve, initial_level_set


def noisy_disc(disc, side: int, radius: float, noise: float = 4.0) -> torch.Tensor:
    image = 60 + 100 * ndimage.gaussian_filter(disc(side, radius).astype(float), 2)
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    return torch.tensor(np.clip(image, 0, 255), dtype=torch.float32)


def test_finds_a_disc_from_outside(disc):
    image = noisy_disc(disc, 128, 35)
    level = DRLSE(iterations=220, sigma=1.5)(image[None, None])
    assert level.shape == (1, 1, 128, 128)
    assert dice((level[0, 0] > 0).numpy(), disc(128, 35)) > 0.97


def test_grows_from_inside_with_negative_alpha(disc):
    image = noisy_disc(disc, 128, 40)
    level = DRLSE(iterations=260, sigma=1.5, margin=0.42, alpha=-3.0)(image[None, None])
    assert dice((level[0, 0] > 0).numpy(), disc(128, 40)) > 0.95


def test_a_contour_without_edges_vanishes():
    level = DRLSE(iterations=400)(torch.full((1, 1, 64, 64), 90.0))
    assert not (level > 0).any()


def test_level_set_stays_a_distance_function_near_the_front():
    """The double well keeps the slope near 1 around the zero level, which is what 'distance-regularised' means."""
    phi = evolve(initial_level_set((96, 96), 0.25), torch.ones(96, 96), 60, alpha=0.0, lambda_=0.0)
    dy, dx = torch.gradient(phi)
    near = phi.abs() < 1
    assert torch.sqrt(dx**2 + dy**2)[near].median() == pytest.approx(1, abs=0.15)


def test_edge_indicator_by_hand():
    step = torch.zeros(20, 20)
    step[:, 10:] = 100
    g = edge_indicator(step, sigma=1.0)
    expected = 1 / (1 + np.hypot(*np.gradient(ndimage.gaussian_filter(step.numpy(), 1.0, mode="nearest"))) ** 2)
    np.testing.assert_allclose(g.numpy(), expected, rtol=1e-3)
    assert g[10, 10] < 0.01
    assert g[10, 1] == pytest.approx(1)


def test_inputs_are_not_modified():
    start, g = initial_level_set((40, 40), 0.2), torch.ones(40, 40)
    before = start.clone()
    evolve(start, g, 3)
    torch.testing.assert_close(start, before)


@pytest.mark.parametrize(
    ("images", "message"),
    [(torch.zeros(1, 3, 8, 8), "takes"), (torch.rand(1, 1, 8, 8), "0..255"), (torch.zeros(8, 8), "takes")],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        DRLSE()(images)


def test_unstable_steps_are_refused():
    with pytest.raises(ValueError, match="stable"):
        DRLSE(mu=0.1, dt=5)
