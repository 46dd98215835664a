from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from medseg.tasks.dbt_mass.acquisition import Acquisition, acquire, back_project, project, reconstruct
from medseg.tasks.dbt_mass.phantom import Grid, draw_breast, tissue

VICTRE = Path(__file__).resolve().parents[3] / "../shared/data/dbt/victre/phantom_compressed_with_mass.nii.gz"
SPACING = (2.0, 1.25, 1.25)
CLEAN = Acquisition(noise=0.0)

#: VICTRE's tissue labels with the attenuation of fat, glandular tissue or muscle (1/cm); vessels as muscle.
LABELS = {1: 0.456, 2: 0.802, 29: 0.802, 33: 0.802, 40: 0.80, 88: 0.802, 95: 0.802, 125: 0.802, 150: 0.80, 225: 0.80}


def volume(seed: int = 0, shape=(12, 40, 24)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def residual(x: np.ndarray, images: np.ndarray, settings: Acquisition) -> float:
    return float(np.linalg.norm(project(x, SPACING, settings) - images))


@pytest.fixture(scope="module")
def breast() -> np.ndarray:
    return tissue(draw_breast(np.random.SeedSequence(5)), "CC", Grid())[0]


@pytest.mark.parametrize("shape", [(12, 40, 24), (7, 33, 9), (1, 8, 1)])
def test_back_projection_is_the_adjoint_of_projection(shape):
    x = volume(0, shape)
    y = volume(1, project(x, SPACING, CLEAN).shape)
    left = np.vdot(project(x, SPACING, CLEAN).astype(float), y)
    right = np.vdot(x.astype(float), back_project(y, shape, SPACING, CLEAN))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-3)


def test_projection_by_hand():
    """Two projections at +-45 degrees and cubic voxels: each slice moves by its height, in whole voxels."""
    x = np.zeros((5, 20, 2), np.float32)
    for d, h in ((0, 8), (2, 10), (4, 5)):
        x[d, h] = (1.0, 2.0)
    images = project(x, (1.0, 1.0, 1.0), Acquisition(angle=90, projections=2))
    assert images.shape == (2, 40, 2)
    for image, sign in zip(images, (-1, 1), strict=True):
        expected = np.zeros((40, 2))
        for d, h in ((0, 8), (2, 10), (4, 5)):
            expected[h + sign * (d - 2)] += (1.0, 2.0)
        np.testing.assert_allclose(image, expected, atol=1e-5)


def test_the_sum_of_every_projection_is_that_of_the_volume():
    x = volume()
    images = project(x, SPACING, CLEAN)
    np.testing.assert_allclose(images.sum(axis=1), np.tile(x.sum(axis=(0, 1)), (20, 1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["regularised", "sart", "backprojection"])
def test_every_method_is_linear(method):
    settings = Acquisition(noise=0.0, method=method)
    a, b = (project(volume(s), SPACING, settings) for s in (0, 1))
    whole = reconstruct(2 * a - 3 * b, (12, 40, 24), SPACING, settings)
    parts = [reconstruct(i, (12, 40, 24), SPACING, settings) for i in (a, b)]
    np.testing.assert_allclose(whole, 2 * parts[0] - 3 * parts[1], atol=1e-4)


@pytest.mark.parametrize("method", ["regularised", "sart", "backprojection"])
def test_a_point_spreads_through_the_slices_and_not_in_the_plane(method):
    x = np.zeros((24, 64, 16), np.float32)
    x[12, 32, 8] = 1
    seen = acquire(x, (1.0, 1.0, 1.0), Acquisition(noise=0.0, method=method), np.random.default_rng(0))
    assert np.unravel_index(seen.argmax(), seen.shape) == (12, 32, 8)
    peak = seen[12, 32, 8]
    above = [int((np.abs(line) > peak / 2).sum()) for line in (seen[:, 32, 8], seen[12, :, 8], seen[12, 32])]
    assert above[0] >= 3
    assert above[0] > above[1]
    assert above[2] == 1, "nothing leaves its column: the tube moves along h"


def test_regularised_agrees_with_plain_linear_algebra():
    """A as a dense matrix, column by column from :func:`project`, on one column of voxels."""
    shape, settings = (6, 10, 1), Acquisition(noise=0.0, projections=5, regularisation=0.1)
    units = np.eye(60, dtype=np.float32).reshape(60, *shape)
    matrix = np.stack([project(u, SPACING, settings).ravel() for u in units], axis=1).astype(float)
    images = project(volume(3, shape), SPACING, settings)
    # Padding rows of the volume are unknowns too: what the frequencies see is the periodic, padded system.
    padded = images.shape[1]
    blocks = [np.roll(matrix.reshape(5, padded, 6, 10)[..., 0], k, axis=1) for k in range(padded)]
    whole = np.stack(blocks, axis=-1).reshape(5 * padded, 6 * padded)
    y = images.ravel().astype(float)
    damped = whole @ whole.T + 0.1 * 6 * np.eye(len(whole))
    expected = (whole.T @ np.linalg.solve(damped, y)).reshape(6, padded, 1)[:, :10]
    np.testing.assert_allclose(reconstruct(images, shape, SPACING, settings), expected, atol=2e-3)


def test_sart_as_its_definition():
    """Real images, one update after the other, through the public functions."""
    settings = Acquisition(noise=0.0, method="sart", projections=4, iterations=3, relaxation=0.7)
    shape = (5, 16, 3)
    truth = volume(2, shape)
    images = project(truth, SPACING, settings)
    # in the padded domain, as the frequencies see it; the periods are those of the padding
    padded = images.shape[1]
    wide = np.zeros((5, padded, 3), np.float32)
    for _ in range(3):
        for t in range(4):
            difference = np.zeros_like(images)
            difference[t] = (images - periodic(wide, settings))[t]
            wide += np.float32(0.7 / 5) * periodic_back(difference, wide.shape, settings)
    np.testing.assert_allclose(reconstruct(images, shape, SPACING, settings), wide[:, :16], atol=1e-4)


def phases(shape: tuple[int, ...], settings: Acquisition) -> np.ndarray:
    k = 2 * np.pi * np.fft.rfftfreq(shape[1], SPACING[1])
    z = (np.arange(shape[0]) - (shape[0] - 1) / 2) * SPACING[0]
    tan = np.tan(np.deg2rad(np.linspace(-settings.angle / 2, settings.angle / 2, settings.projections)))
    return np.exp(-1j * k * tan[:, None, None] * z[:, None])  # (T, D, K)


def periodic(x: np.ndarray, settings: Acquisition) -> np.ndarray:
    spectrum = np.einsum("tdk,dkw->tkw", phases(x.shape, settings), np.fft.rfft(x, axis=1))
    return np.fft.irfft(spectrum, x.shape[1], axis=1)


def periodic_back(y: np.ndarray, shape: tuple[int, ...], settings: Acquisition) -> np.ndarray:
    spectrum = np.einsum("tdk,tkw->dkw", phases(shape, settings).conj(), np.fft.rfft(y, axis=1))
    return np.fft.irfft(spectrum, shape[1], axis=1).astype(np.float32)


def test_sart_comes_closer_with_every_iteration(breast):
    images = project(breast, SPACING, CLEAN)
    left = []
    for iterations in range(1, 6):
        settings = Acquisition(noise=0.0, method="sart", iterations=iterations)
        left.append(residual(reconstruct(images, breast.shape, SPACING, settings), images, settings))
    assert all(later < earlier for earlier, later in itertools.pairwise(left)), left
    assert left[0] < 0.2 * np.linalg.norm(images)


def test_inversion_is_closer_to_the_breast_than_back_projection(breast):
    errors = {}
    for method in ("regularised", "sart", "backprojection"):
        seen = acquire(breast, SPACING, Acquisition(noise=0.0, method=method), np.random.default_rng(0))
        errors[method] = np.linalg.norm(seen - breast) / np.linalg.norm(breast)
    assert errors["regularised"] < errors["backprojection"]
    assert errors["sart"] < errors["backprojection"]


def test_a_wider_arc_resolves_depth_better(breast):
    errors = [
        np.linalg.norm(acquire(breast, SPACING, Acquisition(angle, noise=0.0), np.random.default_rng(0)) - breast)
        for angle in (10.0, 20.0, 60.0)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_noise_has_the_size_that_was_asked_for(breast):
    settings = Acquisition(noise=0.02, method="backprojection")
    noisy = acquire(breast, SPACING, settings, np.random.default_rng(0))
    clean = acquire(breast, SPACING, Acquisition(noise=0.0, method="backprojection"), np.random.default_rng(0))
    scale = 0.02 * project(breast, SPACING, CLEAN)[:, : breast.shape[1]].std()
    assert (noisy - clean).std() == pytest.approx(scale / np.sqrt(20) / breast.shape[0], rel=0.1)
    again = acquire(breast, SPACING, settings, np.random.default_rng(0))
    np.testing.assert_array_equal(noisy, again)


def test_inputs_are_left_alone(breast):
    before = breast.copy()
    acquire(breast, SPACING, Acquisition(), np.random.default_rng(0))
    np.testing.assert_array_equal(breast, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angle": 0}, "angle is 0"),
        ({"angle": 91}, "angle"),
        ({"projections": 1}, "projections is 1"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"method": "fbp"}, "one of regularised, sart, backprojection"),
        ({"regularisation": 0}, "regularisation"),
        ({"iterations": 0}, "iterations"),
        ({"relaxation": 2}, "relaxation"),
    ],
)
def test_numbers_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        Acquisition(**change)


def test_projections_of_another_volume():
    with pytest.raises(ValueError, match=r"must be \(20, 80, 24\)"):
        reconstruct(volume(0, (20, 40, 24)), (12, 40, 24), SPACING, CLEAN)


@pytest.mark.skipif(not VICTRE.is_file(), reason="needs ../shared/data/dbt/victre")
@pytest.mark.parametrize("method", ["regularised", "sart"])
def test_the_mass_of_victre_shows_in_its_slice(method):
    """An independent phantom: its mass is brighter than its surroundings in focus, and less so out of focus."""
    import nibabel

    labels = np.asarray(nibabel.load(VICTRE).dataobj)  # (331, 539, 258) of 0.2 mm
    labels = labels.transpose(2, 1, 0)[:256, :536, :328]  # (d, h, w); the paddles (label 50) count as air
    attenuation = np.zeros(226, np.float32)
    attenuation[list(LABELS)] = list(LABELS.values())
    attenuation[200] = 0.802 * 1.15
    binned = attenuation[labels].reshape(64, 4, 134, 4, 82, 4).mean(axis=(1, 3, 5))  # voxels of 0.8 mm
    mass = (labels == 200).reshape(64, 4, 134, 4, 82, 4).mean(axis=(1, 3, 5))
    assert mass.max() > 0.9
    seen = acquire(binned, (0.8, 0.8, 0.8), Acquisition(method=method), np.random.default_rng(0))
    profile = mass.sum(axis=(1, 2))
    focus = int(profile.argmax())
    core = mass[focus] > 0.5
    centre = np.argwhere(core).mean(axis=0)
    distance = np.hypot(*(np.indices(core.shape) - centre[:, None, None]))
    ring = (distance > 11) & (distance < 18) & (binned[focus] > 0.4)

    def contrast(d: int) -> float:
        return float(seen[d][core].mean() - seen[d][ring].mean())

    true = binned[focus][core].mean() - binned[focus][ring].mean()
    assert contrast(focus) > 0.1 * true
    assert contrast(focus) > contrast(focus - 16), "12.8 mm lower"
