"""One subtomogram: a complex in a random pose among neighbours, imaged by a tilt series.

Everything random is drawn in one step (:func:`draw_scene`); :func:`render` is a function of what was drawn. This module
loads fast, without torch: worker processes start from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.spatial.transform import Rotation

from medseg.tasks.cryoet_one_shot.complexes import Complex, density, envelope
from medseg.tasks.cryoet_one_shot.optics import contrast_transfer, detector_transfer
from medseg.tasks.cryoet_one_shot.tomography import (
    add_noise,
    filter_images,
    grid_size,
    project,
    reconstruct,
    tilt_angles,
    wedge_filter,
)

Volume = npt.NDArray[np.float32]
Mask = npt.NDArray[np.int8]

METHODS = ("tilt_series", "analytic")
CTF = ("flipped", "raw", "none")

__all__ = ["Physics", "Scene", "check_physics", "draw_scene", "normalise", "render"]


@dataclass(frozen=True)
class Physics:
    """How a subtomogram is made; see :func:`simulate` for each."""

    size: int = 32
    voxel_size: float = 10.0
    resolution: float = 30.0
    neighbours: int = 3
    method: str = "tilt_series"
    max_tilt: float = 60.0
    tilt_step: float = 3.0
    ctf: str = "flipped"
    defocus: float = 5.0
    defocus_range: float = 0.5
    voltage: float = 300.0
    spherical_aberration: float = 2.7
    amplitude_contrast: float = 0.07
    mtf: bool = True

    @property
    def box(self) -> int:
        """Side in voxels of the box that is imaged before the middle is cut out."""
        return 2 * int(np.ceil(0.75 * self.size))


@dataclass(frozen=True)
class Scene:
    """Everything random about one subtomogram."""

    rotation: npt.NDArray[np.float64]  # (3, 3), acts on x, y, z
    neighbours: tuple[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]], ...]  # complex, rotation, x y z (A)
    defocus: float  # micrometres
    noise_seed: int


def draw_scene(
    complexes: Sequence[Complex], number: int, pool: Sequence[int], seed: np.random.SeedSequence, physics: Physics
) -> Scene:
    """Draw pose, neighbours and defocus of one subtomogram.

    Rotations are uniform. A neighbour lies in a uniform direction, its bounding sphere 0 to 30 Angstrom from that of
    the complex in the middle, clear of the other neighbours; one that finds no room in 8 tries is left out.

    Args:
        complexes: all classes.
        number: index of the one in the middle.
        pool: indices that neighbours are drawn from.
        seed: of everything that is drawn.
        physics: number of neighbours and range of the defocus.
    """
    rng = np.random.default_rng(seed)
    rotation = _rotation(rng)
    defocus = physics.defocus + physics.defocus_range * rng.uniform(-1, 1)
    noise_seed = int(rng.integers(2**63))
    placed: list[tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []
    for _ in range(int(rng.integers(1, physics.neighbours + 1)) if physics.neighbours else 0):
        other, turn, gap = pool[int(rng.integers(len(pool)))], _rotation(rng), rng.uniform(0, 30)
        directions = rng.standard_normal((8, 3))
        reach = complexes[other].reach
        distance = complexes[number].reach + reach + gap
        for place in distance * directions / np.linalg.norm(directions, axis=1, keepdims=True):
            if all(np.linalg.norm(place - p) > reach + complexes[n].reach for n, _, p in placed):
                placed.append((other, turn, place))
                break
    return Scene(rotation, tuple(placed), defocus, noise_seed)


def render(
    complexes: Sequence[Complex], number: int, scene: Scene, physics: Physics, snrs: Sequence[float] = (np.inf,)
) -> tuple[list[Volume], Mask]:
    """Image one scene at several noise levels.

    Args:
        complexes: all classes.
        number: index of the one in the middle.
        scene: its pose and surroundings.
        physics: how it is imaged.
        snrs: signal-to-noise ratios; the noise has the same pattern in all of them.

    Returns:
        A volume (D, D, D) for each SNR, mean 0 and standard deviation 1, protein bright; and the mask (D, D, D), 0 or
        1, of the complex in the middle without its neighbours.
    """
    size, voxel = physics.size, physics.voxel_size
    middle = complexes[number]
    points = _turn(middle.points, scene.rotation)
    # at least 3 voxels, so that the outline is smooth
    alone = density(points, middle.masses, (size,) * 3, voxel, max(physics.resolution, 3 * voxel))
    mask = envelope(alone, 1000 * middle.mass_kda, voxel)
    others = [(_turn(complexes[n].points, turn) + place, complexes[n].masses) for n, turn, place in scene.neighbours]
    crowd, masses = (np.concatenate(parts) for parts in zip((points, middle.masses), *others, strict=True))
    volume = density(crowd, masses, (physics.box,) * 3, voxel, physics.resolution)
    if physics.method == "analytic":
        spectrum = fft.rfftn(volume) * wedge_filter(volume.shape, physics.max_tilt, physics.mtf)
        imaged = [fft.irfftn(spectrum, volume.shape)]
    else:
        imaged = list(_tilt_series(volume, scene, physics, snrs))
    low = (physics.box - size) // 2
    inner = slice(low, low + size)
    return [normalise(v[inner, inner, inner]) for v in imaged], mask


def _tilt_series(volume: Volume, scene: Scene, physics: Physics, snrs: Sequence[float]) -> Iterator[Volume]:
    angles = tilt_angles(physics.max_tilt, physics.tilt_step)
    images = project(volume, angles)
    images = filter_images(images, _transfer(physics, scene.defocus))
    for snr in snrs:
        noisy = add_noise(images, snr, np.random.default_rng(scene.noise_seed), physics.size)
        yield reconstruct(noisy, angles, physics.box)


def _transfer(physics: Physics, defocus: float) -> npt.NDArray[np.float32]:
    """CTF times MTF, (H, G // 2 + 1) on the grid of ``rfft2`` of the tilt images.

    One defocus serves all tilts: within a box of 300 Angstrom it changes by 0.03 micrometres.
    """
    cycles = np.hypot(fft.fftfreq(physics.box)[:, None], fft.rfftfreq(grid_size(physics.box))[None, :])
    transfer = np.ones_like(cycles)
    if physics.ctf != "none":
        transfer = contrast_transfer(
            cycles / physics.voxel_size,
            defocus,
            physics.voltage,
            physics.spherical_aberration,
            physics.amplitude_contrast,
        )
        transfer = np.abs(transfer) if physics.ctf == "flipped" else transfer
    if physics.mtf:
        transfer = transfer * detector_transfer(2 * cycles)
    result: npt.NDArray[np.float32] = transfer.astype(np.float32)
    return result


def check_physics(physics: Physics) -> None:
    """Refuse settings out of range.

    Raises:
        ValueError: with the name of the setting and what it may be.
    """
    if physics.method not in METHODS or physics.ctf not in CTF:
        raise ValueError(
            f"method {physics.method!r}, ctf {physics.ctf!r}: choose method from {', '.join(METHODS)} and ctf from "
            f"{', '.join(CTF)}"
        )
    if physics.size < 16 or physics.size % 2:
        raise ValueError(f"size is {physics.size}; it must be even and at least 16 voxels")
    for name in ("voxel_size", "resolution", "defocus", "voltage"):
        if not 0 < getattr(physics, name) < np.inf:
            raise ValueError(f"{name} is {getattr(physics, name)}; it must be a positive number")
    for name in ("neighbours", "defocus_range", "spherical_aberration"):
        if not 0 <= getattr(physics, name) < np.inf:
            raise ValueError(f"{name} is {getattr(physics, name)}; it must not be negative")
    if not 0 <= physics.amplitude_contrast <= 1:
        raise ValueError(f"amplitude_contrast is {physics.amplitude_contrast}; it must lie in [0, 1]")
    tilt_angles(physics.max_tilt, physics.tilt_step)


def _rotation(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """A uniform rotation (3, 3): a normal quaternion has a uniform direction."""
    matrix: npt.NDArray[np.float64] = Rotation.from_quat(rng.standard_normal(4)).as_matrix()
    return matrix


def _turn(points: npt.NDArray[Any], rotation: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # not a BLAS product: its rounding may depend on the number of threads
    turned: npt.NDArray[np.float64] = np.einsum("nj,ij->ni", points, rotation, optimize=False)
    return turned


def normalise(volume: Volume) -> Volume:
    """Shift and scale to mean 0 and standard deviation 1."""
    centred = volume.astype(np.float64) - volume.mean(dtype=np.float64)
    result: Volume = (centred / centred.std()).astype(np.float32)
    return result
