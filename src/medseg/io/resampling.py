"""Volumes at another voxel size, slice by slice, so that a whole native view never has to be in memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["resample_slices", "resampled_affine", "resampling_matrix"]


def resampling_matrix(size: int, old: float, new: float) -> tuple[Any, int]:
    """Weights that take one axis from one spacing to another.

    Coarser: each new voxel is the mean of what it covers, with exact shares of the voxels at its ends (a box filter; it
    keeps means). Finer: linear between voxel centres, constant beyond the outermost ones. The edge of voxel 0 stays
    where it is; the other end moves by less than half a new voxel, because the new size is a whole number.

    Args:
        size: voxels along the axis.
        old: their spacing in mm.
        new: the wanted spacing in mm.

    Returns:
        A sparse CSR matrix (new_size, size) in float32 whose rows sum to 1, and ``new_size``.

    Raises:
        ValueError: if a size or spacing is not positive.
    """
    from scipy.sparse import coo_matrix

    if size < 1 or not (0 < old < np.inf and 0 < new < np.inf):
        raise ValueError(f"cannot resample {size} voxels from {old} to {new} mm; all three must be positive")
    ratio = new / old
    if abs(ratio - 1) < 1e-6:
        ratio = 1.0
    new_size = max(1, int(np.floor(size / ratio + 0.5)))
    if ratio >= 1:
        starts = np.minimum(np.arange(new_size) * ratio, size - 1e-9)
        ends = np.minimum((np.arange(new_size) + 1) * ratio, size)
        first = np.floor(starts + 1e-9).astype(int)
        columns = first[:, None] + np.arange(int(np.ceil(ratio)) + 1)
        shares = np.minimum(columns + 1, ends[:, None]) - np.maximum(columns, starts[:, None])
    else:
        centres = np.clip((np.arange(new_size) + 0.5) * ratio - 0.5, 0, size - 1)
        first = np.minimum(centres.astype(int), max(size - 2, 0))
        columns = first[:, None] + np.arange(2)
        shares = np.stack([1 - (centres - first), centres - first], axis=1)
    used = (shares > 1e-9) & (columns < size)
    shares = np.where(used, shares, 0.0)
    shares /= shares.sum(axis=1, keepdims=True)
    rows = np.broadcast_to(np.arange(new_size)[:, None], columns.shape)
    matrix = coo_matrix((shares[used].astype(np.float32), (rows[used], columns[used])), shape=(new_size, size))
    return matrix.tocsr(), new_size


def resample_slices(
    slices: Iterable[npt.NDArray[Any]],
    shape: tuple[int, int, int],
    old: tuple[float, float, float],
    new: tuple[float, float, float],
) -> npt.NDArray[np.float32]:
    """Resample a volume that comes slice by slice; only one slice and the result are held.

    Args:
        slices: the D slices (H, W) in order.
        shape: (D, H, W).
        old: spacing (d, h, w) in mm.
        new: wanted spacing (d, h, w) in mm.

    Returns:
        float32 (D', H', W'), by :func:`resampling_matrix` along each axis.
    """
    (depth, _), (rows, _), (columns, _) = [resampling_matrix(n, o, s) for n, o, s in zip(shape, old, new, strict=True)]
    volume = np.zeros((depth.shape[0], rows.shape[0], columns.shape[0]), np.float32)
    same = [m.shape[0] == m.shape[1] and m.nnz == m.shape[0] for m in (rows, columns)]
    by_slice = depth.tocsc()
    for k, image in enumerate(slices):
        image = image.astype(np.float32, copy=False)
        image = image if same[0] else rows @ image
        image = image if same[1] else (columns @ image.T).T  # SciPy multiplies sparse matrices from the left only
        for j in range(by_slice.indptr[k], by_slice.indptr[k + 1]):
            volume[by_slice.indices[j]] += by_slice.data[j] * image
    return volume


def resampled_affine(
    affine: npt.NDArray[np.float64], old: tuple[float, float, float], new: tuple[float, float, float]
) -> npt.NDArray[np.float64]:
    """The affine of the resampled volume: the outer corner of voxel 0 (index -0.5 on all axes) stays where it is."""
    changed = np.array(affine, np.float64)
    factors = np.asarray(new, float) / np.asarray(old, float)
    changed[:3, :3] *= factors
    corner = affine[:3, :3] @ np.full(3, -0.5) + affine[:3, 3]
    changed[:3, 3] = corner + changed[:3, :3] @ np.full(3, 0.5)
    return changed
