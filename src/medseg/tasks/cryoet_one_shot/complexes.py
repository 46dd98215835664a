"""Macromolecular complexes as weighted points, and the density and envelope that they have in a box.

A complex comes from an atomic model (PDB or mmCIF, read by gemmi, biological assembly 1) or from the synthetic
catalogue (:mod:`medseg.tasks.cryoet_one_shot.catalogue`). Rotations act on the coordinates, before the density is made:
no density is ever interpolated.

Coordinates are in the order x, y, z and in Angstrom, with the centre of mass at 0. Arrays are in the order z, y, x;
coordinate 0 lies at voxel ``n // 2`` of every axis, the centre of the FFT.
"""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import fft

from medseg.io.files import write_atomically

if TYPE_CHECKING:
    import gemmi

Array = npt.NDArray[np.floating[Any]]

#: Volume of protein in cubic Angstrom per Dalton, and how much larger its envelope is at low resolution.
PROTEIN_VOLUME = 1.21
ENVELOPE_FACTOR = 1.6

#: Endings of the files that hold atomic models; each may be followed by ``.gz``.
MODEL_ENDINGS = (".pdb", ".ent", ".cif", ".mmcif")

#: The wwPDB archive: mmCIF files by the two middle characters of the identifier.
ARCHIVE = "https://files.wwpdb.org/pub/pdb/data/structures/divided/mmCIF"

__all__ = ["Complex", "density", "download_models", "envelope", "read_complex", "read_folder", "splat"]


@dataclass(frozen=True)
class Complex:
    """A complex as points with masses.

    Attributes:
        name: class name; part of file names.
        points: (n, 3) x, y, z in Angstrom, centre of mass at 0.
        masses: (n,) Da.
        symmetry: point group (``C1`` to ``I``), or what the file says about the oligomer.
        source: ``synthetic`` or the name of the file.
    """

    name: str
    points: Array
    masses: Array
    symmetry: str = ""
    source: str = ""

    @property
    def mass_kda(self) -> float:
        """Mass in kDa, without the atoms that the file does not have (often the hydrogens, 7 %)."""
        return float(self.masses.sum()) / 1000

    @cached_property
    def radius_of_gyration(self) -> float:
        """Root mean square distance from the centre of mass, mass-weighted, in Angstrom."""
        return float(np.sqrt(np.average((self.points**2).sum(axis=1), weights=self.masses)))

    @cached_property
    def reach(self) -> float:
        """Radius in Angstrom of the sphere about the centre of mass that holds 99.5 % of the mass."""
        radius = np.linalg.norm(self.points, axis=1)
        order = np.argsort(radius)
        held = np.cumsum(self.masses[order]) / self.masses.sum()
        return float(radius[order][np.searchsorted(held, 0.995)])


def read_complex(path: Path, cell: float = 4.0) -> Complex:
    """Read an atomic model: biological assembly 1 where the file has one, else all its chains; no waters.

    Atoms that share a cube of side ``cell`` become one point at their centre of mass. With 4 Angstrom that leaves a
    third of the points and changes a density of 30 Angstrom resolution by 3 % of its maximum (it is that much sharper).

    Args:
        path: ``.pdb``, ``.ent``, ``.cif`` or ``.mmcif``, also with ``.gz``.
        cell: side of the cubes in Angstrom, best at most a seventh of the resolution; 0 keeps every atom.

    Returns:
        The complex, named as the file in small letters.

    Raises:
        ImportError: without gemmi.
        ValueError: if the file is no atomic model or has no atoms but water.
    """
    try:
        import gemmi
    except ImportError as error:
        raise ImportError("atomic models are read with gemmi: pip install gemmi") from error
    try:
        structure = gemmi.read_structure(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is no atomic model that gemmi can read: {error}") from error
    structure.setup_entities()
    structure.remove_waters()
    points, masses = _atoms(structure, gemmi)
    if not len(points):
        raise ValueError(f"{path} holds no atoms (waters are not counted); is it a PDB or mmCIF file with coordinates?")
    points = points - np.average(points, axis=0, weights=masses)
    if cell > 0:
        points, masses = _merge(points, masses, cell)
    oligomer = structure.assemblies[0].oligomeric_details if len(structure.assemblies) else ""
    return Complex(_model_name(path), points, masses, oligomer.lower(), path.name)


def read_folder(folder: Path, cell: float = 4.0) -> list[Complex]:
    """All atomic models of a folder, by name.

    Args:
        folder: folder with files as :func:`read_complex` takes them; other files are left alone.
        cell: as there.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no model, or two of the same name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"models={folder} is no folder; give a folder of PDB or mmCIF files")
    files = sorted((f for f in folder.iterdir() if _is_model(f)), key=_model_name)
    names = [_model_name(f) for f in files]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"{folder} has several files for {', '.join(twice)}; keep one each: the name is the class")
    if not files:
        raise ValueError(f"{folder} has no atomic model; expected files that end in {', '.join(MODEL_ENDINGS)} (.gz)")
    return [read_complex(f, cell) for f in files]


def download_models(identifiers: list[str], folder: Path, cell: float = 4.0) -> list[Complex]:
    """Fetch models from the wwPDB archive, once: what the folder has already is not fetched again.

    Args:
        identifiers: four-character PDB identifiers, e.g. ``1aon``.
        folder: where the files are kept.
        cell: as in :func:`read_complex`.

    Raises:
        ValueError: if an identifier is none, is named twice, or the archive does not have it.
        ConnectionError: if the archive is out of reach; the message says what to do offline.
    """
    wanted = [name.strip().lower() for name in identifiers]
    for name in wanted:
        if len(name) != 4 or not name.isalnum() or not name[0].isdigit():
            raise ValueError(
                f"{name!r} is no PDB identifier; those have a digit and three letters or digits, e.g. 1aon"
            )
        if wanted.count(name) > 1:
            raise ValueError(f"pdb_ids names {name} twice")
    files = [folder / f"{name}.cif.gz" for name in wanted]
    for name, file in zip(wanted, files, strict=True):
        if not file.is_file():
            write_atomically(file, _fetch(f"{ARCHIVE}/{name[1:3]}/{name}.cif.gz", name))
    return [read_complex(f, cell) for f in files]


def splat(points: Array, masses: Array, shape: tuple[int, int, int], voxel_size: float) -> npt.NDArray[np.float32]:
    """Deal the mass of each point to the eight voxels around it (trilinear); what lies outside the box is cut off.

    Args:
        points: (n, 3) x, y, z in Angstrom from the centre voxel ``n // 2``.
        masses: (n,).
        shape: (D, H, W).
        voxel_size: Angstrom.

    Returns:
        (D, H, W) mass per voxel.
    """
    places = points[:, ::-1] / voxel_size + np.array([n // 2 for n in shape])
    inside = ((places > -1) & (places < np.array(shape))).all(axis=1)
    places, masses = places[inside] + 1, masses[inside]  # one voxel of rim takes what falls over the edge
    low = np.floor(places).astype(np.int64)
    part = places - low
    rim = tuple(n + 2 for n in shape)
    box = np.zeros(rim[0] * rim[1] * rim[2])
    for z, y, x in product((0, 1), repeat=3):
        weight = masses.copy()
        for axis, step in enumerate((z, y, x)):
            weight = weight * (part[:, axis] if step else 1 - part[:, axis])
        flat = ((low[:, 0] + z) * rim[1] + low[:, 1] + y) * rim[2] + low[:, 2] + x
        box += np.bincount(flat, weight, minlength=len(box))
    return box.reshape(rim)[1:-1, 1:-1, 1:-1].astype(np.float32)


def density(
    points: Array, masses: Array, shape: tuple[int, int, int], voxel_size: float, resolution: float
) -> npt.NDArray[np.float32]:
    """Density of points in a box, low-passed by a Gaussian whose Fourier transform is 1/e at 1 / ``resolution``.

    Mass stands for electrons: the ratio is the same for all protein (0.53 e/Da) within a few per cent.

    Args:
        points: (n, 3) x, y, z in Angstrom from the centre voxel.
        masses: (n,) Da.
        shape: (D, H, W).
        voxel_size: Angstrom.
        resolution: Angstrom; the Gaussian's sigma is resolution / (pi sqrt 2).

    Returns:
        (D, H, W) Da per cubic Angstrom.
    """
    spectrum = fft.rfftn(splat(points, masses, shape, voxel_size))
    spectrum *= _low_pass(shape, voxel_size, resolution)
    blurred: npt.NDArray[np.float32] = fft.irfftn(spectrum, shape)
    return blurred / np.float32(voxel_size**3)


def envelope(volume: npt.NDArray[np.float32], mass: float, voxel_size: float) -> npt.NDArray[np.int8]:
    """Mask of the densest voxels that have together the volume of the complex's envelope.

    Its volume is fixed by the mass (1.21 cubic Angstrom per Da, times 1.6 because a low-passed outline lies outside the
    atoms), so it does not depend on the peaks of the density.

    Args:
        volume: (D, H, W) density of the complex alone, low-passed.
        mass: Da.
        voxel_size: Angstrom.

    Returns:
        (D, H, W) 0 or 1, at least one voxel.
    """
    count = round(mass * PROTEIN_VOLUME * ENVELOPE_FACTOR / voxel_size**3)
    count = min(max(count, 1), volume.size - 1)
    mask = np.zeros(volume.size, np.int8)
    mask[np.argpartition(volume.ravel(), -count)[-count:]] = 1
    return mask.reshape(volume.shape)


@lru_cache(maxsize=8)
def _low_pass(shape: tuple[int, int, int], voxel_size: float, resolution: float) -> npt.NDArray[np.float32]:
    """The Gaussian on the grid of ``rfftn``, divided by what the trilinear kernel takes away already (sinc squared)."""
    sampled = [fft.fftfreq(n) for n in shape[:2]] + [fft.rfftfreq(shape[2])]
    lines = [np.exp(-((f * resolution / voxel_size) ** 2)) / np.sinc(f) ** 2 for f in sampled]
    gaussian: npt.NDArray[np.float32] = np.einsum("i,j,k->ijk", *lines).astype(np.float32)
    return gaussian


def _atoms(structure: gemmi.Structure, gemmi: Any) -> tuple[Array, Array]:
    """Positions (n, 3) in Angstrom and masses (n,) in Da; a partly occupied place counts in part."""
    if not len(structure):
        return np.zeros((0, 3)), np.zeros(0)
    model = structure[0]
    if len(structure.assemblies):
        _complete_chains(structure)
        model = gemmi.make_assembly(structure.assemblies[0], model, gemmi.HowToNameCopiedChain.Short)
    atoms = [(*found.atom.pos.tolist(), found.atom.element.weight * found.atom.occ) for found in model.all()]
    table = np.asarray(atoms, np.float64).reshape(-1, 4)
    table = table[table[:, 3] > 0]
    return table[:, :3], table[:, 3]


def _complete_chains(structure: gemmi.Structure) -> None:
    """Give assembly 1 the chains that old PDB files list on a second line without ``AND CHAINS:``.

    gemmi takes only the first line of such a list (seen with 0.7.5 and entry 1mnf).
    """
    lists: list[list[str]] = []
    listing = False
    for line in structure.raw_remarks:
        text = line[10:].strip() if line.startswith("REMARK 350") else ""
        if text.startswith("APPLY THE FOLLOWING TO CHAINS:"):
            lists.append([])
            listing = True
        listing = listing and bool(text) and not text.startswith("BIOMT")
        if listing:
            names = text.rpartition(":")[2].replace(",", " ").split()
            lists[-1] += [name for name in names if name not in lists[-1]]
    for generator, names in zip(structure.assemblies[0].generators, lists, strict=False):
        generator.chains = names


def _merge(points: Array, masses: Array, cell: float) -> tuple[Array, Array]:
    _, owner = np.unique(np.floor(points / cell).astype(np.int64), axis=0, return_inverse=True)
    owner = owner.ravel()
    total = np.bincount(owner, masses).astype(np.float64)
    centres = np.stack([np.bincount(owner, masses * column) / total for column in points.T], axis=1)
    return centres, total


def _is_model(path: Path) -> bool:
    return path.is_file() and path.name.lower().removesuffix(".gz").endswith(MODEL_ENDINGS)


def _model_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz").rpartition(".")[0].replace(" ", "_")


def _fetch(url: str, name: str) -> bytes:
    from urllib.error import HTTPError

    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content: bytes = answer.read()
    except HTTPError as error:
        raise ValueError(f"the PDB archive does not give {name} ({error.code} for {url}); check pdb_ids") from error
    except OSError as error:
        raise ConnectionError(
            f"cannot reach {url}: {error}. Offline, save the files in a folder and pass models=FOLDER, or leave "
            "pdb_ids and models empty for the synthetic catalogue"
        ) from error
    return content
