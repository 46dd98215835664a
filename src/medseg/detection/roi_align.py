"""RoIAlign in 3D: features of boxes of any size and position on a grid of fixed size, without rounding of coordinates.

Source: K. He et al., Mask R-CNN, ICCV 2017, section 3 (RoIAlign), with one more axis. The numbers are those of
torchvision's ``roi_align(aligned=True)``.

Linear interpolation and the mean over samples are separable: a box's features are a crop of the feature map times
one small matrix per axis. That is 8 sampling_ratio^3 / 3 times less work than interpolation sample by sample. The
gradients of all boxes are added into one buffer, which autograd would not do: it allocates a whole map per crop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["roi_align_3d"]

Crop = tuple[int, slice, slice, slice]


def roi_align_3d(
    features: Tensor,
    boxes: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int = 2,
) -> Tensor:
    """Features of boxes, by the mean of linearly interpolated samples in each cell of a grid over the box.

    A cell takes ``sampling_ratio`` samples along each axis, evenly spread. Samples up to one voxel outside the feature
    map take its border's value, those further outside count as zero. Differentiable in ``features``, once; boxes count
    as constants. Half precision is computed in float32.

    Args:
        features: (B, C, D, H, W), floating point.
        boxes: (N, 7): index of the image in the batch, then (d0, h0, w0, d1, h1, w1), half-open edges in voxels of the
            image: voxel i covers [i, i + 1).
        output_size: cells along d, h and w, or one number for all.
        spatial_scale: size of the feature map / size of the image, along d, h and w where they differ, e.g.
            (1 / 2, 1 / 4, 1 / 4).
        sampling_ratio: samples per cell and axis, at least 1.

    Returns:
        (N, C, od, oh, ow) of the type of ``features``; (0, C, od, oh, ow) where there are no boxes.

    Raises:
        ValueError: if shapes, devices or options do not fit, an image index is not in the batch, or a coordinate is NaN
            or infinite.

    Example:
        >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8, 8)
        >>> roi_align_3d(ramp, torch.tensor([[0.0, 0, 0, 2, 4, 4, 6]]), output_size=(1, 1, 2)).flatten().tolist()
        [2.5, 4.5]
    """
    size, scale = _checked(features, output_size, spatial_scale, sampling_ratio)
    # The weights are small and computed on the CPU, in one go: on a GPU each crop would wait for the device.
    regions = _checked_boxes(features, boxes)
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    axes = []
    for i, (extent, cells) in enumerate(zip(features.shape[2:], size, strict=True)):
        low, high = regions[:, 1 + i] * scale[i], regions[:, 4 + i] * scale[i]
        axes.append(_axis_weights(low, high, extent, cells, sampling_ratio))
    d, h, w = ([slice(s, s + n) for s, n in zip(a.start.tolist(), a.length.tolist(), strict=True)] for a in axes)
    crops = list(zip(regions[:, 0].int().tolist(), d, h, w, strict=True))
    weights = (a.weights.to(features.device, dtype) for a in axes)
    result: Tensor = _SeparableCrops.apply(features, crops, *weights)
    return result


@dataclass(frozen=True)
class _Axis:
    """Along one axis, the cells of each box as weighted sums of a few neighbouring voxels.

    Attributes:
        start: (N,) first voxel.
        length: (N,) voxels, at least 1.
        weights: (N, cells, longest length), zero beyond a box's length.
    """

    start: Tensor
    length: Tensor
    weights: Tensor


def _axis_weights(low: Tensor, high: Tensor, extent: int, cells: int, samples: int) -> _Axis:
    """Weights of voxels 0..extent - 1 for the means of ``cells`` x ``samples`` samples between two edges (N,)."""
    steps = (torch.arange(cells * samples, dtype=low.dtype, device=low.device) + 0.5) / (cells * samples)
    # The centre of voxel i is at edge coordinate i + 0.5.
    position = (low - 0.5)[:, None] + (high - low)[:, None] * steps
    inside = ((position >= -1) & (position <= extent)).to(low.dtype) / samples
    position = position.clamp(0, extent - 1)
    below = position.floor().clamp(max=max(extent - 2, 0))
    fraction = position - below
    start = below.amin(1, keepdim=True)
    index = (below - start).long()
    length = (index.amax(1) + 2).clamp(max=extent)
    longest = int(length.max()) if len(low) else 1
    above = (index + 1).clamp(max=longest - 1)
    # (N, cells, longest): samples of a cell are neighbours in the last axis.
    flat = torch.zeros(len(low), cells * longest, dtype=low.dtype, device=low.device)
    cell = torch.arange(cells, device=low.device).repeat_interleave(samples) * longest
    flat.scatter_add_(1, cell + index, (1 - fraction) * inside)
    flat.scatter_add_(1, cell + above, fraction * inside)
    return _Axis(start[:, 0].long(), length, flat.view(len(low), cells, longest))


class _SeparableCrops(torch.autograd.Function):
    """Crops of a feature map, multiplied along each axis by the weights of that crop."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, crops: list[Crop], *weights: Tensor) -> Tensor:
        """(B, C, D, H, W) and three times (N, cells, longest length) -> (N, C, cells of d, of h, of w)."""
        ctx.save_for_backward(*weights)
        ctx.crops, ctx.shape, ctx.dtype = crops, features.shape, features.dtype
        channels, size = features.shape[1], [w.shape[1] for w in weights]
        result = features.new_empty(len(crops), channels, *size)
        with torch.autocast(features.device.type, enabled=False):
            for out, (image, d, h, w), along_d, along_h, along_w in _each(result, crops, weights):
                # Whole rows along w: such a crop is a view, and a copy of it would take longer than the product.
                rows = features[image, :, d, h].to(along_d.dtype)
                values = torch.bmm(along_d.expand(channels, -1, -1), rows.flatten(2))
                values = along_h @ values.view(-1, *rows.shape[2:])[..., w]
                out.copy_((values @ along_w.T).view(channels, *size))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds every crop's gradient to one map."""
        weights = ctx.saved_tensors
        dtype, channels = weights[0].dtype, ctx.shape[1]
        total = torch.zeros(ctx.shape, dtype=dtype, device=gradient.device)
        with torch.autocast(gradient.device.type, enabled=False):
            for out, (image, d, h, w), along_d, along_h, along_w in _each(gradient, ctx.crops, weights):
                values = out.to(dtype).flatten(0, 1) @ along_w
                values = (along_h.T @ values).view(channels, len(along_d), -1)
                part = total[image, :, d, h, w]
                part += (along_d.T @ values).view(part.shape)
        return total.to(ctx.dtype), None, None, None, None


def _each(
    values: Tensor, crops: list[Crop], weights: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Crop, Tensor, Tensor, Tensor]]:
    """Box by box: its values, its crop and the weights that belong to the crop's voxels."""
    for value, crop, *matrices in zip(values, crops, *weights, strict=True):
        d, h, w = (m[:, : s.stop - s.start] for m, s in zip(matrices, crop[1:], strict=True))
        yield value, crop, d, h, w


def _checked(
    features: Tensor, output_size: int | Sequence[int], spatial_scale: float | Sequence[float], sampling_ratio: int
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """Cells and scale along d, h and w."""
    if features.ndim != 5 or not features.is_floating_point() or 0 in features.shape[1:]:
        found = f"shape {tuple(features.shape)} and type {features.dtype}"
        raise ValueError(f"features has {found}; pass floating-point (B, C, D, H, W) with at least one voxel")
    size = (output_size,) * 3 if isinstance(output_size, int) else tuple(output_size)
    scale = (float(spatial_scale),) * 3 if isinstance(spatial_scale, (int, float)) else tuple(spatial_scale)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"output_size is {output_size}; pass cells along d, h and w, at least 1 each, e.g. (3, 7, 7)")
    if len(scale) != 3 or not all(math.isfinite(s) and s > 0 for s in scale):
        raise ValueError(f"spatial_scale is {spatial_scale}; pass positive numbers for d, h and w, e.g. 0.25")
    if sampling_ratio < 1:
        raise ValueError(f"sampling_ratio is {sampling_ratio}; pass samples per cell and axis, at least 1")
    return (size[0], size[1], size[2]), (scale[0], scale[1], scale[2])


def _checked_boxes(features: Tensor, boxes: Tensor) -> Tensor:
    """The boxes in float64 on the CPU."""
    if boxes.ndim != 2 or boxes.shape[1] != 7:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}; pass (N, 7): image index, d0, h0, w0, d1, h1, w1")
    if boxes.device != features.device:
        raise ValueError(f"boxes is on {boxes.device}, features on {features.device}; move one to the other")
    regions = boxes.detach().cpu().double()
    wrong = (~torch.isfinite(regions)).nonzero()
    if len(wrong):
        raise ValueError(f"boxes[{int(wrong[0, 0])}] holds NaN or infinity; remove such boxes")
    outside = ((regions[:, 0] < 0) | (regions[:, 0] >= len(features))).nonzero()
    if len(outside):
        first = int(outside[0, 0])
        raise ValueError(
            f"boxes[{first}] is of image {regions[first, 0]:g}, the batch has images 0..{len(features) - 1}"
        )
    return regions
