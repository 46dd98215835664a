"""Limited-angle tomosynthesis: projections of an attenuation volume over a small arc, and slices made from them.

The model is that of a parallel beam whose direction moves along h (the tube of the paper's unit moves parallel to the
chest wall). Seen under the angle t, the slice at height z is shifted by z tan(t) along h; in the Fourier domain along
h that is a phase, exact and without interpolation. So for each frequency k there is one small matrix

    A(k)[t, d] = exp(-i k z_d tan t)        (projections x slices)

and every method below is a product with A(k), its adjoint, or a matrix made from the two: all of them are linear. The
longer path of slanted rays (1 / cos t, 1.5 % at 10 degrees), scatter and beam divergence are left out.

Volumes are (D, H, W); projections are (T, P, W) in units of the volume's values times slices, where P is H padded to
twice its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft

Volume = npt.NDArray[np.float32]
Matrices = npt.NDArray[np.complex64]  # (K, rows, columns), one for each frequency along h

METHODS = ("regularised", "sart", "backprojection")

__all__ = ["METHODS", "Acquisition", "acquire", "back_project", "project", "reconstruct"]


@dataclass(frozen=True)
class Acquisition:
    """How a breast is imaged.

    Attributes:
        angle: arc in degrees, split evenly around the vertical; in (0, 90].
        projections: number of views on the arc, at least 2 (the paper: 20 over 20 degrees).
        noise: standard deviation of the noise as a part of that of the projections.
        method: ``regularised`` (least squares), ``sart`` or ``backprojection``.
        regularisation: lambda of ``regularised`` as a part of the number of slices, the diagonal of A A^H.
        iterations: passes of ``sart`` over all projections.
        relaxation: step of ``sart``, in (0, 2).
    """

    angle: float = 20.0
    projections: int = 20
    noise: float = 0.02
    method: str = "regularised"
    regularisation: float = 0.05
    iterations: int = 4
    relaxation: float = 0.5

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        ranges = {
            "angle": (0 < self.angle <= 90, "in (0, 90] degrees"),
            "projections": (self.projections >= 2, "at least 2"),
            "noise": (0 <= self.noise < np.inf, "0 or positive"),
            "method": (self.method in METHODS, f"one of {', '.join(METHODS)}"),
            "regularisation": (0 < self.regularisation < np.inf, "positive"),
            "iterations": (self.iterations >= 1, "at least 1"),
            "relaxation": (0 < self.relaxation < 2, "between 0 and 2"),
        }
        for name, (good, rule) in ranges.items():
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}")


def acquire(
    volume: Volume, spacing: tuple[float, float, float], settings: Acquisition, rng: np.random.Generator
) -> Volume:
    """Project a volume, add noise, and reconstruct it on the same grid.

    Args:
        volume: attenuation (D, H, W).
        spacing: (d, h, w) in mm.
        settings: arc, noise and method.
        rng: draws the noise.

    Returns:
        The reconstruction (D, H, W), in the units of the volume except for ``backprojection``, which is a mean.
    """
    images = project(volume, spacing, settings)
    if settings.noise:
        scale = np.float32(settings.noise * images[:, : volume.shape[1]].std())
        images += scale * rng.standard_normal(images.shape, np.float32)
    return reconstruct(images, volume.shape, spacing, settings)


def project(volume: Volume, spacing: tuple[float, float, float], settings: Acquisition) -> Volume:
    """The projections of a volume, without noise.

    Args:
        volume: attenuation (D, H, W), 0 in air.
        spacing: (d, h, w) in mm.
        settings: arc and number of projections.

    Returns:
        (T, P, W), sums over the slices. The first H rows lie over the volume at angle 0; the rest is the padding.
    """
    padded = padded_length(volume.shape[1])
    # The FFT is periodic: zeros of H behind the volume are half of it on either side.
    spectrum = fft.rfft(volume, padded, axis=1)  # (D, K, W)
    matrices = _projection_matrices(volume.shape, spacing, settings.angle, settings.projections)
    return _from_spectrum(matrices @ spectrum.transpose(1, 0, 2), padded)


def back_project(
    images: Volume, shape: tuple[int, ...], spacing: tuple[float, float, float], settings: Acquisition
) -> Volume:
    """The adjoint of :func:`project`: the sum over all projections of each, smeared back along its rays.

    Args:
        images: projections (T, P, W).
        shape: of the volume, (D, H, W).
        spacing: (d, h, w) in mm.
        settings: arc and number of projections.

    Returns:
        (D, H, W).
    """
    matrices = _projection_matrices(shape, spacing, settings.angle, settings.projections)
    return _apply(matrices.conj().transpose(0, 2, 1), images, shape)


def reconstruct(
    images: Volume, shape: tuple[int, ...], spacing: tuple[float, float, float], settings: Acquisition
) -> Volume:
    """A volume from its projections, by the method of the settings.

    ``regularised`` is A^H (A A^H + lambda I)^-1, the limit of iterative methods with a damped end. ``sart`` (Andersen
    and Kak 1984; what the paper uses) goes through the projections in turn, x += relaxation A_t^H (y_t - A_t x) / D:
    rows of A have the sum D and columns, for one projection, the sum 1. Both are applied as one matrix for each
    frequency, made once for a grid. ``backprojection`` is A^H y / (T D): shift and add.

    Args:
        images: projections (T, P, W).
        shape: of the volume, (D, H, W).
        spacing: (d, h, w) in mm.
        settings: arc and method.

    Returns:
        (D, H, W).

    Raises:
        ValueError: if the projections do not belong to this shape and these settings.
    """
    expected = (settings.projections, padded_length(shape[1]), shape[2])
    if images.shape != expected:
        raise ValueError(f"images have the shape {images.shape}; for a volume of {tuple(shape)} it must be {expected}")
    noiseless = Acquisition(**{**vars(settings), "noise": 0.0})  # the noise changes no matrix
    return _apply(_reconstruction_matrices(tuple(shape), tuple(spacing), noiseless), images, shape)


def padded_length(rows: int) -> int:
    """Length of the padded scan axis for a volume of so many rows: twice that or a little more, and even."""
    length = fft.next_fast_len(2 * rows, real=True)
    while length % 2:
        length = fft.next_fast_len(length + 1, real=True)
    return int(length)


def _apply(matrices: Matrices, images: Volume, shape: tuple[int, ...]) -> Volume:
    spectrum = fft.rfft(images, axis=1)  # (T, K, W)
    return _from_spectrum(matrices @ spectrum.transpose(1, 0, 2), images.shape[1], shape[1])


def _from_spectrum(spectrum: Matrices, padded: int, rows: int | None = None) -> Volume:
    """Back from (K, N, W) to (N, rows, W)."""
    # irfft ends in the memory order of its input; the copy makes later work on slices fast
    result: Volume = np.ascontiguousarray(fft.irfft(spectrum.transpose(1, 0, 2), padded, axis=1)[:, :rows])
    return result


@lru_cache(maxsize=4)
def _projection_matrices(
    shape: tuple[int, ...], spacing: tuple[float, float, float], angle: float, projections: int
) -> Matrices:
    """A(k), (K, T, D)."""
    padded = padded_length(shape[1])
    k = 2 * np.pi * fft.rfftfreq(padded, spacing[1])  # rad per mm
    z = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing[0]
    angles = np.deg2rad(np.linspace(-angle / 2, angle / 2, projections))
    matrices = np.exp(-1j * k[:, None, None] * np.tan(angles)[:, None] * z)
    # The highest frequency of a real signal has no phase: only the real part survives, both ways.
    matrices[-1] = matrices[-1].real
    result: Matrices = matrices.astype(np.complex64)
    result.flags.writeable = False
    return result


@lru_cache(maxsize=4)
def _reconstruction_matrices(
    shape: tuple[int, ...], spacing: tuple[float, float, float], settings: Acquisition
) -> Matrices:
    """From projections to slices, (K, D, T)."""
    matrices = _projection_matrices(shape, spacing, settings.angle, settings.projections)
    adjoint = matrices.conj().transpose(0, 2, 1)
    views, slices = settings.projections, shape[0]
    if settings.method == "backprojection":
        return adjoint / np.float32(views * slices)
    if settings.method == "regularised":
        gram = (matrices @ adjoint).astype(np.complex128)
        damped = gram + settings.regularisation * slices * np.eye(views)
        # (A A^H + lambda I) is Hermitian, so the inverse from the right is the solution's adjoint
        solved = np.linalg.solve(damped, matrices.astype(np.complex128))
        result: Matrices = solved.conj().transpose(0, 2, 1).astype(np.complex64)
        return result
    # SART is linear in the projections: run on each unit vector, it gives its own matrix.
    units = np.broadcast_to(np.eye(views, dtype=np.complex64), (len(matrices), views, views))
    volume = np.zeros((len(matrices), slices, views), np.complex64)
    step = np.float32(settings.relaxation / slices)
    for _ in range(settings.iterations):
        for t in range(views):
            residual = units[:, t : t + 1] - matrices[:, t : t + 1] @ volume
            volume += step * (adjoint[:, :, t : t + 1] @ residual)
    return volume
