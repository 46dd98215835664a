"""From a density to a reconstructed subtomogram: tilt series, optics, noise, weighted back-projection.

The tilt axis is y and the beam runs along z; arrays are in the order z, y, x. By the projection-slice theorem the
Fourier transform of a projection is a central slice of the volume's. Slices are read off with a Kaiser-Bessel kernel of
four samples (a non-uniform FFT) and put back with its adjoint. Because the axis is y, one sparse matrix over the plane
(kz, kx) serves all ky; it is built once and kept.

The contrast sign is that of the density: protein is bright. (In raw micrographs it is dark; most pipelines invert.)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft, sparse

from medseg.tasks.cryoet_one_shot.optics import detector_transfer

Volume = npt.NDArray[np.float32]  # (D, H, W) in z, y, x order
Images = npt.NDArray[np.float32]  # (T, H, G): tilts, y, x; G = grid_size(W)

#: Width of the interpolation kernel in samples, and its shape for a grid 4/3 as wide as the volume (Beatty et al. 2005,
#: IEEE TMI 24:799, eq. 5).
KERNEL_WIDTH = 4
OVERSAMPLING = 4 / 3
KERNEL_SHAPE = np.pi * np.sqrt((KERNEL_WIDTH / OVERSAMPLING * (OVERSAMPLING - 0.5)) ** 2 - 0.8)

__all__ = [
    "add_noise",
    "back_project",
    "filter_images",
    "grid_size",
    "project",
    "reconstruct",
    "tilt_angles",
    "wedge",
    "wedge_filter",
]


def tilt_angles(largest: float = 60.0, step: float = 3.0) -> tuple[float, ...]:
    """Angles in degrees from ``-largest`` to ``largest``; 41 by default.

    Raises:
        ValueError: if the angles leave (0, 90] or are fewer than two.
    """
    if not 0 < largest <= 90:
        raise ValueError(f"max_tilt is {largest}; it must lie in (0, 90] degrees")
    if not 0 < step <= 2 * largest:
        raise ValueError(f"tilt_step is {step}; it must lie in (0, {2 * largest:g}] degrees")
    count = int(np.floor(2 * largest / step + 1e-9)) + 1
    return tuple(float(a) for a in (np.arange(count) - (count - 1) / 2) * step)


def grid_size(n: int) -> int:
    """Width in pixels of the tilt images of a volume of ``n`` voxels: room for its corner at any tilt."""
    return 2 * int(np.ceil(OVERSAMPLING * n / 2))


def project(volume: Volume, angles: tuple[float, ...]) -> Images:
    """Project a volume along the beam at every tilt.

    At tilt theta the voxel (z, y, x), counted from the centre ``n // 2``, falls on x' = x cos theta + z sin theta.

    Args:
        volume: (D, H, D), depth equal to width; values beyond 3/4 of the half width are projected less exactly.
        angles: tilts in degrees.

    Returns:
        (T, H, G) line sums in voxels, G = ``grid_size(D)``.
    """
    n, height, _ = volume.shape
    grid = grid_size(n)
    # order z, x, y: the matrix acts on the plane (z, x), and real input halves ky, the last axis
    plane = np.moveaxis(volume / _kernel_decay(n), 1, 2)
    padded = np.zeros((grid, grid, height), np.float32)
    low = grid // 2 - n // 2
    padded[low : low + n, low : low + n] = plane
    spectrum = fft.rfftn(fft.ifftshift(padded)).astype(np.complex64)
    slices = _apply(_slice_matrix(grid, angles), spectrum.reshape(grid * grid, -1))
    images = fft.irfft2(slices.reshape(len(angles), grid, -1), s=(grid, height), axes=(1, 2))
    return np.ascontiguousarray(np.moveaxis(fft.fftshift(images, axes=(1, 2)), 1, 2))


def reconstruct(images: Images, angles: tuple[float, ...], depth: int) -> Volume:
    """Weighted back-projection: every slice goes back with the area of the plane that it stands for.

    The weight is the ramp of filtered back-projection, so that what the tilts cover is given back with gain 1 and what
    lies in the missing wedge stays 0.

    Args:
        images: (T, H, G) as :func:`project` gives them.
        angles: their tilts in degrees, evenly spaced.
        depth: D of the volume; G must be ``grid_size(depth)``.

    Returns:
        (D, H, D).

    Raises:
        ValueError: if sizes do not fit each other.
    """
    tilts, _, grid = images.shape
    if tilts != len(angles) or grid != grid_size(depth):
        raise ValueError(
            f"{tilts} images of width {grid} do not fit {len(angles)} tilts and depth {depth}; the width must be "
            f"{grid_size(depth)}"
        )
    low = grid // 2 - depth // 2
    inner = back_project(images, angles)[low : low + depth, :, low : low + depth]
    result: Volume = np.ascontiguousarray(inner / _kernel_decay(depth)).astype(np.float32)
    return result


def back_project(images: Images, angles: tuple[float, ...]) -> Volume:
    """The weighted back-projection on the whole grid, before its rim is cut off and the kernel's decay is undone.

    Its Fourier transform is 0 wherever no slice lies within the kernel: cutting is what leaks into the missing wedge.

    Args:
        images: (T, H, G).
        angles: their tilts in degrees, evenly spaced.

    Returns:
        (G, H, G).
    """
    tilts, height, grid = images.shape
    upright = fft.ifftshift(np.moveaxis(images, 1, 2), axes=(1, 2))
    slices = fft.rfft2(upright, axes=(1, 2)).astype(np.complex64)
    slices *= _slice_area(grid, angles)[None, :, None]
    spread = _apply(_spread_matrix(grid, angles), slices.reshape(tilts * grid, -1))
    volume: Volume = fft.fftshift(fft.irfftn(spread.reshape(grid, grid, -1), (grid, grid, height)))
    return np.moveaxis(volume, 2, 1)


def filter_images(images: Images, transfer: npt.NDArray[np.float32]) -> Images:
    """Multiply the Fourier transform of every image by a transfer function.

    Args:
        images: (T, H, G).
        transfer: (H, G // 2 + 1) on the grid of ``rfft2``.

    Returns:
        (T, H, G).
    """
    filtered: Images = fft.irfft2(fft.rfft2(images) * transfer, s=images.shape[1:]).astype(np.float32, copy=False)
    return filtered


def add_noise(images: Images, snr: float, rng: np.random.Generator, size: int) -> Images:
    """Add white Gaussian noise of one strength to a whole tilt series.

    SNR is var(signal) / var(noise), with the variance of the noise-free series over all tilts together, in the central
    ``size`` x ``size`` pixels (the rim of the padded images holds little signal and would make noise look weak).

    Args:
        images: (T, H, G) without noise.
        snr: ratio of variances, > 0; infinity adds nothing.
        rng: source of the noise.
        size: side of the central square in pixels.

    Returns:
        (T, H, G).
    """
    if np.isinf(snr):
        return images
    _, height, width = images.shape
    y, x = height // 2 - size // 2, width // 2 - size // 2
    signal = images[:, max(y, 0) : y + size, max(x, 0) : x + size]
    strength = np.float32(np.sqrt(signal.var(dtype=np.float64) / snr))
    noise: Images = rng.standard_normal(images.shape, dtype=np.float32)
    return images + strength * noise


def wedge(shape: tuple[int, int, int], max_tilt: float) -> npt.NDArray[np.bool_]:
    """Which Fourier voxels the tilts -``max_tilt`` to ``max_tilt`` about y cover; the rest is the missing wedge.

    Args:
        shape: (D, H, W).
        max_tilt: degrees.

    Returns:
        (D, H, W), in the order of ``fftn`` (frequency 0 first). The line kz = kx = 0 is covered by every tilt.
    """
    kz, kx = fft.fftfreq(shape[0])[:, None], fft.fftfreq(shape[2])[None, :]
    covered = np.abs(kz) <= np.tan(np.radians(max_tilt)) * np.abs(kx) * (1 + 1e-9)
    return np.repeat(covered[:, None, :], shape[1], axis=1)


@lru_cache(maxsize=4)
def wedge_filter(shape: tuple[int, int, int], max_tilt: float, mtf: bool = True) -> npt.NDArray[np.float32]:
    """Missing wedge times detector transfer on the grid of ``rfftn``: the tilt series in one step, without noise.

    Args:
        shape: (D, H, W).
        max_tilt: degrees.
        mtf: with the detector transfer.

    Returns:
        (D, H, W // 2 + 1) in [0, 1].
    """
    kz, ky, kx = np.meshgrid(fft.fftfreq(shape[0]), fft.fftfreq(shape[1]), fft.rfftfreq(shape[2]), indexing="ij")
    transfer = detector_transfer(2 * np.sqrt(kz**2 + ky**2 + kx**2) * mtf)
    result: npt.NDArray[np.float32] = (transfer * wedge(shape, max_tilt)[..., : kx.shape[2]]).astype(np.float32)
    return result


def _apply(matrix: sparse.csr_matrix, columns: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """Real sparse matrix times complex columns, without making the matrix complex."""
    product: npt.NDArray[np.float32] = matrix @ np.ascontiguousarray(columns).view(np.float32)
    return product.view(np.complex64)


@lru_cache(maxsize=4)
def _slice_matrix(grid: int, angles: tuple[float, ...]) -> sparse.csr_matrix:
    """(T G, G G): kernel weights that read slice samples (tilt, kx') off the plane (kz, kx); order of ``fft``."""
    theta = np.radians(angles)[:, None]
    along = np.fft.fftfreq(grid, 1 / grid)[None, :]
    rows, columns, values = [], [], []
    places = [(along * np.sin(theta)).ravel(), (along * np.cos(theta)).ravel()]
    first = [np.floor(p).astype(np.int64) - KERNEL_WIDTH // 2 + 1 for p in places]
    for i in range(KERNEL_WIDTH):
        for j in range(KERNEL_WIDTH):
            z, x = first[0] + i, first[1] + j
            rows.append(np.arange(len(z)))
            columns.append((z % grid) * grid + x % grid)
            values.append(_kernel(places[0] - z) * _kernel(places[1] - x))
    shape = (len(angles) * grid, grid * grid)
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(entries, shape=shape)


@lru_cache(maxsize=4)
def _spread_matrix(grid: int, angles: tuple[float, ...]) -> sparse.csr_matrix:
    """The adjoint of the slices, by rows."""
    return _slice_matrix(grid, angles).T.tocsr()


def _slice_area(grid: int, angles: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """(G,) area of the plane (kz, kx), in grid cells, that one sample of a slice stands for: |kx'| times the angle."""
    step = np.radians(angles[1] - angles[0]) if len(angles) > 1 else np.pi
    area = np.abs(np.fft.fftfreq(grid, 1 / grid))
    area[0] = 0.25  # two sectors of radius 1/2
    result: npt.NDArray[np.float32] = (area * step).astype(np.float32)
    return result


def _kernel(distance: npt.NDArray[Any]) -> npt.NDArray[Any]:
    inside = np.clip(1 - (2 * distance / KERNEL_WIDTH) ** 2, 0, None)
    weight: npt.NDArray[Any] = np.where(np.abs(distance) <= KERNEL_WIDTH / 2, np.i0(KERNEL_SHAPE * np.sqrt(inside)), 0)
    return weight


@lru_cache(maxsize=4)
def _kernel_decay(n: int) -> Volume:
    """(n, 1, n): what the kernel does to a volume in real space, along z and x."""
    offset = (np.arange(n) - n // 2) / grid_size(n)
    root = np.sqrt(KERNEL_SHAPE**2 - (np.pi * KERNEL_WIDTH * offset) ** 2)
    decay = KERNEL_WIDTH * np.sinh(root) / root
    result: Volume = (decay[:, None, None] * decay[None, None, :]).astype(np.float32)
    return result
