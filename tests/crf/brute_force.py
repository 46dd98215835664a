"""Mean-field over all pairs of voxels in float64: the oracle of the CRF tests. O(N^2) memory, for tiny volumes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def kernel(positions: Array, sigma: float, intensities: Array | None = None, intensity_sigma: float = 1.0) -> Array:
    """(N, N), self included."""
    distance = ((positions[:, None] - positions[None]) ** 2).sum(-1) / (2 * sigma**2)
    if intensities is not None:
        distance = distance + (intensities[:, None] - intensities[None]) ** 2 / (2 * intensity_sigma**2)
    return np.exp(-distance)


def normalized(matrix: Array, normalization: str) -> Array:
    if normalization == "self":
        return matrix
    if normalization == "none":
        return matrix - np.diag(np.diag(matrix))
    rows = matrix.sum(1)
    return matrix / np.sqrt(rows[:, None] * rows[None])


def mean_field(
    probabilities: Array,
    image: Array,
    values: dict[str, float],
    iterations: int,
    normalization: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    floor: float = 1e-4,
) -> Array:
    """Marginals (L, D, H, W) from probabilities (L, D, H, W) and an image (D, H, W)."""
    labels, *shape = probabilities.shape
    grid = np.stack(np.meshgrid(*(s * np.arange(n) for n, s in zip(shape, spacing, strict=True)), indexing="ij"), -1)
    positions = grid.reshape(-1, 3).astype(np.float64)
    smooth = kernel(positions, values["smoothness_sigma"])
    similar = kernel(positions, values["appearance_sigma"], image.ravel().astype(float), values["intensity_sigma"])
    pairs = values["smoothness_weight"] * normalized(smooth, normalization)
    pairs += values["appearance_weight"] * normalized(similar, normalization)
    unary = np.log(np.maximum(probabilities.reshape(labels, -1).astype(np.float64), floor))
    q = softmax(unary)
    for _ in range(iterations):
        q = softmax(unary + q @ pairs)
    return q.reshape(probabilities.shape)


def softmax(scores: Array) -> Array:
    powers = np.exp(scores - scores.max(0))
    return powers / powers.sum(0)
