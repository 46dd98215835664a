"""What microscope and detector do to an image: contrast transfer (CTF) and modulation transfer (MTF)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["contrast_transfer", "detector_transfer", "electron_wavelength"]


def electron_wavelength(kilovolts: float) -> float:
    """Relativistic wavelength of an electron in Angstrom, 0.01969 at 300 kV."""
    volts = 1000 * kilovolts
    return float(12.2642596 / np.sqrt(volts * (1 + 0.978476e-6 * volts)))


def contrast_transfer(
    frequency: npt.NDArray[Any],
    defocus: float,
    kilovolts: float = 300.0,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.07,
) -> npt.NDArray[np.float64]:
    """Contrast transfer function, positive at low frequency: protein stays bright.

    sin(pi lambda df k^2 - pi/2 Cs lambda^3 k^4 + asin A), with underfocus df > 0.

    Args:
        frequency: any shape, cycles per Angstrom.
        defocus: underfocus in micrometres.
        kilovolts: acceleration voltage.
        spherical_aberration: Cs in millimetres.
        amplitude_contrast: A in [0, 1].

    Returns:
        Same shape, in [-1, 1].
    """
    wavelength = electron_wavelength(kilovolts)
    square = np.asarray(frequency, np.float64) ** 2
    aberration = 0.5 * np.pi * spherical_aberration * 1e7 * wavelength**3 * square**2
    phase = np.pi * wavelength * defocus * 1e4 * square - aberration + np.arcsin(amplitude_contrast)
    result: npt.NDArray[np.float64] = np.sin(phase)
    return result


def detector_transfer(fraction: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Modulation transfer of the detector: sin(x) / x with x = pi/2 times the fraction of Nyquist (0.64 there).

    Args:
        fraction: frequency over Nyquist, any shape.

    Returns:
        Same shape, in (0, 1] up to twice Nyquist.
    """
    result: npt.NDArray[np.float64] = np.sinc(np.asarray(fraction) / 2)
    return result
