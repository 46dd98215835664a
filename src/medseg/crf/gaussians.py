"""Separable low-rank form of a Gaussian: a short cosine series on the range of its argument.

On ``|t| <= R sigma`` a Gaussian agrees with its periodic repetition of period ``P = (R + pad) sigma`` but for the tail
of the next copy, ``exp(-pad^2 / 2)``, and that repetition is a Fourier series whose coefficients fall off as fast as
the Gaussian itself:

    exp(-t^2 / (2 sigma^2)) ~ sum_{k=0..m} c_k cos(w_k t),      w_k = 2 pi k / P
    c_k = (2 - [k = 0]) sqrt(2 pi) (sigma / P) exp(-w_k^2 sigma^2 / 2)

The cosine of a difference is a sum of two products, so 2m + 1 features per point replace the matrix over all pairs of
points. Every ``c_k`` is positive: the kernel stays positive semi-definite.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]

__all__ = ["INTENSITY_SHARE", "AxisOperator", "Series", "axis_operator", "cosine_series"]

#: Up to this range (in sigmas) the error of the series is measured on a grid; beyond it, bounded by its two sources.
MEASURED_RANGE = 64.0

#: Ranks are filled up with zeros to a multiple of this: matrix products of odd widths run at half the speed on a CPU.
RANK_STEP = 8

#: Range, in sigmas, from which on the error allowed to one value falls as the range grows, divided by 3.
SPREAD = 6.0

#: Errors along an axis are met by a thin line of voxels, errors in intensity by all: these get a smaller tolerance.
#: Both numbers were found by comparing marginals with exact ones, for weights up to 30 and up to 96^3 voxels.
INTENSITY_SHARE = 1 / 3


@dataclass(frozen=True)
class Series:
    """A cosine series that stands for a Gaussian.

    Attributes:
        harmonics: m, the highest harmonic; the rank is 2m + 1.
        period: P, in units of sigma.
    """

    harmonics: int
    period: float

    @property
    def rank(self) -> int:
        """Number of features, cosines and sines."""
        return 2 * self.harmonics + 1

    def weights(self, sigma: Tensor) -> Tensor:
        """Coefficients ``c_0 .. c_m`` as functions of sigma, with the period held at its present length.

        Args:
            sigma: scalar, positive.

        Returns:
            (m + 1,) in float64, positive, differentiable in ``sigma``.
        """
        sigma = sigma.double()
        period = self.period * sigma.detach()
        k = torch.arange(self.harmonics + 1, dtype=torch.float64, device=sigma.device)
        w = 2 * math.pi * k / period
        scale = torch.where(k == 0, 1.0, 2.0) * math.sqrt(2 * math.pi)
        return scale * (sigma / period) * torch.exp(-0.5 * (w * sigma) ** 2)


def cosine_series(extent: float, tolerance: float, rank_step: int = 1) -> Series:
    """Shortest series that is accurate on ``|t| <= extent``, for one value and for sums over many.

    Its largest error is below a third of ``tolerance`` (a kernel has up to four factors, and their largest errors
    rarely meet) and below ``6 tolerance / extent``: far from its centre a Gaussian is 0 and the series is not,
    which counts in sums the more the longer the range.

    Args:
        extent: R, largest distance between two points, in units of sigma.
        tolerance: of the kernel, whose largest value is 1.
        rank_step: the rank that will be used is a multiple of this; what it leaves free lowers the error further.

    Returns:
        The series, looked up for ``extent`` rounded up to 0.1.
    """
    tenths = math.ceil(10 * extent)
    return _shortest_series(tenths, tolerance / max(3.0, tenths / (10 * SPREAD)), rank_step)


@functools.lru_cache(maxsize=4096)
def _shortest_series(tenths: int, tolerance: float, rank_step: int) -> Series:
    extent = tenths / 10
    # a copy closer than this is an error above the tolerance whatever the harmonics; one much farther away costs rank
    nearest = math.sqrt(2 * math.log(1 / tolerance))
    errors = {extent + pad: _errors(extent, extent + pad) for pad in nearest + 0.2 * np.arange(9)}
    least = min(int(np.argmax(e < tolerance)) for e in errors.values() if (e < tolerance).any())
    harmonics = (_padded(2 * least + 1, rank_step) - 1) // 2
    period = min(errors, key=lambda p: errors[p][min(harmonics, len(errors[p]) - 1)])
    return Series(harmonics, float(period))


def _padded(rank: int, step: int) -> int:
    """A rank that matrix products are fast with: a multiple of ``step``, and at least two of them."""
    return rank if step == 1 else max(2, math.ceil(rank / step)) * step


def _errors(extent: float, period: float) -> Array:
    """Largest error on ``|t| <= extent`` of the series with 0, 1, 2, ... harmonics; lengths in units of sigma."""
    k = np.arange(math.ceil(period * 1.1) + 3)  # up to w sigma = 6.9, where the coefficients are below 1e-10
    w = 2 * math.pi * k / period
    c = np.where(k == 0, 1.0, 2.0) * math.sqrt(2 * math.pi) / period * np.exp(-0.5 * w**2)
    if extent > MEASURED_RANGE:
        # what is cut off has its maximum at t = 0, the tail of the next copy at t = extent
        bound: Array = c.sum() - np.cumsum(c) + math.exp(-0.5 * (period - extent) ** 2)
        return bound
    t = np.linspace(0, extent, 64 + math.ceil(24 * extent))
    series = np.cumsum(c[:, None] * np.cos(np.outer(w, t)), axis=0)
    error: Array = np.abs(series - np.exp(-0.5 * t**2)).max(axis=1)
    return error


@dataclass(frozen=True)
class AxisOperator:
    """A Gaussian between the points of one axis, as ``basis @ middle @ basis.T``.

    Attributes:
        basis: (length, rank), free of parameters; None stands for the identity.
        middle: (rank,), the diagonal of a matrix, or (length, length) where ``basis`` is None; carries the gradient
            with respect to sigma.
        diagonal: value of the kernel between a point and itself, scalar; 1 up to the error of the series.
    """

    basis: Tensor | None
    middle: Tensor
    diagonal: Tensor

    @property
    def rank(self) -> int:
        """Number of coefficients along the axis."""
        return int(self.middle.shape[0])


def axis_operator(
    length: int, step: float, sigma: Tensor, tolerance: float, dtype: torch.dtype, always_expand: bool = False
) -> AxisOperator:
    """Gaussian between the points of an axis: a series where it is shorter than the axis, else the matrix itself.

    Args:
        length: number of points.
        step: distance of neighbours, in the unit of ``sigma``.
        sigma: scalar, positive.
        tolerance: largest absolute error of the series.
        dtype: of the results.
        always_expand: use the series even where the exact matrix is smaller (tests of the series on small grids).

    Returns:
        The operator, on the device of ``sigma``.
    """
    position = step * torch.arange(length, dtype=torch.float64, device=sigma.device)
    series = cosine_series((length - 1) * step / float(sigma.detach()), tolerance, RANK_STEP)
    rank = _padded(series.rank, RANK_STEP)
    if rank >= length and not always_expand:
        gram = torch.exp(-0.5 * ((position[:, None] - position[None]) / sigma.double()) ** 2)
        return AxisOperator(None, gram.to(dtype), torch.ones((), dtype=dtype, device=sigma.device))
    weights = series.weights(sigma)
    k = torch.arange(series.harmonics + 1, dtype=torch.float64, device=sigma.device)
    # positions are counted from the middle of the axis: small angles, small rounding errors
    angle = (position - position.mean())[:, None] * (2 * math.pi * k / (series.period * sigma.detach().double()))
    filler = angle.new_zeros(length, rank - series.rank)
    basis = torch.cat([torch.cos(angle), torch.sin(angle[:, 1:]), filler], dim=1)
    middle = torch.cat([weights, weights[1:], weights.new_zeros(rank - series.rank)])
    return AxisOperator(basis.to(dtype), middle.to(dtype), weights.sum().to(dtype))
