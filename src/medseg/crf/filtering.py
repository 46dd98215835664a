"""Gaussian filters over a volume, in position alone or in position and intensity, in bounded memory.

``out_i = sum_j K_ij v_j`` over all pairs of voxels, with

    K_ij = exp(-|p_i - p_j|^2 / 2 sigma^2 - |I_i - I_j|^2 / 2 sigma_I^2)

Every factor is the series of :mod:`medseg.crf.gaussians`. For each intensity feature the values are multiplied by it,
projected onto the position features axis by axis, weighted, brought back by the transposed matrices, multiplied by the
feature again, and added up. The projection is free of parameters and its transpose is the way back, so that the
backward pass is a filter of the same cost which stores nothing but coefficients; the sigmas act on these only.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from medseg.crf.gaussians import INTENSITY_SHARE, AxisOperator, Series, axis_operator, cosine_series

__all__ = ["GaussianFilter", "Limits"]


@dataclass(frozen=True)
class Limits:
    """What bounds memory and time.

    Attributes:
        tile_extent: an axis longer than this many sigmas is filtered in overlapping tiles.
        short_axis: an axis of so few points is not: its exact matrix costs less than the overlap.
        chunk_values: features times voxels that are held at once: about the second-level cache of one CPU core.
        cuda_chunk_values: the same on CUDA.
        stored_values: features times voxels of a volume up to which intensity features are kept between calls; those of
            larger volumes are recomputed.
        coefficient_values: coefficients held at once; more harmonics of the intensity take turns.
        always_expand: use series even where an exact matrix is smaller (for tests on small grids).
    """

    tile_extent: float = 60.0
    short_axis: int = 64
    chunk_values: int = 500_000
    cuda_chunk_values: int = 100_000_000
    stored_values: int = 32_000_000
    coefficient_values: int = 16_000_000
    always_expand: bool = False


class GaussianFilter:
    """Sum over all voxels, weighted by a Gaussian of their distance in position and, where given, intensity.

    Args:
        shape: (D, H, W) of the volume.
        spacing: distance of neighbours along D, H and W, in the unit of ``sigma``.
        sigma: scalar, of the positions.
        tolerance: largest error of a kernel value that is aimed at; see :func:`medseg.crf.gaussians.cosine_series`.
        dtype: of the values.
        image: (D, H, W), intensities; None filters by position only.
        intensity_sigma: scalar, in the unit of ``image``.
        limits: what bounds memory and time.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        sigma: Tensor,
        tolerance: float,
        dtype: torch.dtype,
        image: Tensor | None = None,
        intensity_sigma: Tensor | None = None,
        limits: Limits | None = None,
    ) -> None:
        limits = limits or Limits()
        reach = math.sqrt(2 * math.log(10 / tolerance)) * float(sigma.detach())
        self._cuts = [
            _tiles(length, step, float(sigma.detach()), reach, limits)
            for length, step in zip(shape, spacing, strict=True)
        ]
        axes: list[dict[int, AxisOperator]] = [
            {
                n: axis_operator(n, step, sigma, tolerance, dtype, limits.always_expand)
                for n in {cut.stop - cut.start for cut in cuts}
            }
            for cuts, step in zip(self._cuts, spacing, strict=True)
        ]
        series, angle, weights = Series(0, 1.0), None, None
        if image is not None and intensity_sigma is not None:
            low, high = (float(v) for v in image.detach().aminmax())
            width = float(intensity_sigma.detach())
            series = cosine_series((high - low) / width, tolerance * INTENSITY_SHARE)
            weights = series.weights(intensity_sigma).to(dtype)
            # from the middle of the range: angles within half a turn
            angle = ((image.detach() - (low + high) / 2) * (2 * math.pi / (series.period * width))).to(dtype)
        self._blocks = [
            _Block(
                tile=tile,
                axes=tuple(axes[i][cut.stop - cut.start] for i, cut in enumerate(tile)),
                angle=None if angle is None else angle[tuple(slice(c.start, c.stop) for c in tile)],
                harmonics=series.harmonics,
                limits=limits,
                store=math.prod(shape) * series.rank <= limits.stored_values,
            )
            for tile in itertools.product(*self._cuts)
        ]
        self._weights = weights
        diagonal = (
            self._blocks[0].axes[0].diagonal * self._blocks[0].axes[1].diagonal * self._blocks[0].axes[2].diagonal
        )
        self.diagonal = diagonal if weights is None else diagonal * weights.sum()

    def __call__(self, values: Tensor) -> Tensor:
        """Filter values.

        Args:
            values: (C, D, H, W).

        Returns:
            (C, D, H, W), the sum over all voxels, the voxel itself included.
        """
        if len(self._blocks) == 1:
            return self._filter(self._blocks[0], values)
        out = torch.zeros_like(values)
        for block in self._blocks:
            outer = (slice(None), *(slice(c.start, c.stop) for c in block.tile))
            inner = (slice(None), *(slice(c.first - c.start, c.last - c.start) for c in block.tile))
            core = (slice(None), *(slice(c.first, c.last) for c in block.tile))
            out[core] = self._filter(block, values[outer])[inner]
        return out

    def _filter(self, block: _Block, values: Tensor) -> Tensor:
        first, *others = block.parts(values.shape[0])
        total = self._filter_part(first, values)
        for part in others:
            total = total + self._filter_part(part, values)
        return total

    def _filter_part(self, part: _Block, values: Tensor) -> Tensor:
        coefficients = _apply(_Project, values, part)
        coefficients = _weigh(coefficients, part.axes, part.feature_weights(self._weights))
        return _apply(_Expand, coefficients, part)


@dataclass(frozen=True)
class _Cut:
    """One tile along one axis: it reads [start, stop) and answers for [first, last)."""

    start: int
    first: int
    last: int
    stop: int


def _tiles(length: int, step: float, sigma: float, reach: float, limits: Limits) -> list[_Cut]:
    """Cut an axis into tiles of about half of ``tile_extent`` sigmas that read ``reach`` beyond on both sides."""
    if length <= limits.short_axis or (length - 1) * step <= limits.tile_extent * sigma:
        return [_Cut(0, 0, length, length)]
    halo = math.ceil(reach / step)
    core = max(1, round(0.5 * limits.tile_extent * sigma / step))
    core = math.ceil(length / math.ceil(length / core))
    return [
        _Cut(max(0, first - halo), first, min(length, first + core), min(length, first + core + halo))
        for first in range(0, length, core)
    ]


@dataclass
class _Block:
    """What one tile needs; ``first``..``last`` are the harmonics of the intensity that this part covers."""

    tile: tuple[_Cut, ...]
    axes: tuple[AxisOperator, ...]
    angle: Tensor | None
    harmonics: int
    limits: Limits
    store: bool
    first: int = 0
    last: int = 0
    _parts: dict[int, list[_Block]] = field(default_factory=dict)
    _features: dict[int, Tensor] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Intensity features of this part."""
        pairs = self.last - self.first + 1
        return 2 * pairs - (1 if self.first == 0 else 0)

    def parts(self, channels: int) -> list[_Block]:
        """Cut the harmonics so that the coefficients of ``channels`` fit."""
        if channels not in self._parts:
            z, y, x = self.axes
            depth = self.tile[0].stop - self.tile[0].start
            per_pair = 2 * channels * max(depth, z.rank) * y.rank * x.rank
            step = max(1, self.limits.coefficient_values // per_pair)
            self._parts[channels] = [
                replace(self, first=k, last=min(k + step - 1, self.harmonics), _parts={}, _features={})
                for k in range(0, self.harmonics + 1, step)
            ]
        return self._parts[channels]

    def feature_weights(self, weights: Tensor | None) -> Tensor | None:
        """Weights of this part's features, (rank,)."""
        if weights is None:
            return None
        cosines = weights[self.first : self.last + 1]
        return torch.cat([cosines, cosines[1:] if self.first == 0 else cosines])

    def chunk(self, values: Tensor) -> int:
        """Slices along D that are worked on together."""
        limit = self.limits.cuda_chunk_values if values.is_cuda else self.limits.chunk_values
        length = [cut.stop - cut.start for cut in self.tile]
        return max(1, limit // (length[1] * length[2] * self.rank))

    def features(self, start: int, stop: int) -> Tensor | None:
        """Cosines and sines of the slices, (s, rank, H, W)."""
        if self.angle is None:
            return None
        if not self.store:
            return _features(self.angle[start:stop], self.first, self.last)
        if start not in self._features:
            self._features[start] = _features(self.angle[start:stop], self.first, self.last)
        return self._features[start]


def _features(angle: Tensor, first: int, last: int) -> Tensor:
    """``cos(k angle)`` then ``sin(k angle)`` for k = first..last, without the sine of 0; (s, H, W) -> (s, rank, H, W).

    Only one cosine and one sine are computed; the addition theorem doubles the number of harmonics again and again.
    """
    count = last - first + 1
    skip = 1 if first == 0 else 0
    out = angle.new_empty(angle.shape[0], 2 * count - skip, *angle.shape[1:])
    if first == 0:
        out[:, 0] = 1
        known = 1
        if count > 1:
            torch.cos(angle, out=out[:, 1])
            torch.sin(angle, out=out[:, count])
            known = 2
    else:
        out[:, 0], out[:, count] = torch.cos(first * angle), torch.sin(first * angle)
        known = 1
    # rows: harmonic first + i has its cosine in row i and its sine in row count - skip + i
    while known < count:
        add = min(known - skip, count - known)
        turn = known - skip  # harmonics by which the known ones are advanced
        if first == 0:
            cos_turn, sin_turn = out[:, turn : turn + 1], out[:, count - 1 + turn : count + turn]
        else:
            cos_turn, sin_turn = torch.cos(turn * angle)[:, None], torch.sin(turn * angle)[:, None]
        cos_old = out[:, skip : skip + add]
        sin_old = out[:, count : count + add]
        cos_new = out[:, known : known + add]
        sin_new = out[:, count - skip + known : count - skip + known + add]
        torch.mul(cos_old, cos_turn, out=cos_new)
        cos_new.addcmul_(sin_old, sin_turn, value=-1)
        torch.mul(sin_old, cos_turn, out=sin_new)
        sin_new.addcmul_(cos_old, sin_turn)
        known += add
    return out


def _project(values: Tensor, block: _Block) -> Tensor:
    """(C, D, H, W) -> coefficients (nz, C, rank, ny, nx)."""
    z, y, x = block.axes
    channels, depth = values.shape[:2]
    rows = values.new_empty(depth, channels, block.rank, y.rank, x.rank)
    chunk = block.chunk(values)
    for start in range(0, depth, chunk):
        part = values[:, start : start + chunk].transpose(0, 1)[:, :, None]  # (s, C, 1, H, W)
        features = block.features(start, start + chunk)
        if features is not None:
            part = part * features[:, None]
        if x.basis is not None:
            part = part @ x.basis
        target = rows[start : start + chunk]
        if y.basis is None:
            target.copy_(part)
        else:
            torch.matmul(y.basis.T, part, out=target)
    return rows if z.basis is None else (z.basis.T @ rows.view(depth, -1)).view(z.rank, *rows.shape[1:])


def _expand(coefficients: Tensor, block: _Block) -> Tensor:
    """Coefficients (nz, C, rank, ny, nx) -> (C, D, H, W): the transpose of :func:`_project`."""
    z, y, x = block.axes
    depth, height, width = (cut.stop - cut.start for cut in block.tile)
    channels = coefficients.shape[1]
    rows = coefficients
    if z.basis is not None:
        rows = (z.basis @ coefficients.reshape(z.rank, -1)).view(depth, *coefficients.shape[1:])
    out = coefficients.new_empty(depth, channels, height, width)
    chunk = block.chunk(coefficients)
    for start in range(0, depth, chunk):
        part = rows[start : start + chunk]
        if y.basis is not None:
            part = y.basis @ part
        if x.basis is not None:
            part = part @ x.basis.T
        features = block.features(start, start + chunk)
        if features is None:
            out[start : start + chunk] = part[:, :, 0]
        elif x.basis is None and y.basis is None:  # still a view of the coefficients
            torch.sum(part * features[:, None], 2, out=out[start : start + chunk])
        else:
            torch.sum(part.mul_(features[:, None]), 2, out=out[start : start + chunk])
    return out.transpose(0, 1)


def _weigh(coefficients: Tensor, axes: tuple[AxisOperator, ...], features: Tensor | None) -> Tensor:
    """Apply what depends on the sigmas: the middle of each axis and the weights of the features."""
    z, y, x = axes
    depth = coefficients.shape[0]
    if x.basis is None:
        coefficients = coefficients @ x.middle
    if y.basis is None:
        coefficients = y.middle @ coefficients
    if z.basis is None:
        coefficients = (z.middle @ coefficients.reshape(depth, -1)).view(coefficients.shape)
    scale = coefficients.new_ones(1, 1, 1, 1, 1)
    for axis, shape in zip(axes, ((-1, 1, 1, 1, 1), (1, 1, 1, -1, 1), (1, 1, 1, 1, -1)), strict=True):
        if axis.basis is not None:
            scale = scale * axis.middle.view(shape)
    if features is not None:
        scale = scale * features.view(1, 1, -1, 1, 1)
    return coefficients * scale


class _Project(torch.autograd.Function):
    """Projection onto the features, linear and free of parameters."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, block: _Block) -> Tensor:
        ctx.block = block
        return _project(values, block)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _apply(_Expand, gradients[0], ctx.block), None


class _Expand(torch.autograd.Function):
    """The way back, the transpose of the projection."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, block: _Block) -> Tensor:
        ctx.block = block
        return _expand(coefficients, block)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _apply(_Project, gradients[0], ctx.block), None


def _apply(function: type[_Project] | type[_Expand], tensor: Tensor, block: _Block) -> Tensor:
    result: Tensor = function.apply(tensor, block)
    return result
