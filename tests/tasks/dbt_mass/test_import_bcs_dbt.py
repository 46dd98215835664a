"""The public BCS-DBT layout, made small: tables and views, with boxes known by hand."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg.io.datalist import load_datalist
from medseg.io.tomosynthesis import read_header, read_view
from medseg.io.tomosynthesis_dicom import write_tomosynthesis
from medseg.tasks.dbt_mass.import_bcs_dbt import import_bcs_dbt

SHAPE, SPACING = (9, 20, 16), (1.0, 0.5, 0.5)
PATH = "BCS-DBT/{0}/{1}/{2}.dcm"
BOX = {"Subject": "1", "Slice": 4, "X": 3, "Y": 2, "Width": 6, "Height": 10, "Class": "cancer", "AD": 0}


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def release(tmp_path: Path) -> Callable[..., Path]:
    """The release: P1 has a mass in both views of the left breast, the other views and patients are normal."""

    def make(boxes: list[dict[str, object]] | None = None, turned: bool = False, labels: bool = True) -> Path:
        source = tmp_path / "release"
        keys = [
            ("P1", "S1", "lcc"),
            ("P1", "S1", "lmlo"),
            ("P1", "S1", "rcc"),
            ("P2", "S2", "lcc"),
            ("P3", "S3", "rmlo"),
        ]
        for patient, study, view in keys:
            volume = np.random.default_rng(len(view)).integers(0, 30, SHAPE).astype(np.uint16)
            left = (view[0] == "l") != (turned and patient == "P1")
            volume[..., slice(0, 8) if left else slice(8, 16)] += 300
            write_tomosynthesis(
                source / PATH.format(patient, study, view),
                volume,
                SPACING,
                laterality=view[0].upper(),
                view=view[1:].upper(),
                patient=patient,
                uid_seed=view,
            )
        rows = [dict(zip(("PatientID", "StudyUID", "View"), key, strict=True)) for key in keys]
        write_table(
            source / "BCS-DBT-file-paths-train.csv",
            [{**row, "descriptive_path": PATH.format(*row.values()), "classic_path": "x"} for row in rows],
        )
        if boxes is None:
            boxes = [{**BOX}, {**BOX, "X": 1, "Y": 1, "Width": 4, "Height": 4, "Class": "benign", "View": "lmlo"}]
        first = {"PatientID": "P1", "StudyUID": "S1", "View": "lcc"}
        write_table(source / "BCS-DBT-boxes-train.csv", [{**first, **box, "VolumeSlices": 9} for box in boxes])
        if labels:
            flags = [{"Normal": int(r["PatientID"] == "P2" or r["View"] == "rcc"), "Actionable": 0} for r in rows]
            write_table(source / "BCS-DBT-labels-train.csv", [{**r, **f} for r, f in zip(rows, flags, strict=True)])
        return source

    return make


def by_view(path: Path) -> dict[tuple[str, str], dict[str, object]]:
    content = json.loads(path.read_text())
    return {(i["patient"], i["laterality"] + i["view"]): i for i in content["training"] + content["test"]}


def test_boxes_become_masks_on_the_views_grid(release, tmp_path):
    out = tmp_path / "out"
    path = import_bcs_dbt(release(), out, folds=2)
    items = by_view(path)
    assert set(items) == {("P1", "LCC"), ("P1", "LMLO"), ("P1", "RCC"), ("P2", "LCC")}  # P3 is not called normal
    item = items["P1", "LCC"]
    assert (item["breast"], item["mass"], item["histology"], item["truth"]) == ("P1-L", "1", "malignant", "box")
    view, mask = read_header(out / item["image"]), read_header(out / item["label"])
    np.testing.assert_allclose(mask.affine, view.affine, atol=1e-5)
    voxels, _ = read_view(mask)
    expected = np.zeros(SHAPE)
    expected[3:7, 2:12, 3:9] = 1  # depth: the mean of 3 and 5 mm
    np.testing.assert_array_equal(voxels, expected)
    assert nib.load(out / item["label"]).get_data_dtype() == np.uint8
    empty = items["P2", "LCC"]
    assert (empty["mass"], empty["histology"], empty["truth"]) == ("none", "none", "none")
    assert not read_view(read_header(out / empty["label"]))[0].any()
    folds = {item["patient"]: item["fold"] for item in items.values()}
    assert all(item["fold"] == folds[item["patient"]] for item in items.values())
    assert sum(map(len, load_datalist(path, out).values())) == 4


def test_depth_and_clipping(release, tmp_path):
    source = release([{**BOX, "Slice": 0, "X": 12, "Y": 15, "Width": 10, "Height": 10}])
    item = by_view(import_bcs_dbt(source, tmp_path / "out", depth_mm=5.0))["P1", "LCC"]
    found = np.argwhere(read_view(read_header(tmp_path / "out" / item["label"]))[0])
    assert found.min(axis=0).tolist() == [0, 15, 12]
    assert found.max(axis=0).tolist() == [2, 19, 15]


def test_box_of_a_turned_image_is_turned_back(release, tmp_path):
    item = by_view(import_bcs_dbt(release(turned=True), tmp_path / "out"))["P1", "LCC"]
    voxels, _ = read_view(read_header(tmp_path / "out" / item["label"]))
    shown = voxels[:, ::-1, ::-1]  # as the owners' reader shows it
    assert shown[3:7, 2:12, 3:9].all()
    assert shown.sum() == 4 * 10 * 6


def test_several_masses_test_part_and_no_labels(release, tmp_path):
    boxes = [{**BOX}, {**BOX, "X": 10, "Width": 3, "Class": "benign", "AD": 1}]
    path = import_bcs_dbt(release(boxes, labels=False), tmp_path / "out", test_share=0.5, seed=3)
    items = by_view(path)
    assert len(items) == 5
    item = items["P1", "LCC"]
    assert (item["mass"], item["histology"], item["mass_type"]) == ("1,2", "malignant", "mass")
    assert set(np.unique(read_view(read_header(tmp_path / "out" / item["label"]))[0])) == {0, 1, 2}
    content = json.loads(path.read_text())
    sides = [{i["patient"] for i in content[part]} for part in ("training", "test")]
    assert all(sides)
    assert not sides[0] & sides[1]
    few = import_bcs_dbt(release(boxes), tmp_path / "few", normal_views=False)
    assert len(by_view(few)) == 1


@pytest.mark.parametrize(
    ("box", "says"),
    [
        ({"Slice": 9}, r"boxes-train\.csv, line 2: box of 6 x 10 at x 3, y 2, slice 9 is not inside"),
        ({"X": 16}, "is not inside"),
        ({"Width": 0}, "is not inside"),
        ({"Height": "?"}, "line 2: Slice, X, Y, Width and Height must be numbers"),
        ({"View": "rmlo"}, "line 2: no file path for P1, S1, rmlo"),
    ],
)
def test_rows_that_make_no_sense_are_named(release, tmp_path, box, says):
    with pytest.raises(ValueError, match=says):
        import_bcs_dbt(release([{**BOX, **box}]), tmp_path / "out")


def test_missing_files_tables_and_columns_are_named(release, tmp_path):
    source = release()
    for view in ("lcc", "lmlo"):
        (source / PATH.format("P1", "S1", view)).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 files(.|\n)*lcc\.dcm\n.*lmlo\.dcm"):
        import_bcs_dbt(source, tmp_path / "out")
    table = source / "BCS-DBT-boxes-train.csv"
    write_table(table, [{"PatientID": "P1", "StudyUID": "S1", "View": "lcc", "Slice": 1}])
    with pytest.raises(ValueError, match=r"boxes-train\.csv has no column X, Y, Width, Height"):
        import_bcs_dbt(source, tmp_path / "out")
    table.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*boxes\*\.csv"):
        import_bcs_dbt(source, tmp_path / "out")
    with pytest.raises(ValueError, match="folds 0"):
        import_bcs_dbt(source, tmp_path / "out", folds=0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "datalist.json").write_text("{}")
    with pytest.raises(ValueError, match="not written by this converter"):
        import_bcs_dbt(source, tmp_path / "out")
