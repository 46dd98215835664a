"""Spatial fuzzy C-means: the segmentation baseline of the paper, without training.

Source: Fan et al. 2020, Table 4 (SFCM), which gives the name only. The spatial function is that of K.-S. Chuang et al.,
Fuzzy c-means clustering with spatial information for image segmentation, Computerized Medical Imaging and Graphics 30,
2006. In three dimensions, for the intensity x_j of voxel j and the centre v_i of cluster i of K,

    u_ij  = 1 / sum_k (|x_j - v_i| / |x_j - v_k|)^(2 / (m - 1))
    h_ij  = sum of u_ik over the voxels k in a window around j
    u'_ij = u_ij^p h_ij^q / sum_k u_kj^p h_kj^q
    v_i   = sum_j u'_ij^m x_j / sum_j u'_ij^m

in turn until the centres rest. ``p=1, q=0`` is plain fuzzy C-means. The method needs a region with one mass in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

Tensor = torch.Tensor
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

__all__ = ["SpatialFuzzyCMeans"]

#: Squared distances to a centre, of intensities in [0, 1], below this count as this: of a value on a centre it is 0.
SMALLEST_SQUARE = 1e-12

#: A box side of one slice comes out of float32 arithmetic as slightly less.
SHORTEST_SIDE = 1 - 1e-3


class SpatialFuzzyCMeans:
    """Masks of the masses inside given boxes, by clustering the intensities of each box and its surroundings.

    The mass is one connected component (by faces) of the brightest cluster: that with most voxels in the central half
    of the box, half of each side; where none has any there, the largest.

    The region decides much, and the paper does not name its own. A detected box is the fair choice next to the masks
    of a detector; the true box enlarged by 20 % is an upper bound, because it tells where the mass is and how large.

    Args:
        clusters: number of clusters K, at least 2.
        fuzziness: exponent m > 1; near 1 a voxel belongs to one cluster only.
        p: weight of a voxel's own membership, at least 0.
        q: weight of the memberships around it, at least 0; 0 switches the spatial function off.
        window: side of the cube around a voxel, odd, in voxels.
        enlarge: the region is the box with each side longer by this share, about the same centre, at least 0.
        iterations: at most so many.
        tolerance: stops when no centre moves by more than this share of the region's range of intensities.
        size: (d, h, w) cells of a returned mask.

    Raises:
        ValueError: if an argument has no meaning.

    Example:
        >>> volume = torch.full((12, 20, 20), 0.3)
        >>> volume[4:8, 6:14, 6:14] = 0.8
        >>> masks = SpatialFuzzyCMeans()(volume, torch.tensor([[3.0, 5.0, 5.0, 9.0, 15.0, 15.0]]))
        >>> masks.shape, float(masks[0, 8, 14, 14]), float(masks[0, 0, 0, 0])
        (torch.Size([1, 16, 28, 28]), 1.0, 0.0)
    """

    def __init__(
        self,
        clusters: int = 2,
        fuzziness: float = 2.0,
        p: float = 1.0,
        q: float = 1.0,
        *,
        window: int = 3,
        enlarge: float = 0.2,
        iterations: int = 50,
        tolerance: float = 1e-3,
        size: Sequence[int] = (16, 28, 28),
    ) -> None:
        if clusters < 2:
            raise ValueError(f"clusters is {clusters}; pass 2 or more, the brightest is the mass")
        if not (math.isfinite(fuzziness) and fuzziness > 1):
            raise ValueError(f"fuzziness is {fuzziness:g}; pass a number above 1, e.g. 2")
        for name, value in {"p": p, "q": q, "enlarge": enlarge, "tolerance": tolerance}.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value:g}; pass a number of at least 0")
        if p == q == 0:
            raise ValueError("p and q are both 0, which makes all memberships equal; pass e.g. p=1, q=1")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window is {window}; pass an odd number of voxels, e.g. 3")
        if iterations < 1:
            raise ValueError(f"iterations is {iterations}; pass at least 1")
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"size is {tuple(size)}; pass three numbers of cells (d, h, w), e.g. (16, 28, 28)")
        self.clusters, self.fuzziness, self.p, self.q = clusters, fuzziness, p, q
        self.window, self.enlarge, self.iterations, self.tolerance = window, enlarge, iterations, tolerance
        self.size = tuple(int(s) for s in size)

    def __call__(self, volume: Tensor, boxes: Tensor) -> Tensor:
        """Masks of the masses in boxes.

        Args:
            volume: (D, H, W), brighter is denser, exactly 0 outside of the breast: such voxels do not count.
            boxes: (N, 6) half-open corners (d0, h0, w0, d1, h1, w1) in voxels; they may reach beyond the volume.

        Returns:
            (N, d, h, w) float32 in [0, 1] on the volume's device: the mask inside the boxes themselves, not the
            enlarged ones, interpolated trilinearly at the centres of ``size`` cells; 0.5 and more is mass. All 0 for a
            box with a side of less than a voxel or outside of the volume, and where less than two intensities are.

        Raises:
            ValueError: if a shape is wrong, or a box or a voxel near it is not finite.
        """
        if volume.ndim != 3:
            raise ValueError(f"the volume is {tuple(volume.shape)}; give one without channels, (D, H, W)")
        if boxes.ndim != 2 or boxes.shape[1] != 6:
            raise ValueError(f"the boxes are {tuple(boxes.shape)}; give (N, 6), both corners in (d, h, w) order")
        if not bool(torch.isfinite(boxes).all()):
            raise ValueError("a box has a corner that is not finite; drop such boxes first")
        masks = torch.zeros((len(boxes), *self.size), dtype=torch.float32)
        for mask, box in zip(masks, boxes.detach().double().cpu().numpy(), strict=True):
            self._fill(mask, volume.detach(), box)
        return masks.to(volume.device)

    def segment(self, region: NDArray[Any]) -> Mask:
        """The mass in one region, e.g. for a report.

        Args:
            region: (d, h, w) intensities around one mass, exactly 0 outside of the breast.

        Returns:
            (d, h, w) the mass; empty if the region has less than two different intensities.

        Raises:
            ValueError: if the region is not (d, h, w) or a voxel is not finite.
        """
        values, breast = _checked(region)
        sides = np.array(values.shape, dtype=np.float64)
        return self._mass(values, breast, sides / 2, sides)

    def fit(self, region: NDArray[Any]) -> tuple[Floats, Floats]:
        """Clusters of the intensities of one region.

        Args:
            region: (d, h, w), exactly 0 outside of the breast, with at least two different intensities inside.

        Returns:
            The centres v (K,) in the unit of the region, in the order of the quantiles that they started from, and the
            memberships u' (K, d, h, w), which add up to 1, or are 0 outside of the breast.

        Raises:
            ValueError: if the region is not (d, h, w), a voxel is not finite or all intensities are the same.
        """
        values, breast = _checked(region)
        if _is_constant(values[breast]):
            raise ValueError("the region has less than two different intensities; there is nothing to cluster")
        return self._clusters(values, breast)

    def _clusters(self, values: Floats, breast: Mask) -> tuple[Floats, Floats]:
        inside = values[breast]
        offset, scale = float(inside.min()), float(np.ptp(inside))
        values = np.where(breast, (values - offset) / scale, 0.0)  # outside of the breast all memberships are 0
        centres = _first_centres((inside - offset) / scale, self.clusters)
        voxels_around = self._around(breast.astype(np.float64))
        for _ in range(self.iterations):
            memberships = self._spatial(self._memberships(values, centres) * breast, voxels_around) * breast
            weights = memberships**self.fuzziness
            total = np.maximum(weights.sum(axis=(1, 2, 3)), np.finfo(float).tiny)
            before, centres = centres, (weights * values).sum(axis=(1, 2, 3)) / total
            if np.abs(centres - before).max() <= self.tolerance:
                break
        return centres * scale + offset, memberships

    def _memberships(self, values: Floats, centres: Floats) -> Floats:
        """Memberships u (K, d, h, w) by intensity alone."""
        squares = np.maximum((values - centres[:, None, None, None]) ** 2, SMALLEST_SQUARE)
        shares: Floats = squares.min(axis=0) / squares  # in (0, 1]: no power of it overflows, however small m - 1 is
        if self.fuzziness != 2:
            shares **= 1 / (self.fuzziness - 1)
        shares /= shares.sum(axis=0)
        return shares

    def _spatial(self, memberships: Floats, voxels_around: Floats) -> Floats:
        """Memberships u' (K, d, h, w) from u: the spatial function h favours what a voxel's neighbours belong to."""
        result = memberships if self.p == 1 else memberships**self.p
        if self.q > 0:
            around = np.empty_like(memberships)
            for i, membership in enumerate(memberships[:-1]):
                around[i] = self._around(membership)
            # All memberships of a voxel add up to 1: one filter less, half of the time with two clusters.
            around[-1] = np.maximum(voxels_around - around[:-1].sum(axis=0), 0)
            result = result * (around if self.q == 1 else around**self.q)
        total = result.sum(axis=0)
        return np.asarray(np.divide(result, total, out=np.zeros_like(result), where=total > 0))

    def _around(self, values: Floats) -> Floats:
        """Mean over the window, 0 beyond the region: the sum h but for a factor that all clusters share."""
        mean: Floats = ndimage.uniform_filter(values, self.window, mode="constant")
        return np.maximum(mean, 0)  # running sums end a little below 0

    def _mass(self, values: Floats, breast: Mask, centre: Floats, sides: Floats) -> Mask:
        """The component of the brightest cluster that is most about the centre of a box with such sides."""
        if _is_constant(values[breast]):
            return np.zeros(values.shape, dtype=bool)
        centres, memberships = self._clusters(values, breast)
        # Clusters that ended on the same intensity are one: there may be fewer intensities than clusters.
        bright = centres >= centres.max() - self.tolerance * np.ptp(values[breast])
        components, count = ndimage.label(bright[memberships.argmax(axis=0)] & breast)
        if count == 0:
            return np.zeros(values.shape, dtype=bool)
        core = tuple(
            slice(max(0, math.floor(c - s / 4)), max(0, math.ceil(c + s / 4)))
            for c, s in zip(centre, sides, strict=True)
        )
        voxels = np.bincount(components[core].ravel(), minlength=count + 1)[1:]
        if not voxels.any():
            voxels = np.bincount(components.ravel())[1:]
        return np.asarray(components == voxels.argmax() + 1)

    def _fill(self, mask: Tensor, volume: Tensor, box: Floats) -> None:
        """Write the mask of one box (6,) into zeros (d, h, w)."""
        low, high = box[:3], box[3:]
        sides, centre = high - low, (low + high) / 2
        if sides.min() < SHORTEST_SIDE:
            return
        half = sides * (1 + self.enlarge) / 2
        first = np.maximum(np.floor(centre - half), 0).astype(int)
        last = np.minimum(np.ceil(centre + half), volume.shape).astype(int)
        if (first >= last).any():
            return
        region = volume[tuple(slice(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True))]
        values, breast = _checked(region.double().cpu().numpy())
        mass = self._mass(values, breast, centre - first, sides)
        if mass.any():
            mask.copy_(_sampled(mass, low - first, sides, self.size))


def _checked(region: NDArray[Any]) -> tuple[Floats, Mask]:
    """Intensities as float64, and where the breast is."""
    values = np.asarray(region, dtype=np.float64)
    if values.ndim != 3:
        raise ValueError(f"the region is {values.shape}; give one without channels, (d, h, w)")
    if not np.isfinite(values).all():
        raise ValueError("a voxel of the region is not finite; set such voxels to 0, they then do not count")
    return values, values != 0


def _is_constant(inside: Floats) -> bool:
    return not inside.size or bool(inside.min() == inside.max())


def _first_centres(inside: Floats, clusters: int) -> Floats:
    """Centres to start from, of intensities in [0, 1]: quantiles, or evenly spaced where two of these coincide."""
    shares = (np.arange(clusters) + 0.5) / clusters
    centres: Floats = np.quantile(inside, shares)
    return centres if np.diff(centres).min() > SMALLEST_SQUARE else shares


def _sampled(mass: Mask, low: Floats, sides: Floats, size: Sequence[int]) -> Tensor:
    """A mask (d, h, w) at the centres of the cells of a box, trilinear; 0 at cells beyond it."""
    axes = [
        2 * (start + (torch.arange(cells) + 0.5) / cells * side) / length - 1
        for start, side, cells, length in zip(low.tolist(), sides.tolist(), size, mass.shape, strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)[None]
    image = torch.from_numpy(mass.astype(np.float32))[None, None]
    sampled = functional.grid_sample(image, grid, align_corners=False, padding_mode="border")[0, 0]
    return sampled * (grid[0].abs() <= 1).all(dim=-1)
