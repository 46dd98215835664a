"""The synthetic catalogue: 22 complexes that need no file, the same on every machine.

Each is a symmetric assembly of random globular chains. A chain is a confined walk of beads of 1 kDa through one to four
globular domains; its copies under the point group are moved together until they touch. So classes differ in real 3D
structure: shape, number and arrangement of subunits, holes.

Masses lie between 250 kDa and 4 MDa, and each chain has at least 12 kDa (an icosahedral shell of lighter chains is
invisible at 10 Angstrom per voxel). The first 14 classes are the training classes, the last 8 the unseen ones; masses
and symmetries are interleaved, and several classes of one side have the same mass, so that size alone does not tell
them apart.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count as count_up
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from medseg.tasks.cryoet_one_shot.complexes import Complex

Array = npt.NDArray[np.floating[Any]]

BEAD = 1000.0  # Da
BOND = 10.0  # Angstrom between neighbours in a chain
CLASH = 8.0  # beads of the same chain are not closer, in Angstrom
CONTACT = 9.0  # nor beads of two chains
CHAINS = 200  # tries
PLACEMENTS = 12  # of which the most compact is kept: real interfaces are broad
LARGEST_REACH = 138.0  # Angstrom: with the envelope it fits a box of 32 voxels of 10 Angstrom

#: Point group, mass in kDa, domains per chain. The order is the order of the classes.
CLASSES: tuple[tuple[str, int, int], ...] = (
    ("C1", 260, 3), ("D2", 340, 1), ("C3", 340, 2), ("C6", 520, 1), ("D3", 520, 2), ("C2", 640, 3), ("T", 900, 2),
    ("C7", 900, 2), ("O", 900, 1), ("C1", 1250, 4), ("D5", 1500, 2), ("D7", 1500, 1), ("O", 2000, 2), ("I", 3600, 1),
    ("C2", 290, 2), ("C5", 420, 1), ("D4", 420, 1), ("C8", 760, 2), ("C4", 760, 3), ("T", 1200, 1), ("D6", 1200, 2),
    ("I", 2600, 1),
)  # fmt: skip

__all__ = ["CLASSES", "catalogue", "synthetic_complex"]


@lru_cache(maxsize=1)
def catalogue() -> tuple[Complex, ...]:
    """The 22 synthetic complexes, training classes first."""
    return tuple(synthetic_complex(*entry, seed=number) for number, entry in enumerate(CLASSES))


def synthetic_complex(symmetry: str, mass_kda: int, domains: int, seed: int) -> Complex:
    """Build one complex: a random chain, and its copies under the point group in contact with each other.

    Args:
        symmetry: ``C1`` to ``C8``, ``D2`` to ``D7``, ``T``, ``O`` or ``I``.
        mass_kda: mass of the whole in kDa; rounded so that every chain has a whole number of beads.
        domains: globular domains of each chain.
        seed: together with the other arguments it decides everything.

    Returns:
        The complex, with the main symmetry axis along z.

    Raises:
        ValueError: if the chains do not fit together within the largest reach; ask for less mass or fewer domains.
    """
    rng = np.random.default_rng([seed, mass_kda, domains, *symmetry.encode()])
    group = Rotation.create_group(symmetry).as_matrix()
    beads = max(round(mass_kda * 1000 / BEAD / len(group)), 12)
    for _ in range(CHAINS):
        chain = _chain(beads, domains, rng)
        found = [_assemble(chain, group, rng) for _ in range(PLACEMENTS)] if len(group) > 1 else [chain]
        fitting = [p - p.mean(axis=0) for p in found if p is not None]
        fitting = [p for p in fitting if np.linalg.norm(p, axis=1).max() <= LARGEST_REACH and _is_connected(p)]
        if fitting:
            points = min(fitting, key=lambda p: float((p**2).sum()))
            name = f"{symmetry.lower()}_{mass_kda}kda"
            return Complex(name, points, np.full(len(points), BEAD), symmetry, "synthetic")
    raise ValueError(
        f"{len(group)} chains of {beads} kDa with {domains} domains do not fit {symmetry} within {LARGEST_REACH} "
        "Angstrom; lower the mass or the number of domains"
    )


def _chain(beads: int, domains: int, rng: np.random.Generator) -> Array:
    """A chain (beads, 3) in Angstrom through ``domains`` globules, each touching an earlier one; centred."""
    sizes = [len(part) for part in np.array_split(np.arange(beads), domains)]
    # compact radius 0.66 A M^(1/3) of a globule of M Da, with 10 % of room to walk in
    radii = [1.1 * 0.66 * (n * BEAD) ** (1 / 3) for n in sizes]
    centres = [np.zeros(3)]
    for i in range(1, domains):
        base = int(rng.integers(i))
        centres.append(centres[base] + 0.95 * (radii[base] + radii[i]) * _direction(rng))
    chain: Array = np.zeros((0, 3))
    for size, radius, centre in zip(sizes, radii, centres, strict=True):
        chain = _walk(chain, size, centre, radius, rng)
    centred: Array = chain - chain.mean(axis=0)
    return centred


def _walk(chain: Array, steps: int, centre: Array, radius: float, rng: np.random.Generator) -> Array:
    """Lengthen a chain by ``steps`` beads within a ball; where it is stuck, it goes on from an earlier bead."""
    built: Array = np.vstack([chain, np.zeros((steps, 3))])
    count = len(chain)
    built[count] = centre if not count else centre + 0.5 * radius * _direction(rng)
    count += 1
    origin = count - 1
    for attempt in count_up():
        if count == len(built):
            break
        turn = rng.standard_normal((24, 3))
        tries = built[origin] + BOND * turn / np.linalg.norm(turn, axis=1, keepdims=True)
        tries = tries[np.linalg.norm(tries - centre, axis=1) <= radius]
        free = tries[((tries[:, None] - built[:count]) ** 2).sum(axis=2).min(axis=1) >= CLASH**2]
        if len(free):
            built[count] = free[0]
            origin = count
            count += 1
        else:
            origin = int(rng.integers(len(chain), count))
            radius *= 1.05 if attempt % 50 == 49 else 1.0  # the ball may be full
    return built


def _assemble(chain: Array, group: Array, rng: np.random.Generator) -> Array | None:
    """Copies of a chain under a point group, moved inwards along a random direction until two copies touch.

    ``None`` where they touch already at the largest reach.
    """
    turned = chain @ Rotation.from_quat(rng.standard_normal(4)).as_matrix().T
    outwards = _direction(rng)
    if np.allclose(group[:, 2, 2], 1):
        outwards[2] = 0  # cyclic: moving along the axis changes nothing
    outwards /= np.linalg.norm(outwards)
    distance = LARGEST_REACH - float((turned @ outwards).max())
    if _touch(turned + distance * outwards, group):
        return None
    for step in (8, 2):
        while distance > 0 and not _touch(turned + (distance - step) * outwards, group):
            distance -= step
    placed = turned + distance * outwards
    return np.concatenate([placed @ operation.T for operation in group])


def _touch(chain: Array, group: Array) -> bool:
    """Whether a bead of the chain lies within ``CONTACT`` of a bead of another copy."""
    identity = np.array([np.allclose(operation, np.eye(3)) for operation in group])
    others = np.concatenate([chain @ operation.T for operation in group[~identity]])
    gaps = cKDTree(chain).query(others, distance_upper_bound=CONTACT)[0]
    return bool(np.isfinite(gaps).any())


def _is_connected(points: Array) -> bool:
    """Whether every bead is reached from every other by steps of at most 1.5 bonds."""
    from scipy.sparse.csgraph import connected_components

    near = cKDTree(points).sparse_distance_matrix(cKDTree(points), 1.5 * BOND)
    return int(connected_components(near)[0]) == 1


def _direction(rng: np.random.Generator) -> Array:
    vector = rng.standard_normal(3)
    unit: Array = vector / np.linalg.norm(vector)
    return unit
