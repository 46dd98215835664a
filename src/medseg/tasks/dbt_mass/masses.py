"""Masses of the paper's three types: round or oval, spiculated, irregular.

A mass is a star-shaped core, an ellipsoid whose radius is modulated by power-law noise over the direction, and for
spiculated ones thin tapering lines that leave it. The core alone is the truth: a reader's outline stops where the body
of the mass ends, and boxes around spicules would depend on their thinnest ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import fft, ndimage

Volume = npt.NDArray[np.float32]

#: Mass types with their share, the share of benign ones among them, and the standard deviation of the radius over the
#: direction (the radius is 1). Shares as in the paper's Table 1; benign ones are 21 % in all, as there.
KINDS = {
    "round/oval": (123, 0.50, 0.05),
    "spiculated": (113, 0.03, 0.12),
    "irregular": (128, 0.10, 0.22),
}

#: Longest diameter in mm: smallest, median and largest that is drawn.
DIAMETERS = (10.0, 28.0, 55.0)

__all__ = ["DIAMETERS", "KINDS", "Mass", "draw_mass", "render_mass"]


@dataclass(frozen=True)
class Mass:
    """Everything random about a mass, alike in both views."""

    kind: str  # one of KINDS
    histology: str  # "benign" or "malignant"
    contrast: float  # attenuation as a multiple of that of glandular tissue
    diameter: float  # longest, mm
    ratios: tuple[float, float, float]  # of the axes (d, h, w), the largest 1, before the modulation
    seed: int


def draw_mass(rng: np.random.Generator, conspicuity: tuple[float, float], room: tuple[float, float]) -> Mass:
    """Draw type, histology, size and contrast of a mass.

    Args:
        rng: draws it.
        conspicuity: smallest and largest contrast.
        room: largest size in mm through the slices and in the plane.
    """
    kinds = list(KINDS)
    shares = np.array([KINDS[k][0] for k in kinds], np.float64)
    kind = kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))]
    histology = "benign" if rng.uniform() < KINDS[kind][1] else "malignant"
    ratios = float(rng.uniform(0.65, 0.95)), 1.0, float(rng.uniform(0.65, 0.95))
    smallest, median, largest = DIAMETERS
    fitting = min(largest, room[0] / ratios[0], room[1])
    diameter = float(np.clip(rng.lognormal(np.log(median), 0.4), min(smallest, fitting), fitting))
    return Mass(kind, histology, float(rng.uniform(*conspicuity)), diameter, ratios, int(rng.integers(2**62)))


def render_mass(
    mass: Mass,
    centre: tuple[float, float, float],
    diameter: float,
    turn: float,
    axes: Sequence[Volume],
) -> tuple[tuple[int, int, int], Volume, npt.NDArray[np.bool_]]:
    """Sample a mass on a grid.

    Args:
        mass: its shape.
        centre: (d, h, w) in mm.
        diameter: longest diameter in mm through the centre.
        turn: angle in the plane, in radians.
        axes: positions of the grid's voxels in mm along d, h and w, each of them rising evenly.

    Returns:
        The index (d, h, w) of the first voxel of the part of the grid that the mass can reach, how much of each voxel
        there is mass (0 to 1, soft by a voxel, with spicules), and where the core is.
    """
    reach = diameter  # spicules end at 0.95 of it
    lines = [np.ravel(a) for a in axes]
    bounds = [np.searchsorted(a, (c - reach, c + reach)) for a, c in zip(lines, centre, strict=True)]
    d, h, w = (a[low:high] - np.float32(c) for a, (low, high), c in zip(lines, bounds, centre, strict=True))
    voxel = float(min(np.diff(a[:2])[0] for a in lines))
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    away = np.stack(
        np.broadcast_arrays(d[:, None, None], cos * h[:, None] + sin * w, cos * w - sin * h[:, None])
    )  # (3, d, h, w), mm along the axes of the mass
    rng = np.random.default_rng(mass.seed)
    radius = _radius_field(rng, KINDS[mass.kind][2])
    scale = _longest(radius, mass.ratios) / diameter
    scaled = away * (np.float32(scale) / np.array(mass.ratios, np.float32)[:, None, None, None])
    distance = np.sqrt((scaled**2).sum(axis=0)) + np.float32(1e-6)
    depth = (radius(scaled / distance) - distance) / np.float32(scale)  # about mm below the surface
    amount = 1 / (1 + np.exp(np.clip(-depth / (0.35 * voxel), -30, 30)))
    if mass.kind == "spiculated":
        amount = np.maximum(amount, np.float32(0.9) * _spicules(rng, away, diameter / 2, voxel))
    corner = tuple(int(low) for low, _ in bounds)
    return (corner[0], corner[1], corner[2]), amount, depth > 0


class _Radius:
    """Radius of a core over the direction, about 1: the values of a random cube on a sphere in it."""

    def __init__(self, cube: Volume, amplitude: float) -> None:
        self.cube, self.amplitude = cube, amplitude
        values = self._read(_directions())
        self.mean, self.spread = values.mean(), values.std()

    def __call__(self, directions: Volume) -> Volume:
        """Radius for unit vectors (3, ...)."""
        values = (self._read(directions) - self.mean) / self.spread
        result: Volume = np.clip(1 + self.amplitude * values, 0.4, 1.8).astype(np.float32)
        return result

    def _read(self, directions: Volume) -> Volume:
        middle = (self.cube.shape[0] - 1) / 2
        result: Volume = ndimage.map_coordinates(self.cube, middle * (1 + 0.35 * directions), order=1)
        return result


def _radius_field(rng: np.random.Generator, amplitude: float) -> _Radius:
    """Noise with power k^-3.2 in a cube of 32 voxels."""
    side = 32
    squares = sum(np.square(k) for k in np.meshgrid(*[fft.fftfreq(side)] * 3, indexing="ij"))
    squares.flat[0] = np.inf
    spectrum = fft.fftn(rng.standard_normal((side,) * 3)) * squares**-0.8
    return _Radius(fft.ifftn(spectrum).real.astype(np.float32), amplitude)


def _longest(radius: _Radius, ratios: Sequence[float]) -> float:
    """Longest chord through the centre, with semi-axes ``ratios``."""
    directions = _directions()
    chords = (radius(directions) + radius(-directions)) * np.linalg.norm(directions * np.array(ratios)[:, None], axis=0)
    return float(chords.max())


def _spicules(rng: np.random.Generator, away: Volume, semi: float, voxel: float) -> Volume:
    """12 to 24 straight lines, mostly in the plane, from the middle to 1.2 to 1.9 radii, tapering to a third."""
    result = np.zeros(away.shape[1:], np.float32)
    squares = (away**2).sum(axis=0)
    thick = max(0.08 * semi, 1.2, 0.8 * voxel)  # radius at the middle, mm
    for _ in range(int(rng.integers(12, 25))):
        direction = rng.standard_normal(3) * (0.3, 1, 1)
        direction = (direction / np.linalg.norm(direction)).astype(np.float32)
        length = semi * rng.uniform(1.2, 1.9)
        along = np.tensordot(direction, away, 1)
        across = np.sqrt(np.maximum(squares - along**2, 0))
        inside = np.clip((thick * (1 - along / np.float32(1.5 * length)) - across) / voxel + 0.5, 0, 1)
        inside *= (along > 0) & (along < length)
        np.maximum(result, inside, out=result)
    return result


def _directions(count: int = 400) -> Volume:
    """Unit vectors (3, N), spread evenly (a Fibonacci lattice)."""
    i = np.arange(count) + 0.5
    cos, turn = 1 - 2 * i / count, np.pi * (1 + np.sqrt(5)) * i
    sin = np.sqrt(1 - cos**2)
    return np.stack([cos, sin * np.cos(turn), sin * np.sin(turn)]).astype(np.float32)
