from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from medseg.io.datalist import load_datalist
from medseg.io.tomosynthesis import read_header, read_view
from medseg.io.tomosynthesis_view import laterality_contradiction
from medseg.tasks.dbt_mass.phantom import Grid, draw_breast, make_view
from medseg.tasks.dbt_mass.simulate import benchmark_view, self_test_case, simulate

SMALL = {"shape": "20,64,48", "spacing": "3,2.5,2.5"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data")
    simulate(out, 12, seed=3, workers=1)
    return out


def test_the_list_is_valid_and_splits_by_patient(data):
    lists = load_datalist(data / "datalist.json", data)
    sides = defaultdict(set)
    for part in ("training", "test"):
        for item in lists[part]:
            sides[item["patient"]].add((part, item.get("fold")))
    assert len(sides) == 12
    assert all(len(side) == 1 for side in sides.values())
    assert sum(part == "test" for side in sides.values() for part, _ in side) == 5  # 0.45 of 12
    assert {i["fold"] for i in lists["training"]} == {0, 1, 2, 3, 4}
    by_breast = defaultdict(list)
    for item in lists["training"] + lists["test"]:
        assert item["breast"] == f"{item['patient']}-{item['laterality']}"
        by_breast[item["breast"]].append(item)
    for cc, mlo in by_breast.values():
        assert (cc["view"], mlo["view"]) == ("CC", "MLO")
        for field in ("age", "density", "mass", "mass_type", "histology", "contrast", "laterality"):
            assert cc[field] == mlo[field]
        assert cc["diameter_mm"] == pytest.approx(mlo["diameter_mm"], rel=0.12)
        assert 18 <= cc["age"] <= 88
        assert cc["density"] in (1, 2, 3, 4)
        assert cc["mass_type"] in ("round/oval", "spiculated", "irregular")
        assert cc["histology"] in ("benign", "malignant")
        assert 1.12 <= cc["contrast"] <= 1.30


def test_the_parts_of_the_paper():
    """163 of 364 are in the test part."""
    share = 0.45
    dealt = [int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in range(364)]
    assert sum(dealt) == 163


def test_the_description_names_contrast_geometry_and_seed(data):
    header = json.loads((data / "datalist.json").read_text())
    for words in ("1.12 to 1.3", "32 x 128 x 96", "2 x 1.25 x 1.25 mm", "20 projections over 20 degrees", "seed 3"):
        assert words in header["description"]
    assert header["labels"] == {"0": "background", "1": "mass"}


def test_views_are_read_back_with_their_masks(data):
    lists = load_datalist(data / "datalist.json", data)
    seen = set()
    for item in lists["training"][:8]:
        view, mask = read_header(item["image"]), read_header(item["label"])
        assert (view.laterality, view.view, view.patient) == (item["laterality"], item["view"], item["patient"])
        assert view.breast == item["breast"]
        assert view.shape == mask.shape == (32, 128, 96)
        assert not view.remarks
        np.testing.assert_allclose(view.spacing, (2.0, 1.25, 1.25))
        np.testing.assert_allclose(view.affine, mask.affine, atol=1e-3)
        volume, _ = read_view(view)
        truth, _ = read_view(mask)
        assert set(np.unique(truth)) == {0, 1}
        assert volume.max() <= 1023
        assert laterality_contradiction(view, volume) is None
        number = int(item["patient"][1:]) - 1
        breast = draw_breast(np.random.SeedSequence((3, number)), Grid())
        expected, core = make_view(breast, item["view"], Grid())
        if item["laterality"] == "R":
            expected, core = expected[..., ::-1], core[..., ::-1]
        np.testing.assert_array_equal(volume, np.rint(1023 * expected))
        np.testing.assert_array_equal(truth, core)
        seen.add(item["laterality"])
    assert seen == {"L", "R"}


def test_itk_agrees_on_geometry_and_values(data):
    itk = pytest.importorskip("itk")
    item = load_datalist(data / "datalist.json", data)["test"][0]
    view = read_header(item["image"])
    image = itk.imread(item["image"])
    np.testing.assert_array_equal(itk.array_from_image(image), read_view(view)[0])
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ view.affine
    for index in ((0, 0, 0), (5, 7, 11)):
        place = image.TransformIndexToPhysicalPoint([int(i) for i in index[::-1]])
        np.testing.assert_allclose(list(place), (lps @ (*index, 1))[:3], atol=1e-3)


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy (Debian: dicom3tools)")
def test_the_objects_are_valid(data):
    for file in sorted((data / "views").iterdir())[:4]:
        found = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, timeout=60, check=False)
        said = found.stdout + found.stderr
        assert "BreastTomosynthesisImage" in said
        assert "Error" not in said, said
        assert "Warning" not in said, said


def test_the_number_of_processes_changes_nothing_and_more_breasts_keep_the_first(tmp_path):
    for name, count, workers in (("one", 10, 1), ("two", 10, 2), ("more", 13, 1)):
        simulate(tmp_path / name, count, seed=2, workers=workers, **SMALL)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len(files) == 10 * 4 + 1
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes(), file
        assert file.name == "datalist.json" or content == (tmp_path / "more" / file).read_bytes(), file
    few, more = (load_datalist(tmp_path / n / "datalist.json", tmp_path / n)["test"] for n in ("one", "more"))
    assert [i["patient"] for i in few] == [i["patient"] for i in more][: len(few)]


def test_another_seed_is_another_breast(tmp_path):
    for seed in (0, 1):
        simulate(tmp_path / str(seed), 1, seed=seed, workers=1, **SMALL)
    first, second = (sorted((tmp_path / s / "masks").iterdir())[0].read_bytes() for s in "01")
    assert first != second


def test_breasts_without_a_mass_have_an_empty_mask(tmp_path):
    path = simulate(tmp_path, 2, normal=1.0, test_share=0.0, workers=1, **SMALL)
    lists = load_datalist(path, tmp_path)
    assert not lists["test"]
    for item in lists["training"]:
        assert not read_view(read_header(item["label"]))[0].any()
        assert (item["mass"], item["mass_type"], item["histology"]) == ("none", "none", "none")
        assert (item["diameter_mm"], item["contrast"]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"folds": 0}, "folds"),
        ({"workers": 0}, "workers"),
        ({"test_share": 1.2}, "test_share"),
        ({"style": ["loud"]}, "only standard"),
        ({"style": []}, "only standard"),
        ({"size": 64}, "--set shape"),
        ({"conspicuity": "1.2"}, "give 2 numbers"),
        ({"conspicuity": "1.3,1.1"}, "two rising numbers"),
        ({"conspicuity": "a,b"}, "give 2 numbers"),
        ({"densities": "1,2,3"}, "give 4 numbers"),
        ({"shape": "32,128"}, "give 3 numbers"),
        ({"shape": "32,128,nan"}, "give 3 numbers"),
        ({"shape": "32,128.5,96"}, "whole numbers"),
        ({"spacing": "2,0,1"}, "three positive"),
        ({"method": "fbp"}, "method is fbp"),
        ({"angle": 120.0}, "angle"),
        ({"normal": -1.0}, "normal"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"out": tmp_path / "x", "count": 2, **change})
    assert not (tmp_path / "x").exists()


def test_a_folder_that_no_simulation_wrote_is_kept(tmp_path):
    (tmp_path / "datalist.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="not written by a simulation"):
        simulate(tmp_path, 1)
    assert (tmp_path / "datalist.json").read_text() == '{"training": []}'


def test_the_self_test_case(tmp_path):
    for name in "ab":
        self_test_case(tmp_path / name)
        assert [p.name for p in (tmp_path / name).iterdir()] == ["P0001_L_CC.dcm"]
    file = tmp_path / "a" / "P0001_L_CC.dcm"
    assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert file.stat().st_size < 300_000
    assert read_header(file).shape == (32, 64, 48)


def test_the_benchmark_view_is_enlarged_with_its_geometry(tmp_path):
    """A small one: the same code makes 60 x 2457 x 1890."""
    box = benchmark_view(tmp_path / "big.dcm", seed=1, shape=(30, 261, 190), spacing=(1.5, 0.6, 0.6), binning=4)
    view = read_header(tmp_path / "big.dcm")
    assert view.shape == (30, 261, 190)
    np.testing.assert_allclose(view.spacing, (1.5, 0.6, 0.6))
    grid = Grid((30, 66, 48), (1.5, 2.4, 2.4))
    breast = draw_breast(np.random.SeedSequence((1, 0)), grid)
    coarse, mask = make_view(breast, "CC", grid)
    places = np.argwhere(mask)
    np.testing.assert_array_equal(box[:3], places.min(axis=0) * (1, 4, 4))
    np.testing.assert_array_equal(box[3:], (places.max(axis=0) + 1) * (1, 4, 4))
    fine, _ = read_view(view)
    averaged = fine[:, :260, :188].reshape(30, 65, 4, 47, 4).mean(axis=(2, 4)) / 1023
    assert np.corrcoef(averaged.ravel(), coarse[:, :65, :47].ravel())[0, 1] > 0.99


def test_worker_processes_start_without_torch():
    code = "import sys, medseg.tasks.dbt_mass.simulate; sys.exit(any(m in sys.modules for m in ('torch', 'monai')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
