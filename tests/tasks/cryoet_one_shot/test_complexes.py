from __future__ import annotations

import gzip
import io
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from scipy.special import ndtr

from medseg.tasks.cryoet_one_shot import catalogue as catalogue_module
from medseg.tasks.cryoet_one_shot import complexes
from medseg.tasks.cryoet_one_shot.catalogue import CLASSES, catalogue, synthetic_complex
from medseg.tasks.cryoet_one_shot.complexes import (
    density,
    download_models,
    envelope,
    read_complex,
    read_folder,
    splat,
)

MODELS = Path(__file__).resolve().parents[3] / "../shared/data/cryoet/models"

ATOM = "ATOM  {:>5}  CA  GLY {}{:>4}    {:8.3f}{:8.3f}{:8.3f}{:6.2f} 10.00           C  \n"
WATER = "HETATM   90  O   HOH A  90      50.000  50.000  50.000  1.00 10.00           O  \n"
#: Assembly 1: the file's chains, and a copy turned by 180 degrees about z and moved by 10 along it.
ASSEMBLY = (
    "REMARK 350 BIOMOLECULE: 1\n"
    "REMARK 350 APPLY THE FOLLOWING TO CHAINS: {}\n"
    "REMARK 350   BIOMT1   1  1.000000  0.000000  0.000000        0.00000\n"
    "REMARK 350   BIOMT2   1  0.000000  1.000000  0.000000        0.00000\n"
    "REMARK 350   BIOMT3   1  0.000000  0.000000  1.000000        0.00000\n"
    "REMARK 350   BIOMT1   2 -1.000000  0.000000  0.000000        0.00000\n"
    "REMARK 350   BIOMT2   2  0.000000 -1.000000  0.000000        0.00000\n"
    "REMARK 350   BIOMT3   2  0.000000  0.000000  1.000000       10.00000\n"
)
CARBON = 12.0107


def pdb_text(assembly: str = "", places=((1.0, 0.0, 0.0), (0.0, 3.0, 0.0)), occupancy: float = 1.0) -> str:
    atoms = [ATOM.format(i + 1, "AB"[i % 2], i + 1, *place, occupancy) for i, place in enumerate(places)]
    return assembly + "".join(atoms) + WATER + "END\n"


def test_the_catalogue_is_what_is_promised():
    assert len(catalogue()) == 22
    assert len({c.name for c in catalogue()}) == 22
    assert {symmetry for symmetry, _, _ in CLASSES} >= {*"TOI", "C1", "C7", "C8", "D2", "D7"}
    for item in catalogue():
        order = len(Rotation.create_group(item.symmetry))
        assert 250 <= item.mass_kda <= 4000
        assert item.mass_kda >= 12 * order
        assert np.abs(item.points.mean(axis=0)).max() < 1e-6
        assert np.linalg.norm(item.points, axis=1).max() <= 138
        # a full ball has 1, atomic models of complexes 1.15 to 1.84
        ball = np.sqrt(3 / 5) * 0.66 * (1000 * item.mass_kda) ** (1 / 3)
        assert 1.0 < item.radius_of_gyration / ball < 2.0
        assert cKDTree(item.points).query(item.points, k=2)[0][:, 1].min() > 7.9, "beads overlap"


def test_both_sides_of_the_split_have_small_and_large_ones_and_equal_masses():
    for side in (CLASSES[:14], CLASSES[14:]):
        masses = [mass for _, mass, _ in side]
        assert min(masses) < 300
        assert max(masses) > 2500
        assert len(masses) - len(set(masses)) >= 3


@pytest.mark.parametrize("number", range(22))
def test_the_symmetry_is_real(number):
    item = catalogue()[number]
    for operation in Rotation.create_group(item.symmetry).as_matrix():
        assert cKDTree(item.points).query(item.points @ operation.T)[0].max() < 1e-6


def test_the_catalogue_has_no_more_symmetry_than_it_says():
    c4 = next(c for c in catalogue() if c.symmetry == "C4")
    for group in ("C8", "D4"):
        turned = [c4.points @ o.T for o in Rotation.create_group(group).as_matrix()]
        assert max(cKDTree(c4.points).query(points)[0].max() for points in turned) > 5


def test_a_complex_is_the_same_every_time_and_another_with_another_seed():
    first, second = (synthetic_complex("D3", 400, 2, seed=5) for _ in range(2))
    np.testing.assert_array_equal(first.points, second.points)
    assert not np.array_equal(first.points, synthetic_complex("D3", 400, 2, seed=6).points)


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(catalogue_module, "LARGEST_REACH", 40.0)
    monkeypatch.setattr(catalogue_module, "CHAINS", 5)
    with pytest.raises(ValueError, match="do not fit C3 within 40"):
        synthetic_complex("C3", 400, 1, seed=0)


def test_splat_is_trilinear_and_cuts_at_the_edge():
    place = np.array([[12.5, -3.0, 1.0]])  # x, y, z
    box = splat(place, np.array([8.0]), (8, 8, 8), 10.0)
    expected = np.zeros((8, 8, 8))
    for dz, wz in ((0, 0.9), (1, 0.1)):
        for dy, wy in ((-1, 0.3), (0, 0.7)):
            for dx, wx in ((1, 0.75), (2, 0.25)):
                expected[4 + dz, 4 + dy, 4 + dx] = 8 * wz * wy * wx
    np.testing.assert_allclose(box, expected, atol=1e-6)
    edge = splat(np.array([[35.0, 0, 0], [-45.0, 0, 0], [70.0, 0, 0]]), np.full(3, 2.0), (8, 8, 8), 10.0)
    assert edge.sum() == pytest.approx(2.0)
    assert edge[4, 4, 7] == pytest.approx(1.0)
    assert edge[4, 4, 0] == pytest.approx(1.0)


def test_density_keeps_mass_and_centre_and_has_the_width_asked_for():
    rng = np.random.default_rng(0)
    points = rng.uniform(-50, 50, (40, 3))
    masses = rng.uniform(500, 1500, 40)
    volume = density(points, masses, (32, 32, 32), 10.0, 30.0)
    assert volume.sum() * 1000 == pytest.approx(masses.sum(), rel=1e-5)
    z, y, x = (10 * (g - 16) for g in np.mgrid[:32, :32, :32])
    centre = [float((volume * g).sum() / volume.sum()) for g in (x, y, z)]
    np.testing.assert_allclose(centre, np.average(points, axis=0, weights=masses), atol=0.05)


def test_density_has_the_width_asked_for():
    """Points all over one voxel: a Gaussian of that width, blurred over the voxel.

    Sampling on the coarse grid of the subtomogram costs 5 % at the peak.
    """
    points = np.random.default_rng(0).uniform(-5, 5, (5000, 3))
    volume = density(points, np.full(5000, 1 / 5000), (32, 32, 32), 10.0, 40.0)
    sigma = 40 / (np.pi * np.sqrt(2))
    x = 10.0 * (np.arange(32) - 16)
    line = ndtr((x + 5) / sigma) - ndtr((x - 5) / sigma)
    expected = np.einsum("i,j,k->ijk", line, line, line) / 1000
    np.testing.assert_allclose(volume, expected, atol=0.06 * expected.max())


def test_the_envelope_has_the_volume_of_the_protein_and_lies_on_the_dense_side():
    item = catalogue()[4]
    volume = density(item.points, item.masses, (32, 32, 32), 10.0, 30.0)
    mask = envelope(volume, 1000 * item.mass_kda, 10.0)
    assert mask.sum() == round(item.mass_kda * 1000 * 1.21 * 1.6 / 1000)
    assert volume[mask == 1].min() >= volume[mask == 0].max()
    assert volume[mask == 1].sum() > 0.8 * volume.sum()
    assert envelope(volume, 1.0, 10.0).sum() == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_pdb_file_is_read_without_waters(tmp_path, packed):
    path = tmp_path / ("Mini.PDB.gz" if packed else "Mini.pdb")
    text = pdb_text().encode()
    path.write_bytes(gzip.compress(text) if packed else text)
    item = read_complex(path, cell=0)
    assert item.name == "mini"
    assert item.mass_kda == pytest.approx(2 * CARBON / 1000)
    np.testing.assert_allclose(item.points, [[0.5, -1.5, 0], [-0.5, 1.5, 0]], atol=1e-6)


@pytest.mark.parametrize("chains", ["A, B", "A,\nREMARK 350 B", "A,\nREMARK 350                    AND CHAINS: B"])
def test_assembly_1_is_built_and_lists_of_chains_may_go_on_on_the_next_line(tmp_path, chains):
    (tmp_path / "a.pdb").write_text(pdb_text(ASSEMBLY.format(chains)))
    item = read_complex(tmp_path / "a.pdb", cell=0)
    expected = np.array([[1, 0, -5], [0, 3, -5], [-1, 0, 5], [0, -3, 5]])
    np.testing.assert_allclose(sorted(item.points.tolist()), sorted(expected.tolist()), atol=1e-6)


def test_mmcif_occupancy_and_merging(tmp_path):
    import gemmi

    structure = gemmi.read_pdb_string(pdb_text(places=((0, 0, 0), (0, 1, 0), (40, 0, 0), (0, 40, 0)), occupancy=0.5))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "b.cif"))
    item = read_complex(tmp_path / "b.cif", cell=0)
    assert item.mass_kda == pytest.approx(2 * CARBON / 1000)
    merged = read_complex(tmp_path / "b.cif", cell=15)
    assert len(merged.points) == 3
    assert merged.masses.sum() == pytest.approx(item.masses.sum())
    np.testing.assert_allclose(merged.points.T @ merged.masses, 0, atol=1e-6)


def test_bad_models_are_named(tmp_path):
    (tmp_path / "empty.pdb").write_text(WATER + "END\n")
    with pytest.raises(ValueError, match=r"empty\.pdb holds no atoms"):
        read_complex(tmp_path / "empty.pdb")
    (tmp_path / "junk.cif").write_text("no loop_ here\n")
    with pytest.raises(ValueError, match=r"junk\.cif (is no atomic model|holds no atoms)"):
        read_complex(tmp_path / "junk.cif")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        read_folder(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="has no atomic model"):
        read_folder(tmp_path / "none")
    for name in ("x.pdb", "x.cif"):
        (tmp_path / "none" / name).write_text("")
    with pytest.raises(ValueError, match="several files for x"):
        read_folder(tmp_path / "none")


def test_download_keeps_files_and_says_what_to_do_offline(tmp_path, monkeypatch):
    import gemmi

    asked = []
    structure = gemmi.read_pdb_string(pdb_text())
    structure.setup_entities()
    content = gzip.compress(structure.make_mmcif_document().as_string().encode())

    def give(url: str, timeout: float) -> io.BytesIO:
        asked.append(url)
        return io.BytesIO(content)

    monkeypatch.setattr(complexes.urllib.request, "urlopen", give)
    for _ in range(2):
        models = download_models(["1AON ", "3j9i"], tmp_path)
    assert [m.name for m in models] == ["1aon", "3j9i"]
    assert [url.rpartition("mmCIF/")[2] for url in asked] == ["ao/1aon.cif.gz", "j9/3j9i.cif.gz"]

    for error, kind, message in (
        (URLError("no route"), ConnectionError, "pass models=FOLDER"),
        (HTTPError("u", 404, "none", {}, None), ValueError, "does not give 9zzz"),
    ):

        def fail(url: str, timeout: float, error: Exception = error) -> io.BytesIO:
            raise error

        monkeypatch.setattr(complexes.urllib.request, "urlopen", fail)
        with pytest.raises(kind, match=message):
            download_models(["9zzz"], tmp_path)
    with pytest.raises(ValueError, match="no PDB identifier"):
        download_models(["ribosome"], tmp_path)
    with pytest.raises(ValueError, match="names 1aon twice"):
        download_models(["1aon", "1AON"], tmp_path)


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs ../shared/data/cryoet")
@pytest.mark.parametrize(
    ("file", "kda", "reach"),
    [("1aon.pdb.gz", 781, 108), ("1bxn.pdb.gz", 480, 66), ("1mnf.pdb.gz", 736, 91), ("1qvr.pdb.gz", 514, 108)],
)
def test_real_models_have_the_mass_of_their_assembly(file, kda, reach):
    if not (MODELS / file).is_file():
        pytest.skip(f"no {file}")
    item = read_complex(MODELS / file)
    assert item.mass_kda == pytest.approx(kda, rel=0.01)
    assert item.reach == pytest.approx(reach, abs=2)
