"""What detection in a folder leaves, with what a network would have found put in its place."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from tomosynthesis_frames import single_frames

from medseg.io.overlay import GREEN
from medseg.io.tomosynthesis import read_header, read_view
from medseg.io.tomosynthesis_nifti import write_nifti
from medseg.tasks.dbt_mass.report import BOX, MILLIMETRES, DetectionReport, DrawView, ViewFolder, box_in_millimetres
from medseg.tasks.dbt_mass.views import LoadViewd, boxes_to_grid
from medseg.training.module import Case

GRID = (2.0, 1.0, 1.0)


@pytest.fixture
def weights(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    path.touch()
    return str(path)


def folder_of(path: Path, weights: str, out: Path) -> ViewFolder:
    return ViewFolder(str(path), "**/*.dcm", None, weights, str(out))


def found_item(view, boxes, scores, spacing=GRID):
    """What the loop hands over of a view: boxes given in its own voxels, masks that fill them but for a corner."""
    item = LoadViewd(["image"], spacing, skin=1.0, keep_errors=True)({"image": view})
    image = item["image"]
    moved = boxes_to_grid(np.asarray(boxes, float).reshape(-1, 6), view.affine, image.affine.numpy())
    masks = torch.ones(len(moved), 4, 6, 6)
    return {
        **item,
        "boxes": torch.from_numpy(moved).float(),
        "scores": torch.tensor(scores),
        "masks": masks,
        "probability": torch.zeros(image.shape),
    }


def run(report: DetectionReport, items) -> None:
    for item in items:
        report._report(SimpleNamespace(state=SimpleNamespace(output=[item])), iter(()))
    report._write(None)


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


@pytest.fixture
def views(make_view, tmp_path):
    """A right and a left breast: two views of the right one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, laterality, view in (("r1", "R", "CC"), ("r2", "R", "MLO"), ("l1", "L", "CC")):
        made = make_view(name=name, laterality=laterality, view=view, patient="P" + laterality)
        shutil.move(made.image, folder / f"{name}.dcm")
        made.label.unlink()
    return folder


def test_masks_lie_where_the_boxes_are_also_of_turned_views(views, weights, tmp_path):
    folder = folder_of(views, weights, tmp_path / "out")
    report = DetectionReport(str(tmp_path / "out"), folder, min_score=0.3, films=0)
    given = {"r1": [2, 10, 18, 6, 18, 26], "r2": [1, 20, 16, 4, 30, 27], "l1": [2, 10, 6, 5, 18, 14]}
    run(report, [found_item(v, [given[Path(v.name).stem]], [0.8]) for v in folder.views])
    for name, (d0, h0, w0, d1, h1, w1) in given.items():
        header = read_header(tmp_path / "out" / f"{name}_mass.nii.gz")
        labels, affine = read_view(header)
        view = read_header(views / f"{name}.dcm")
        np.testing.assert_allclose(affine, view.affine, atol=1e-4)
        expected = np.zeros(view.shape)
        expected[d0:d1, h0:h1, w0:w1] = 1
        np.testing.assert_array_equal(labels, expected)


def test_a_turned_mask_is_turned_back(views, weights, tmp_path):
    """The half of the box towards the chest wall: at low columns for the network, at high ones in a right view."""
    folder = folder_of(views, weights, tmp_path / "out")
    report = DetectionReport(str(tmp_path / "out"), folder, films=0)
    items = []
    for view in folder.views:
        right = "r" in Path(view.name).stem
        item = found_item(view, [[2, 10, 18, 6, 18, 26] if right else [2, 10, 4, 6, 18, 12]], [0.8])
        item["masks"][..., 3:] = 0
        items.append(item)
    run(report, items)
    for view in folder.views:
        labels, _ = read_view(read_header(tmp_path / "out" / f"{Path(view.name).stem}_mass.nii.gz"))
        columns = np.flatnonzero(labels.any(axis=(0, 1))).tolist()
        assert columns == ([22, 23, 24, 25] if view.laterality == "R" else [4, 5, 6, 7])


def test_masses_are_numbered_by_falling_score_and_the_better_one_wins(views, weights, tmp_path):
    folder = folder_of(views, weights, tmp_path / "out")
    view = next(v for v in folder.views if v.laterality == "L")
    report = DetectionReport(str(tmp_path / "out"), folder, min_score=0.3, films=0)
    boxes = [[2, 10, 6, 5, 18, 14], [2, 14, 6, 5, 22, 14], [1, 2, 2, 3, 6, 6]]
    run(report, [found_item(view, boxes, [0.9, 0.5, 0.2])])
    labels, _ = read_view(read_header(tmp_path / "out" / "l1_mass.nii.gz"))
    assert set(np.unique(labels)) == {0, 1, 2}, "the third is below the least score"
    assert (labels[2:5, 10:18, 6:14] == 1).all()
    assert (labels[2:5, 18:22, 6:14] == 2).all()
    table = rows(tmp_path / "out" / "detections.csv")
    assert [r["reported"] for r in table] == ["True", "True", "False"]
    assert [float(r["score"]) for r in table] == [0.9, 0.5, 0.2]
    voxel_ml = 2 * 1 * 1 / 1000
    assert [r["volume_ml"] for r in table] == [str(round(192 * voxel_ml, 3)), str(round(96 * voxel_ml, 3)), ""]


def test_tables_and_json_hold_boxes_in_voxels_and_millimetres(views, weights, tmp_path):
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)
    box = [2.0, 10, 18, 6, 18, 26]
    run(DetectionReport(str(out), folder, films=0), [found_item(v, [box], [0.75]) for v in folder.views])
    by_view = json.loads((out / "detections.json").read_text())
    for row in rows(out / "detections.csv"):
        view = read_header(row["file"])
        assert [float(row[k]) for k in BOX] == pytest.approx(box, abs=0.01)
        # by hand: the positions of the frames and pixels as the file has them, half a pixel out
        header = pydicom.dcmread(row["file"], stop_before_pixels=True)
        shared = header.SharedFunctionalGroupsSequence[0]
        row_way, column_way = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(2, 3)
        frames = header.PerFrameFunctionalGroupsSequence
        first, second = (np.array(f.PlanePositionSequence[0].ImagePositionPatient, float) for f in frames[:2])
        corners = [
            first + (d - 0.5) * (second - first) + (h - 0.5) * column_way + (w - 0.5) * row_way
            for d in (2, 6) for h in (10, 18) for w in (18, 26)
        ]  # fmt: skip
        expected = [*np.min(corners, axis=0), *np.max(corners, axis=0)]
        assert [float(row[k]) for k in MILLIMETRES] == pytest.approx(expected, abs=0.02)
        assert float(row["diameter_mm"]) == 8.0
        assert (row["patient"], row["laterality"], row["view"]) == (view.patient, view.laterality, view.view)
        (entry,) = by_view[row["file"]]["detections"]
        assert entry["box_mm_lps"] == [float(row[k]) for k in MILLIMETRES]
        assert by_view[row["file"]]["sop_instance"] == header.SOPInstanceUID


def test_box_in_millimetres_of_a_simple_affine():
    affine = np.diag([2.0, 0.5, 0.5, 1.0])
    affine[:3, 3] = [10, 20, 30]
    # index -0.5 is the edge of voxel 0; RAS to LPS turns x and y over
    found = box_in_millimetres(np.array([0, 0, 0, 1, 2, 4.0]), affine)
    np.testing.assert_allclose(found, [-11, -20.75, 29.75, -9, -19.75, 31.75])


def test_dicom_segmentation_and_films(views, weights, tmp_path):
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)
    items = [found_item(v, [[2, 10, 12, 6, 18, 20]] if v.laterality == "R" else [], [0.8] * (v.laterality == "R"))
             for v in folder.views]  # fmt: skip
    run(DetectionReport(str(out), folder, films=2), items)
    assert {p.name for p in out.glob("*.dcm")} == {"r1_mass.dcm", "r2_mass.dcm"}, "nothing found, no segmentation"
    assert not read_view(read_header(out / "l1_mass.nii.gz"))[0].any()
    assert pydicom.dcmread(out / "r1_mass.dcm").NumberOfFrames == 4
    assert len(list((out / "overlays").glob("*.png"))) == 3
    films = sorted((out / "overlays").glob("*.gif"))
    assert len(films) == 2
    with Image.open(films[0]) as film:
        assert film.n_frames == 8
    run(DetectionReport(str(tmp_path / "none"), folder, films=0, dicom_seg=False), items)
    assert not list((tmp_path / "none").rglob("*.dcm"))


def test_the_table_per_breast_has_the_highest_of_both_views(views, weights, tmp_path):
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)
    found = {"r1": ([[2, 10, 12, 6, 18, 20]] * 2, [0.4, 0.35]), "r2": ([[2, 10, 12, 6, 18, 20]], [0.7]), "l1": ([], [])}
    run(DetectionReport(str(out), folder, films=0), [found_item(v, *found[Path(v.name).stem]) for v in folder.views])
    found = rows(out / "breasts.csv")
    assert all(row.pop("study") for row in found)
    assert found == [
        {"breast": "PL-L", "patient": "PL", "laterality": "L", "views": "CC", "masses": "0", "score": "0.0"},
        {"breast": "PR-R", "patient": "PR", "laterality": "R", "views": "CC MLO", "masses": "2", "score": "0.7"},
    ]
    assert json.loads((out / "detections.json").read_text())[str(views / "l1.dcm")]["detections"] == []


def test_views_without_laterality_have_a_row_of_their_own(make_view, weights, tmp_path):
    folder = tmp_path / "in"
    made = make_view()
    for name in ("one", "two"):
        write_nifti(folder / f"{name}.nii.gz", made.stored.astype(np.int16), read_header(made.image).affine)
    views = ViewFolder(str(folder), "**/*", None, weights, str(tmp_path / "out"))
    report = DetectionReport(str(tmp_path / "out"), views, films=0)
    run(report, [found_item(v, [[2, 10, 6, 6, 18, 14]], [0.5]) for v in views.views])
    table = rows(tmp_path / "out" / "breasts.csv")
    assert [r["breast"] for r in table] == [str(folder / "one.nii.gz"), str(folder / "two.nii.gz")]
    assert not list((tmp_path / "out").rglob("*.dcm")), "a DICOM segmentation needs a DICOM view"


def test_problems_are_written_and_told_at_the_end(views, weights, tmp_path):
    (views / "l1.dcm").write_bytes((views / "l1.dcm").read_bytes()[:9000])
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)
    assert len(folder.views) == 2
    report = DetectionReport(str(out), folder, films=0)
    good, bad = (found_item(v, [[2, 10, 12, 6, 18, 20]], [0.5]) for v in folder.views)
    run(report, [good, {**bad, "problem": f"{folder.views[1].name} is odd"}])
    told = (out / "problems.txt").read_text().splitlines()
    assert len(told) == 2
    with pytest.raises(ValueError, match=r"2 of 3 views could not be processed \(the others are done, see ") as error:
        report.finish()
    assert all(line in str(error.value) for line in told)
    assert len(rows(out / "detections.csv")) == 1
    report.problems.clear()
    report._write(None)
    assert not (out / "problems.txt").exists(), "none is left of an earlier run"
    report.finish()


def test_many_problems_are_counted(views, weights, tmp_path):
    report = DetectionReport(str(tmp_path / "out"), folder_of(views, weights, tmp_path / "out"))
    report.problems = [f"file {i} is odd" for i in range(30)]
    with pytest.raises(ValueError, match=r"file 19 is odd\n  - \.\.\. and 10 more, see problems\.txt"):
        report.finish()


def test_results_of_twins_have_names_of_their_own(make_view, weights, tmp_path):
    made = make_view()
    folder = tmp_path / "in" / "sub"
    folder.mkdir(parents=True)
    shutil.copy(made.image, folder / "a.dcm")
    write_nifti(folder / "a.nii.gz", made.stored.astype(np.int16), read_header(made.image).affine)
    shutil.copy(made.image, folder / "b.dcm")
    views = ViewFolder(str(tmp_path / "in"), "**/*", None, weights, str(tmp_path / "out"))
    report = DetectionReport(str(tmp_path / "out"), views, films=0, dicom_seg=False)
    run(report, [found_item(v, [], []) for v in views.views])
    written = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.nii.gz"))
    assert written == ["sub/a.dcm_mass.nii.gz", "sub/a.nii.gz_mass.nii.gz", "sub/b_mass.nii.gz"]
    assert len(list((tmp_path / "out" / "overlays" / "sub").iterdir())) == 3


def test_scores_that_are_no_numbers_are_told(views, weights, tmp_path):
    folder = folder_of(views, weights, tmp_path / "out")
    report = DetectionReport(str(tmp_path / "out"), folder)
    item = found_item(folder.views[0], [[2, 10, 12, 6, 18, 20]], [float("nan")])
    with pytest.raises(ValueError, match=r"\.dcm: the scores are not finite"):
        run(report, [item])


def test_a_folder_without_a_usable_view(tmp_path, weights):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match="no DICOM, NIfTI or NRRD view in"):
        folder_of(tmp_path / "in", weights, tmp_path / "out")
    (tmp_path / "in" / "a.dcm").write_bytes(b"\0" * 128 + b"DICMnothing")
    with pytest.raises(ValueError, match=r"no view in .* can be used:\n.*a\.dcm"):
        folder_of(tmp_path / "in", weights, tmp_path / "out")


def test_a_scored_view_is_drawn(make_view):
    view = make_view((2, 10, 6, 5, 18, 14))
    load = LoadViewd(["image", "label"], GRID, skin=1.0)
    label = load(view.item)["label"][0].numpy() > 0
    packed = np.packbits(np.zeros_like(label)), np.packbits(label), label.shape
    picture = DrawView(load)(Case(str(view.image), {}, True, False, masks=packed))
    assert picture.ndim == 3
    assert picture.dtype == np.uint8
    assert (picture == np.array(GREEN)).all(axis=-1).any()


def test_series_of_single_frames_in_one_folder_stay_apart(make_view, weights, tmp_path):
    """As a flat export writes them: the frames of a left and of a right breast side by side."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, laterality in (("a", "L"), ("b", "R")):
        made = make_view(name=name, laterality=laterality, view="CC", patient="P")
        for k, frame in enumerate(single_frames(made.image, tmp_path / name, list(range(8)))):
            shutil.move(frame, folder / f"{name}{k}.dcm")
        made.image.unlink()
    out = tmp_path / "out"
    views = folder_of(folder, weights, out)
    assert len({view.name for view in views.views}) == 2
    run(
        DetectionReport(str(out), views, films=0), [found_item(v, [[2, 10, 12, 6, 18, 20]], [0.9]) for v in views.views]
    )
    assert sorted(row["breast"] for row in rows(out / "breasts.csv")) == ["P-L", "P-R"]
    assert len(list(out.glob("*_mass.nii.gz"))) == 2
    assert {row["laterality"] for row in rows(out / "detections.csv")} == {"L", "R"}


def test_frames_in_the_folder_itself_and_files_of_an_earlier_run(make_view, weights, tmp_path):
    made = make_view(name="v", laterality="L", view="CC", patient="P")
    folder = tmp_path / "frames"
    single_frames(made.image, folder, list(range(8)))
    out = tmp_path / "out"
    views = folder_of(folder, weights, out)
    assert views.views[0].name == str(folder)
    for score in (0.9, 0.1):  # the second run reports nothing
        report = DetectionReport(str(out), views, films=1 if score > 0.5 else 0)
        run(report, [found_item(views.views[0], [[2, 10, 12, 6, 18, 20]], [score])])
        assert (out / "overlays" / "frames.gif").is_file() == (score > 0.5)
        assert (out / "frames_mass.nii.gz").is_file()


def test_a_view_whose_results_cannot_be_written_does_not_stop_the_others(views, weights, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)

    def refuse(path, *_):
        if "r1" in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr("medseg.tasks.dbt_mass.report.write_png", refuse)
    report = DetectionReport(str(out), folder, films=0)
    run(report, [found_item(v, [[2, 10, 12, 6, 18, 20]], [0.9]) for v in folder.views])
    assert {Path(row["file"]).stem for row in rows(out / "detections.csv")} >= {"r2", "l1"}
    with pytest.raises(ValueError, match=r"r1\.dcm: No space left"):
        report.finish()


def test_an_old_segmentation_does_not_outlive_a_run_that_reports_nothing(views, weights, tmp_path):
    out = tmp_path / "out"
    folder = folder_of(views, weights, out)
    for score in (0.9, 0.1):
        run(
            DetectionReport(str(out), folder, films=0), [found_item(folder.views[0], [[2, 10, 12, 6, 18, 20]], [score])]
        )
        assert bool(list(out.glob("*_mass.dcm"))) == (score > 0.5)
