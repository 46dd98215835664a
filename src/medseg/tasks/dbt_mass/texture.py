"""Random fields with a power-law spectrum: the texture of breast tissue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import fft

Volume = npt.NDArray[np.float32]

__all__ = ["power_law_field"]


def power_law_field(
    rng: np.random.Generator, shape: tuple[int, ...], spacing: Sequence[float], exponent: float
) -> Volume:
    """A Gaussian random field whose power falls with the spatial frequency k as k^-exponent.

    Args:
        rng: draws it.
        shape: voxels along each axis.
        spacing: mm along each axis.
        exponent: 3 is that of breast tissue in projections (Burgess 1999).

    Returns:
        Array of ``shape``, mean 0 and standard deviation 1, periodic.
    """
    spectrum = fft.rfftn(rng.standard_normal(shape, np.float32))
    spectrum *= _amplitude(tuple(shape), tuple(spacing), exponent)
    noise: Volume = fft.irfftn(spectrum, shape)
    noise /= noise.std()
    return noise


@lru_cache(maxsize=4)
def _amplitude(shape: tuple[int, ...], spacing: tuple[float, ...], exponent: float) -> Volume:
    axes = [fft.fftfreq(n, s).astype(np.float32) for n, s in zip(shape[:-1], spacing[:-1], strict=True)]
    axes.append(fft.rfftfreq(shape[-1], spacing[-1]).astype(np.float32))
    squares = np.zeros((1,) * len(axes), np.float32)
    for i, axis in enumerate(axes):
        squares = squares + (axis**2).reshape([-1 if j == i else 1 for j in range(len(axes))])
    squares.flat[0] = np.inf  # mean 0
    result: Volume = squares ** np.float32(-exponent / 4)
    result.flags.writeable = False
    return result
