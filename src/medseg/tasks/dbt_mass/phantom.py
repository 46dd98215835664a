"""Breast phantoms for tomosynthesis: two compressed views of one breast with glands, ligaments and at most one mass.

Everything random about a breast is drawn in one step (:func:`draw_breast`) and recorded; :func:`tissue` and
:func:`make_view` are functions of what was drawn. Anatomy is in millimetres; a grid only samples it, except for the
texture, which is drawn anew for each grid.

Arrays are (D, H, W) = (slice, row, column), the chest wall at w = 0 and the nipple at high w; in MLO views the pectoral
muscle fills the corner at low h and low w. Positions are in mm: d from the middle slice, h and w from the outer edge of
voxel 0. This module loads fast, without torch: worker processes start from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from medseg.tasks.dbt_mass.acquisition import Acquisition, acquire
from medseg.tasks.dbt_mass.masses import Mass, draw_mass, render_mass
from medseg.tasks.dbt_mass.texture import power_law_field

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.uint8]
Point = tuple[float, float, float]

#: Linear attenuation in 1/cm at about 20 keV; a mass has that of glandular tissue times its contrast.
FAT, GLAND, MUSCLE = 0.456, 0.802, 0.80

#: Part of the breast that is glandular, for ACR density classes 1 to 4.
GLAND_SHARE = (0.12, 0.35, 0.60, 0.85)

SKIN_MM = 1.5

VIEWS = ("CC", "MLO")

__all__ = ["GLAND_SHARE", "VIEWS", "Anatomy", "Grid", "Population", "draw_breast", "make_view", "tissue"]


@dataclass(frozen=True)
class Grid:
    """Voxels of a view: ``shape`` (D, H, W) and ``spacing`` (d, h, w) in mm."""

    shape: tuple[int, int, int] = (32, 128, 96)
    spacing: Point = (2.0, 1.25, 1.25)

    def __post_init__(self) -> None:
        """Refuse grids in which no breast has room."""
        if len(self.shape) != 3 or min(self.shape) < 8:
            raise ValueError(f"shape is {self.shape}; give three sizes (D, H, W) of at least 8 voxels")
        if len(self.spacing) != 3 or not all(0 < s < np.inf for s in self.spacing):
            raise ValueError(f"spacing is {self.spacing}; give three positive numbers (d, h, w) in mm")
        if self.extent[0] < 25 or min(self.extent[1:]) < 40:
            raise ValueError(
                f"{self.shape} voxels of {self.spacing} mm are {tuple(round(e, 1) for e in self.extent)} mm; a breast "
                "needs at least 25 x 40 x 40 mm: take more or larger voxels"
            )

    @property
    def extent(self) -> Point:
        """Size (d, h, w) in mm."""
        d, h, w = (n * s for n, s in zip(self.shape, self.spacing, strict=True))
        return d, h, w

    def axes(self) -> tuple[Volume, Volume, Volume]:
        """Positions of the voxel centres in mm, shaped to broadcast; d from the middle, h and w from the edge."""
        d, h, w = ((np.arange(n) + 0.5) * s for n, s in zip(self.shape, self.spacing, strict=True))
        d, h, w = (a.astype(np.float32) for a in (d - self.extent[0] / 2, h, w))
        return d[:, None, None], h[:, None], w


@dataclass(frozen=True)
class Population:
    """What breasts and masses are drawn from.

    Attributes:
        conspicuity: smallest and largest attenuation of a mass as a multiple of glandular tissue. Physical values are
            about 1.03 to 1.10.
        densities: shares of ACR classes 1 to 4; they need not add up to 1.
        normal: share of breasts without a mass.
    """

    conspicuity: tuple[float, float] = (1.12, 1.30)
    densities: tuple[float, ...] = (10.0, 30.0, 40.0, 20.0)
    normal: float = 0.0

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if len(self.conspicuity) != 2 or not 1 <= self.conspicuity[0] <= self.conspicuity[1] <= 3:
            raise ValueError(f"conspicuity is {self.conspicuity}; give two rising numbers from 1 to 3, e.g. 1.12,1.30")
        if len(self.densities) != 4 or not all(0 <= s < np.inf for s in self.densities) or not sum(self.densities):
            raise ValueError(f"densities is {self.densities}; give the shares of ACR 1 to 4, e.g. 10,30,40,20")
        if not 0 <= self.normal <= 1:
            raise ValueError(f"normal is {self.normal}; it must be a share in [0, 1]")


@dataclass(frozen=True)
class ViewAnatomy:
    """One compressed view. All in mm; the outline is half an ellipse around (``middle``, 0)."""

    half_width: float  # along h
    depth: float  # chest wall to nipple, along w
    thickness: float  # along d
    middle: float  # h of the nipple
    muscle: tuple[float, float]  # reach of the pectoral muscle along h and w; 0, 0 in CC views
    mass_centre: Point | None
    mass_diameter: float
    mass_turn: float  # in the plane, radians
    seed: int

    @property
    def nipple_mm(self) -> float:
        """Distance in the plane from the nipple to the centre of the mass; 0 without a mass."""
        if self.mass_centre is None:
            return 0.0
        return float(np.hypot(self.mass_centre[1] - self.middle, self.mass_centre[2] - self.depth))


@dataclass(frozen=True)
class Anatomy:
    """Everything random about one breast."""

    age: int
    laterality: str  # "L" or "R"; the arrays have the chest wall at w = 0 for both
    density: int  # ACR class, 1 to 4
    mass: Mass | None
    views: dict[str, ViewAnatomy] = field(default_factory=dict)  # by "CC" and "MLO"


def draw_breast(
    seed: np.random.SeedSequence, grid: Grid | None = None, population: Population | None = None
) -> Anatomy:
    """Draw one breast: size, density, mass, and how it lies in both views.

    The breast fills most of the grid. Both views have the same mass, each +-5 % in size, so at most 10 % apart, and its
    distance from the nipple in the plane differs by at most 8 %. Diameters go up to what fits the breast: the paper's
    largest (140 mm) does not fit the reduced grid of 64 x 160 x 120 mm.

    Args:
        seed: of everything that is drawn.
        grid: its extent in mm is the room for the breast.
        population: densities, contrasts and share of normal breasts.
    """
    grid, population = grid or Grid(), population or Population()
    rng = np.random.default_rng(seed)
    age = int(np.clip(round(rng.normal(52, 13)), 18, 88))  # paper: 18 to 88, mean 52.3
    laterality = str(rng.choice(["L", "R"]))
    shares = np.asarray(population.densities) / sum(population.densities)
    density = 1 + int(rng.choice(4, p=shares))
    size = rng.uniform(0.82, 0.94), rng.uniform(0.78, 0.94), rng.uniform(0.74, 0.92)  # part of the grid: d, h, w
    thickness, width, depth = (s * e for s, e in zip(size, grid.extent, strict=True))
    drawn = draw_mass(rng, population.conspicuity, (0.8 * thickness, 0.8 * min(width / 2, depth)))
    mass = None if rng.uniform() < population.normal else drawn
    views: dict[str, ViewAnatomy] = {}
    wanted = None
    for name in VIEWS:
        outline = _draw_outline(rng, grid, name, (thickness, width, depth))
        view = _place_mass(rng, outline, mass, wanted)
        wanted = view.nipple_mm
        views[name] = view
    return Anatomy(age, laterality, density, mass, views)


def make_view(
    breast: Anatomy, view: str, grid: Grid | None = None, acquisition: Acquisition | None = None
) -> tuple[Volume, Mask]:
    """One reconstructed view and its truth.

    Args:
        breast: from :func:`draw_breast`.
        view: ``CC`` or ``MLO``.
        grid: voxels; the breast was drawn for its extent.
        acquisition: arc, noise and reconstruction.

    Returns:
        The reconstruction (D, H, W) in [0, 1], air 0; the 1st and 99th percentile inside the breast are 0.1 and 0.9.
        And the mask (D, H, W), 1 in the core of the mass (without its spicules) within the breast, else 0.
    """
    grid, acquisition = grid or Grid(), acquisition or Acquisition()
    attenuation, mask = tissue(breast, view, grid)
    rng = np.random.default_rng((breast.views[view].seed, 1))
    volume = acquire(attenuation, grid.spacing, acquisition, rng)
    low, high = np.percentile(volume[attenuation > 0.9 * FAT][:: 1 + attenuation.size // 10**6], (1, 99))
    volume -= low
    volume *= 0.8 / max(high - low, 1e-6)
    volume += 0.1
    return np.clip(volume, 0, 1, out=volume), mask


def tissue(breast: Anatomy, view: str, grid: Grid) -> tuple[Volume, Mask]:
    """One view before it is imaged.

    Args:
        breast: from :func:`draw_breast`.
        view: ``CC`` or ``MLO``.
        grid: voxels.

    Returns:
        Attenuation (D, H, W) in 1/cm, 0 in air; and the mask as in :func:`make_view`.

    Raises:
        ValueError: on an unknown view.
    """
    if view not in breast.views:
        raise ValueError(f"view is {view!r}; choose one of {', '.join(breast.views)}")
    shape = breast.views[view]
    rng = np.random.default_rng((shape.seed, 0))
    skin = tuple(max(SKIN_MM, s) for s in grid.spacing)
    inside, inner = _breast_region(shape, grid), _breast_region(shape, grid, skin)
    parenchyma = _parenchyma(rng, breast.density, shape, grid, inner > 0.5)
    volume = FAT + np.float32(GLAND - FAT) * parenchyma
    volume *= 1 + 0.06 * power_law_field(rng, grid.shape, grid.spacing, 2.5)
    if shape.muscle[0]:
        _, h, w = grid.axes()
        edge = 1 - h / shape.muscle[0] - w / shape.muscle[1]
        muscle = np.clip(0.5 + edge * np.float32(shape.muscle[1] / 3), 0, 1)  # 3 mm soft
        volume += muscle * (MUSCLE - volume) * np.float32(0.9)
    volume += (1 - inner) * (GLAND - volume)  # the skin
    mask = np.zeros(grid.shape, np.uint8)
    if breast.mass is not None and shape.mass_centre is not None:
        corner, amount, core = render_mass(
            breast.mass, shape.mass_centre, shape.mass_diameter, shape.mass_turn, grid.axes()
        )
        where = tuple(slice(c, c + n) for c, n in zip(corner, amount.shape, strict=True))
        value = np.float32(GLAND * breast.mass.contrast)
        volume[where] += amount * (value - volume[where])
        mask[where] = core & (inner[where] > 0.5)
    volume *= inside
    return volume, mask


def _draw_outline(rng: np.random.Generator, grid: Grid, name: str, size: Point) -> ViewAnatomy:
    """A view without its mass; ``size`` is thickness, width and depth of the breast in mm."""
    thickness, width, depth = size
    thickness *= rng.uniform(0.95, 1.0)
    half = width / 2 * rng.uniform(0.96, 1.0)
    _, extent, _ = grid.extent
    middle = extent / 2 + rng.uniform(-0.5, 0.5) * max(extent / 2 - half - 2 * grid.spacing[1], 0.0)
    muscle = (0.0, 0.0)
    if name == "MLO":
        muscle = float(rng.uniform(0.5, 0.8) * middle), float(rng.uniform(0.25, 0.42) * depth)
        muscle = (muscle[0] + middle - half, muscle[1])  # reckoned from the edge of the breast
    return ViewAnatomy(half, depth, thickness, middle, muscle, None, 0.0, 0.0, int(rng.integers(2**62)))


def _place_mass(
    rng: np.random.Generator, outline: ViewAnatomy, mass: Mass | None, nipple_mm: float | None
) -> ViewAnatomy:
    """Put the mass anywhere in the view, or ``nipple_mm`` +-8 % from the nipple."""
    count = 400
    angle, share, height = rng.uniform(-np.pi / 2, np.pi / 2, count), rng.uniform(size=count), float(rng.uniform(-1, 1))
    factor, turn = rng.uniform(0.95, 1.05), rng.uniform(0, np.pi)
    if mass is None:
        return outline
    diameter = mass.diameter * factor
    radius = diameter / 2
    margin = min(0.85 * radius + 2 * SKIN_MM, 0.45 * outline.depth)
    furthest = outline.depth - 0.6 * margin  # the centre stays so far from the chest wall
    nearest = min(margin, 0.9 * furthest)
    away = nearest + (furthest - nearest) * np.sqrt(share)
    if nipple_mm is not None:
        away = nipple_mm * (1 + 0.08 * (2 * share - 1))
    h, w = outline.middle + away * np.sin(angle), outline.depth - away * np.cos(angle)
    inner = ((h - outline.middle) / (outline.half_width - margin)) ** 2 + (w / (outline.depth - margin)) ** 2 < 1
    inner &= w > 0.6 * margin
    if outline.muscle[0]:
        inner &= h / outline.muscle[0] + w / outline.muscle[1] > 1.2
    found = np.flatnonzero(inner)
    # on the line from the nipple to the chest wall there is always room
    best = outline.middle, outline.depth - float(np.median(away))
    if len(found):
        best = float(h[found[0]]), float(w[found[0]])
    edge = np.hypot((best[0] - outline.middle) / outline.half_width, best[1] / outline.depth)
    room = 0.5 * outline.thickness * float(_profile(edge)) - SKIN_MM - radius * mass.ratios[0]
    centre = height * max(room, 0.0), best[0], best[1]
    return ViewAnatomy(**{**vars(outline), "mass_centre": centre, "mass_diameter": diameter, "mass_turn": turn})


def _profile(edge: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Thickness as a part of the largest, by the distance from the middle (0) to the edge (1): flat, then rounded."""
    result: npt.NDArray[np.float32] = np.sqrt(np.clip(1 - np.asarray(edge, np.float32) ** 5, 0, None))
    return result


def _breast_region(view: ViewAnatomy, grid: Grid, shrink: Sequence[float] = (0, 0, 0)) -> Volume:
    """How much of each voxel's height is breast, 0 to 1 (hard steps from slice to slice would show as rings).

    ``shrink`` takes off so many mm (d, h, w) from the surface, not from the chest wall.
    """
    d, h, w = grid.axes()
    edge = np.hypot((h - view.middle) / (view.half_width - shrink[1]), w / (view.depth - shrink[2]))
    height = (view.thickness / 2 - shrink[0]) * _profile(edge)
    region: Volume = np.clip((height - np.abs(d)) / np.float32(grid.spacing[0]) + 0.5, 0, 1)
    region *= edge < 1
    return region


def _parenchyma(
    rng: np.random.Generator, density: int, view: ViewAnatomy, grid: Grid, inner: npt.NDArray[np.bool_]
) -> Volume:
    """Glands and ligaments, 0 (fat) to 1: a soft threshold of power-law noise, denser behind the nipple."""
    d, h, w = grid.axes()
    cloud = power_law_field(rng, grid.shape, grid.spacing, 3.0)
    cloud -= (d / (view.thickness / 2)) ** 2 * np.float32(0.5)
    cloud -= ((h - view.middle) / view.half_width) ** 2 + 1.5 * ((w - 0.45 * view.depth) / view.depth) ** 2
    where = inner.copy()
    if view.muscle[0]:
        where &= h / view.muscle[0] + w / view.muscle[1] > 1
    values = cloud[where]
    level = np.quantile(values[:: 1 + values.size // 10**6], 1 - GLAND_SHARE[density - 1])
    glands: Volume = 1 / (1 + np.exp(np.clip((level - cloud) / 0.12, -30, 30)))
    # Level sets of a smooth field are sheets, about 1 mm thick and 30 mm apart; those of a rough one would be dust.
    sheets = np.sin(3 * power_law_field(rng, grid.shape, grid.spacing, 4.5))
    ligaments = np.float32(0.9) * np.exp(-((sheets / 0.1) ** 2))
    np.maximum(glands, ligaments, out=glands)
    return glands
