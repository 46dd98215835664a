from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from medseg.io.datalist import load_datalist
from medseg.io.mrc import read_mrc
from medseg.tasks.cryoet_one_shot.catalogue import catalogue
from medseg.tasks.cryoet_one_shot.complexes import Complex
from medseg.tasks.cryoet_one_shot.scene import Physics, draw_scene, render
from medseg.tasks.cryoet_one_shot.simulate import self_test_case, simulate
from medseg.tasks.cryoet_one_shot.tomography import wedge

MODELS = Path(__file__).resolve().parents[3] / "../shared/data/cryoet/models"


@pytest.fixture(scope="module")
def analytic(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("analytic")
    simulate(out, 22 * 6 + 3, seed=3, method="analytic", workers=1)
    return out


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("series")
    simulate(out, 44, seed=3, style=["inf", "1000", "0.5"], workers=1)
    return out


def scenes(seed: int, count: int, physics: Physics, pool=range(22)):
    numbers = [pool[i % len(pool)] for i in range(count)]
    seeds = [np.random.SeedSequence((seed, i)) for i in range(count)]
    return [(n, draw_scene(catalogue(), n, pool, s, physics)) for n, s in zip(numbers, seeds, strict=True)]


def touches_border(mask: np.ndarray) -> bool:
    return mask[1:-1, 1:-1, 1:-1].sum() < mask.sum()


def test_the_list_is_valid_and_deals_classes_and_folds_evenly(analytic):
    lists = load_datalist(analytic / "datalist.json", analytic)
    names = [c.name for c in catalogue()]
    train, test = Counter(i["class"] for i in lists["training"]), Counter(i["class"] for i in lists["test"])
    assert set(train) == set(names[:14])
    assert set(test) == set(names[14:])
    assert [train[n] for n in names[:14]] == [7] * 3 + [6] * 11  # the first ones get one more
    assert set(test.values()) == {6}
    folds = Counter((i["class"], i["fold"]) for i in lists["training"])
    assert {f for _, f in folds} == {0, 1, 2, 3, 4}
    assert set(folds.values()) == {1, 2}
    item = lists["test"][0]
    assert item["style"] == "snr-inf"
    assert item["mass_kda"] == 290.0
    assert 20 < item["radius_of_gyration"] < 120
    header = json.loads((analytic / "datalist.json").read_text())
    assert header["classes"] == {"training": names[:14], "test": names[14:]}
    assert header["labels"] == {"0": "background", "1": "complex"}


def test_volumes_are_normalised_and_masks_are_whole(analytic):
    lists = load_datalist(analytic / "datalist.json", analytic)
    fractions = []
    for item in lists["training"] + lists["test"]:
        (volume, spacing), (mask, _) = read_mrc(item["image"]), read_mrc(item["label"])
        assert volume.shape == mask.shape == (32, 32, 32)
        assert volume.dtype == np.float32
        assert spacing == (10.0, 10.0, 10.0)
        assert abs(volume.mean()) < 1e-5
        assert abs(volume.std() - 1) < 1e-5
        assert set(np.unique(mask)) == {0, 1}
        assert mask.sum() == round(item["mass_kda"] * 1.21 * 1.6)  # voxels of 1000 cubic Angstrom
        assert not touches_border(mask)
        parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
        assert np.bincount(parts.ravel())[1:].max() > 0.9 * mask.sum(), "falls apart"
        assert volume[mask == 1].mean() > volume[mask == 0].mean() + 0.5, "protein is bright"
        fractions.append(mask.mean())
    assert 0.03 < np.mean(fractions) < 0.08


def test_templates_and_table(analytic):
    with (analytic / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["class"] for r in rows] == [c.name for c in catalogue()]
    assert [r["part"] for r in rows] == ["training"] * 14 + ["test"] * 8
    assert {r["source"] for r in rows} == {"synthetic"}
    for row in rows:
        template, _ = read_mrc(analytic / "templates" / f"{row['class']}.mrc")
        assert template.sum() == pytest.approx(float(row["mass_kda"]), rel=1e-3)  # Da per A^3, 1000 A^3 a voxel


def test_the_same_index_is_the_same_scene_at_every_snr(series):
    name = catalogue()[4].name
    masks = [(series / "masks" / f"{name}_0001_snr{s}.mrc").read_bytes() for s in ("inf", "1000", "0.5")]
    assert masks[0] == masks[1] == masks[2]
    clean, weak, strong = (
        read_mrc(series / "subtomograms" / f"{name}_0001_snr{s}.mrc")[0].ravel() for s in ("inf", "1000", "0.5")
    )
    assert np.corrcoef(clean, weak)[0, 1] > 0.99
    assert 0.2 < np.corrcoef(clean, strong)[0, 1] < 0.9
    lists = load_datalist(series / "datalist.json", series)
    assert Counter(i["style"] for i in lists["test"]) == {"snr-inf": 16, "snr-1000": 16, "snr-0.5": 16}


def test_both_methods_show_the_same_scene_from_the_same_seed():
    physics = Physics(ctf="none")
    for number, scene in scenes(1, 6, physics):
        (slow,), mask = render(catalogue(), number, scene, physics)
        (fast,), same = render(catalogue(), number, scene, Physics(method="analytic"))
        np.testing.assert_array_equal(mask, same)
        assert np.corrcoef(slow.ravel(), fast.ravel())[0, 1] > 0.95


def test_the_middle_of_the_wedge_is_empty():
    """Almost: the crop leaks into it (test_tomography looks before the crop), here 6 % of what is around it."""
    physics = Physics(neighbours=0, ctf="none")
    for number, scene in scenes(2, 4, physics):
        (volume,), _ = render(catalogue(), number, scene, physics)
        power = np.abs(np.fft.fftn(volume)) ** 2
        assert power[~wedge(volume.shape, 75)].mean() < 0.1 * power[wedge(volume.shape, 60)].mean()


def test_rotations_are_uniform():
    turns = np.stack([s.rotation for _, s in scenes(0, 3000, Physics(neighbours=0))])
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-12)
    assert np.linalg.det(turns) == pytest.approx(np.ones(3000))
    # Haar measure: entries have mean 0 and variance 1/3, the angle has the density (1 - cos a) / pi
    np.testing.assert_allclose(turns.mean(axis=0), 0, atol=0.04)
    np.testing.assert_allclose((turns**2).mean(axis=0), 1 / 3, atol=0.02)
    angle = np.sort(np.arccos(np.clip((np.trace(turns, axis1=1, axis2=2) - 1) / 2, -1, 1)))
    expected = (angle - np.sin(angle)) / np.pi
    assert np.abs(expected - np.arange(3000) / 3000).max() < 0.03  # Kolmogorov-Smirnov, 1 % level 0.0298


def test_neighbours_are_outside_and_from_their_own_side():
    drawn = scenes(0, 300, Physics(), range(14, 22))
    counts = Counter(len(s.neighbours) for _, s in drawn)
    assert set(counts) == {1, 2, 3}
    for number, scene in drawn:
        spheres = [(np.zeros(3), catalogue()[number].reach)]
        for other, _, place in scene.neighbours:
            assert 14 <= other < 22
            reach = catalogue()[other].reach
            assert all(np.linalg.norm(place - p) >= reach + r - 1e-9 for p, r in spheres)
            spheres.append((place, reach))
    assert all(abs(s.defocus - 5) <= 0.5 for _, s in drawn)
    assert not any(s.neighbours for _, s in scenes(0, 20, Physics(neighbours=0)))


def test_neighbours_are_in_the_picture_and_not_in_the_mask():
    changed = 0
    for number, scene in scenes(5, 12, Physics(method="analytic")):
        alone = draw_scene(catalogue(), number, range(22), np.random.SeedSequence((5, number)), Physics(neighbours=0))
        assert not alone.neighbours
        with_them, mask = render(catalogue(), number, scene, Physics(method="analytic"))
        scene_alone = type(scene)(scene.rotation, (), scene.defocus, scene.noise_seed)
        without, same = render(catalogue(), number, scene_alone, Physics(method="analytic"))
        np.testing.assert_array_equal(mask, same)
        changed += bool(np.abs(with_them[0] - without[0]).max() > 0.3)
    assert changed >= 6


def test_the_mask_turns_with_the_complex():
    """A rod along z, turned onto y."""
    rod = Complex("rod", np.stack([np.zeros(41), np.zeros(41), np.arange(-80.0, 81, 4)], 1), np.full(41, 5000.0))
    _, scene = scenes(0, 1, Physics(neighbours=0))[0]
    onto_y = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    scene = type(scene)(onto_y, (), 5.0, 0)
    (volume,), mask = render([rod], 0, scene, Physics())
    extent = [np.ptp(np.nonzero(mask)[axis]) for axis in range(3)]
    assert extent[1] > 2 * extent[0]
    assert extent[1] > 2 * extent[2]
    assert volume[16, 16, 16] > 2


def test_the_number_of_processes_changes_nothing(tmp_path):
    for workers in (1, 2):
        simulate(tmp_path / str(workers), 50, seed=2, style=["inf", "0.5"], workers=workers)
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file())
    assert len(files) == 50 * 4 + 22 + 2
    assert files == sorted(p.relative_to(tmp_path / "2") for p in (tmp_path / "2").rglob("*") if p.is_file())
    for file in files:
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes(), file


def test_the_seed_decides_everything_and_more_volumes_keep_the_first(tmp_path):
    for name, seed, count in (("a", 1, 22), ("b", 1, 30), ("c", 2, 22)):
        simulate(tmp_path / name, count, seed=seed, method="analytic", workers=1)
    file = f"subtomograms/{catalogue()[7].name}_0000_snrinf.mrc"
    a, b, c = ((tmp_path / n / file).read_bytes() for n in "abc")
    assert a == b
    assert a != c


def test_other_sizes_and_voxels(tmp_path):
    path = simulate(tmp_path, 22, size=48, voxel_size=8.0, resolution=24.0, folds=2, workers=1)
    lists = load_datalist(path, tmp_path)
    volume, spacing = read_mrc(lists["test"][0]["image"])
    mask, _ = read_mrc(lists["test"][0]["label"])
    assert volume.shape == (48, 48, 48)
    assert spacing == (8.0, 8.0, 8.0)
    assert mask.sum() == round(290000 * 1.21 * 1.6 / 512)


def test_a_folder_that_no_simulation_wrote_is_kept(tmp_path):
    (tmp_path / "datalist.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="not written by a simulation"):
        simulate(tmp_path, 22, method="analytic")
    assert (tmp_path / "datalist.json").read_text() == '{"training": []}'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 21}, "at least 1 subtomogram for each of the 22"),
        ({"style": ["loud"]}, "unknown style 'loud'"),
        ({"style": ["0"]}, "unknown style '0'"),
        ({"style": []}, "no style"),
        ({"style": ["inf", "snr-inf"]}, "named twice"),
        ({"style": ["0.5"], "method": "analytic"}, "no noise"),
        ({"method": "magic"}, "choose method from tilt_series, analytic"),
        ({"ctf": "inverted"}, "choose method"),
        ({"size": 31}, "even and at least 16"),
        ({"size": 24}, r"c1_260kda|voxel_size >="),
        ({"voxel_size": 0.0}, "voxel_size is 0.0"),
        ({"voxel_size": 5.0}, "take voxel_size >="),
        ({"resolution": float("nan")}, "resolution"),
        ({"neighbours": -1}, "neighbours"),
        ({"defocus": -5.0}, "defocus"),
        ({"amplitude_contrast": 1.5}, "amplitude_contrast"),
        ({"max_tilt": 95.0}, "max_tilt"),
        ({"tilt_step": 0.0}, "tilt_step"),
        ({"seed": -1}, "seed is -1"),
        ({"folds": 0}, "folds"),
        ({"workers": 0}, "workers"),
        ({"train_classes": 21}, "choose 2 to 20"),
        ({"models": "/nowhere"}, "is no folder"),
        ({"models": "a", "pdb_ids": "1aon"}, "both given"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        simulate(**{"out": tmp_path / "x", "count": 22, **change})
    assert not (tmp_path / "x").exists()


def test_own_models(tmp_path):
    rng = np.random.default_rng(0)
    atom = "ATOM  {:>5}  CA  GLY A{:>4}    {:8.3f}{:8.3f}{:8.3f}  1.00 10.00           C  \n"
    folder = tmp_path / "models"
    folder.mkdir()
    for k in range(4):
        places = rng.normal(0, 12 + 4 * k, (900, 3))
        (folder / f"m{k}.pdb").write_text(
            "".join(atom.format(i + 1, i + 1, *p) for i, p in enumerate(places)) + "END\n"
        )
    with pytest.raises(ValueError, match="choose 2 to 2"):
        simulate(tmp_path / "out", 8, models=str(folder), workers=1)
    path = simulate(tmp_path / "out", 8, models=str(folder), train_classes=2, style=["1000"], workers=1)
    lists = load_datalist(path, tmp_path / "out")
    assert [i["class"] for i in lists["training"]] == ["m0", "m1"] * 2
    assert [i["class"] for i in lists["test"]] == ["m2", "m3"] * 2
    (folder / "m3.pdb").unlink()
    with pytest.raises(ValueError, match="give 4 models or more"):
        simulate(tmp_path / "out", 8, models=str(folder), workers=1)


@pytest.mark.skipif(not MODELS.is_dir(), reason="needs ../shared/data/cryoet")
def test_real_models(tmp_path):
    count = len([f for f in MODELS.iterdir() if f.is_file()])
    path = simulate(tmp_path, count, models=str(MODELS), train_classes=count - 3, method="analytic", workers=1)
    lists = load_datalist(path, tmp_path)
    assert len(lists["training"]) + len(lists["test"]) == count
    for item in lists["training"] + lists["test"]:
        mask, _ = read_mrc(item["label"])
        assert not touches_border(mask)


def test_the_self_test_case(tmp_path):
    self_test_case(tmp_path)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.mrc"))
    assert files == ["support/c5_420kda.mrc", "support/t_1200kda.mrc", "target.mrc"]
    volumes = {f: read_mrc(tmp_path / f)[0] for f in files}
    assert {v.shape for v in volumes.values()} == {(32, 32, 32)}
    assert not np.array_equal(volumes["target.mrc"], volumes["support/c5_420kda.mrc"])


def test_worker_processes_start_without_torch():
    code = (
        "import sys, medseg.tasks.cryoet_one_shot.simulate; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
