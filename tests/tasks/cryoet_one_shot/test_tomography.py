from __future__ import annotations

import numpy as np
import pytest

from medseg.tasks.cryoet_one_shot.catalogue import catalogue
from medseg.tasks.cryoet_one_shot.complexes import density
from medseg.tasks.cryoet_one_shot.optics import contrast_transfer, detector_transfer, electron_wavelength
from medseg.tasks.cryoet_one_shot.tomography import (
    add_noise,
    back_project,
    filter_images,
    grid_size,
    project,
    reconstruct,
    tilt_angles,
    wedge,
    wedge_filter,
)

BOX = 24


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    """A small complex off the centre, (n, 3) in Angstrom, that fills 16 of 24 voxels of 10 Angstrom."""
    return catalogue()[2].points + np.array([15.0, -8.0, 5.0])


def image_of(points: np.ndarray, size: int = BOX) -> np.ndarray:
    return density(points, np.ones(len(points)), (size,) * 3, 10.0, 40.0)


def test_tilt_angles():
    angles = tilt_angles()
    assert len(angles) == 41
    assert angles[0] == -60
    assert angles[20] == 0
    assert angles[-1] == 60
    np.testing.assert_allclose(tilt_angles(50, 20), [-50, -30, -10, 10, 30, 50])
    for bad in ((0, 3), (91, 3), (60, 0), (60, 130)):
        with pytest.raises(ValueError, match="must lie in"):
            tilt_angles(*bad)


def test_a_slice_is_the_transform_of_the_projection(points):
    """Against the direct way: turn the points, make the density, add it up along the beam."""
    angles = (-60.0, -33.0, 0.0, 21.0, 60.0)
    images = project(image_of(points), angles)
    assert images.shape == (5, BOX, grid_size(BOX))
    for angle, image in zip(angles, images, strict=True):
        t = np.radians(angle)
        turned = points @ np.array([[np.cos(t), 0, np.sin(t)], [0, 1, 0], [-np.sin(t), 0, np.cos(t)]]).T
        direct = image_of(turned, grid_size(BOX)).sum(axis=0)
        low = (grid_size(BOX) - BOX) // 2
        direct = direct[low : low + BOX]
        assert np.abs(image - direct).max() < 0.03 * direct.max()


def test_projection_against_the_exact_fourier_sum():
    """The kernel's own error, without that of sampling a density: a random volume, every frequency by hand."""
    rng = np.random.default_rng(3)
    volume = np.zeros((12, 6, 12), np.float32)
    volume[2:10, :, 2:10] = rng.standard_normal((8, 6, 8))
    angle = 37.0
    image = project(volume, (angle,))[0]
    grid = grid_size(12)
    z, y, x = np.mgrid[:12, :6, :12] - np.array([6, 3, 6])[:, None, None, None]
    along = x * np.cos(np.radians(angle)) + z * np.sin(np.radians(angle))
    exact = np.zeros((6, grid), complex)
    for i, ky in enumerate(np.fft.fftfreq(6)):
        for j, kx in enumerate(np.fft.fftfreq(grid)):
            exact[i, j] = (volume * np.exp(-2j * np.pi * (kx * along + ky * y))).sum()
    found = np.fft.fft2(np.fft.ifftshift(image))
    # real images cannot hold the imaginary part at Nyquist
    inner = np.abs(np.fft.fftfreq(grid)) < 0.5
    inner_y = np.abs(np.fft.fftfreq(6)) < 0.5
    difference = np.abs(found - exact)[np.ix_(inner_y, inner)]
    assert difference.max() < 0.02 * np.abs(exact).max()


def test_all_angles_give_the_volume_back(points):
    volume = image_of(points)
    angles = tuple(np.arange(-90.0, 90.0, 3.0))
    back = reconstruct(project(volume, angles), angles, BOX)
    assert np.abs(back - volume).max() < 0.05 * volume.max()
    slope = np.polyfit(volume.ravel(), back.ravel(), 1)[0]
    assert slope == pytest.approx(1, abs=0.02)


def test_nothing_is_in_the_missing_wedge_before_the_crop(points):
    angles = tilt_angles()
    images = project(image_of(points), angles)
    whole = back_project(images, angles)
    power = np.abs(np.fft.fftn(whole)) ** 2
    kz, kx = (np.abs(np.fft.fftfreq(len(whole), 1 / len(whole))) for _ in range(2))
    past_the_edge = kz[:, None] * np.cos(np.pi / 3) - kx[None, :] * np.sin(np.pi / 3)  # distance in samples
    empty = np.repeat((past_the_edge > 2 * np.sqrt(2))[:, None], BOX, axis=1)
    assert empty.mean() > 0.1
    assert power[empty].max() < 1e-9 * power.max()
    # and the reconstruction is the volume without its wedge
    back = reconstruct(images, angles, BOX)
    limited = np.fft.ifftn(np.fft.fftn(image_of(points)) * wedge(back.shape, 60)).real
    assert np.corrcoef(back.ravel(), limited.ravel())[0, 1] > 0.97


def test_projection_and_back_projection_are_linear_and_shift_along_the_axis(points):
    volume, angles = image_of(points), tilt_angles(60, 20)
    images = project(volume, angles)
    np.testing.assert_allclose(project(2 * volume, angles), 2 * images, atol=1e-5 * images.max())
    moved = project(np.roll(volume, 3, axis=1), angles)
    np.testing.assert_allclose(moved, np.roll(images, 3, axis=1), atol=1e-4 * images.max())


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the width must be 32"):
        reconstruct(np.zeros((2, 24, 24), np.float32), (0.0, 3.0), 24)


def test_wedge_by_hand():
    mask = wedge((8, 4, 8), 45)
    kz, kx = np.fft.fftfreq(8)[:, None], np.fft.fftfreq(8)[None]
    np.testing.assert_array_equal(mask[:, 2], np.abs(kz) <= np.abs(kx))
    assert mask[0].all()
    assert wedge((32, 32, 32), 60).mean() == pytest.approx(0.712, abs=0.01)  # 1 - tan(30 deg) / 2 of a square
    both = wedge_filter((8, 4, 8), 45.0)
    assert both.shape == (8, 4, 5)
    assert both[0, 0, 0] == 1
    assert both[0, 0, 4] == pytest.approx(2 / np.pi)
    assert both[2, 0, 1] == 0
    np.testing.assert_array_equal(wedge_filter((8, 4, 8), 45.0, mtf=False), mask[..., :5])


def test_the_wedge_is_the_same_after_the_turns_that_augmentation_may_use():
    mask = np.fft.fftshift(wedge((9, 9, 9), 60))
    for axes in ((0, 1), (0, 2), (1, 2)):
        np.testing.assert_array_equal(np.flip(mask, axes), mask)


def test_ctf_by_hand():
    assert electron_wavelength(300) == pytest.approx(0.019687, rel=1e-4)
    assert electron_wavelength(200) == pytest.approx(0.025079, rel=1e-4)
    assert contrast_transfer(np.zeros(1), 5.0)[0] == pytest.approx(0.07)
    # pi 0.0196875 50000 / 1600 = 1.93281; pi/2 2.7e7 0.0196875^3 / 1600^2 = 0.00012642; asin 0.07 = 0.0700572
    assert contrast_transfer(np.array([1 / 40]), 5.0)[0] == pytest.approx(
        np.sin(1.93281 - 0.00012642 + 0.0700572), abs=1e-4
    )
    # first zero where pi lambda df k^2 = pi - asin A
    zero = np.sqrt((np.pi - np.arcsin(0.07)) / (np.pi * electron_wavelength(300) * 5e4))
    assert contrast_transfer(np.array([zero]), 5.0, spherical_aberration=0)[0] == pytest.approx(0, abs=1e-9)


def test_mtf_by_hand():
    np.testing.assert_allclose(detector_transfer(np.array([0, 0.5, 1])), [1, np.sqrt(8) / np.pi, 2 / np.pi], atol=1e-12)


def test_filter_images_is_a_convolution():
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, 8, 12)).astype(np.float32)
    kernel = np.zeros((8, 12))
    kernel[0, 0], kernel[0, 1], kernel[1, 0] = 0.5, 0.3, 0.2
    expected = 0.5 * images + 0.3 * np.roll(images, 1, axis=2) + 0.2 * np.roll(images, 1, axis=1)
    np.testing.assert_allclose(filter_images(images, np.fft.rfft2(kernel)), expected, atol=1e-5)


@pytest.mark.parametrize("snr", [1000.0, 0.5])
def test_the_snr_is_met(points, snr):
    images = project(image_of(points), tilt_angles())
    noisy = add_noise(images, snr, np.random.default_rng(1), 16)
    inner = images[:, 4:20, 8:24]
    assert inner.var() / (noisy - images).var() == pytest.approx(snr, rel=0.05)
    per_tilt = (noisy - images).std(axis=(1, 2))
    assert per_tilt.std() < 0.1 * per_tilt.mean()  # one strength for the whole series
    again = add_noise(images, snr, np.random.default_rng(1), 16)
    np.testing.assert_array_equal(noisy, again)
    np.testing.assert_array_equal(add_noise(images, np.inf, np.random.default_rng(1), 16), images)


def test_projections_against_torch_fourier_slice(points):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("torch_fourier_slice")
    angles = (-45.0, 0.0, 30.0)
    volume = image_of(points)
    t = np.radians(angles)
    zero, one = np.zeros(3), np.ones(3)
    # rotations from the projection's frame to the volume's, acting on z, y, x
    turns = np.array([[np.cos(t), zero, np.sin(t)], [zero, one, zero], [-np.sin(t), zero, np.cos(t)]]).transpose(
        2, 0, 1
    )
    theirs = peer.project_3d_to_2d(
        torch.from_numpy(volume), torch.tensor(turns, dtype=torch.float32), zyx_matrices=True
    )
    low = (grid_size(BOX) - BOX) // 2
    ours = project(volume, angles)[:, :, low : low + BOX]
    assert np.abs(ours - theirs.numpy()).max() < 0.05 * ours.max()
