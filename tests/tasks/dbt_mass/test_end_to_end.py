"""Train, score, detect in a folder and analyse, each as a user would type it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from conftest import REPOSITORY, bundle_command
from mlflow import MlflowClient
from PIL import Image
from sample_bundle import medseg

from medseg.bundles.configs import read_config
from medseg.detection.free_response import froc
from medseg.detection.froc_report import read_run
from medseg.io.tomosynthesis import read_header, read_view

CONFIGS = "bundles/dbt_mass/configs"
TRAIN = [f"{CONFIGS}/train.yaml", f"{CONFIGS}/demo.yaml"]
TINY = {"patch_size": "[16,48,48]", "spacing": "[4.0,2.5,2.5]", "max_epochs": 2, "val_interval": 2}
TINY |= {"precision": "32-true"}  # bfloat16 is not for maps of 2 x 3 x 3, see medseg.training.precision
BOX = ["d0", "h0", "w0", "d1", "h1", "w1"]

pytestmark = pytest.mark.usefixtures("one_store")


@pytest.fixture(scope="module")
def trained(tiny_breasts, tmp_path_factory, store) -> Path:
    """A run of the reduced network over two epochs with its test part scored, shared by the tests below."""
    out = tmp_path_factory.mktemp("runs") / "run"
    line = bundle_command(TRAIN, **TINY, dataset_dir=tiny_breasts, output_dir=out, score="[test]")
    env = {**os.environ, "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def studies(tiny_breasts, tmp_path_factory) -> Path:
    """A right and a left view, one of which is shown in a film, and a view whose copy was cut off."""
    folder = tmp_path_factory.mktemp("studies")
    views = [tiny_breasts / item["image"] for item in json.loads((tiny_breasts / "datalist.json").read_text())["test"]]
    right, left, other = views[0], views[3], views[2]
    assert "_R_CC" in right.name
    assert "_L_MLO" in left.name
    for view, name in ((right, "one"), (left, "two")):
        (folder / name).mkdir()
        shutil.copy(view, folder / name)
    (folder / "two" / "cut.dcm").write_bytes(other.read_bytes()[:40_000])
    return folder


@pytest.fixture(scope="module")
def detected(trained, studies, tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Detection in the folder with the run's own config, and what it said."""
    out = tmp_path_factory.mktemp("found") / "p"
    config = str(trained / "configs" / "inference.yaml")
    line = bundle_command(config, dataset_dir=studies, output_dir=out, min_score=0.1, films=1)
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=dict(os.environ)), out


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_training_leaves_scores_of_both_parts(trained, tiny_breasts):
    assert (metrics(trained)["cases"], metrics(trained / "evaluation" / "test")["cases"]) == (4, 4)
    log = (trained / "train.log").read_text().splitlines()
    assert len(log) == 2
    losses = ("rpn_objectness", "rpn_box", "roi_class", "roi_box", "roi_mask")
    assert all(f"train_{name}=" in line for line in log for name in losses)
    assert "val_froc_area=" in log[1]
    record = json.loads((trained / "mlflow_run.json").read_text())
    recorded = MlflowClient(record["tracking_uri"]).get_run(record["run_id"]).data
    assert recorded.tags["network"] == "mask_rcnn_3d"
    assert "test_froc_area" in recorded.metrics
    per_view = rows(trained / "evaluation" / "test" / "per_image.csv")
    listed = json.loads((tiny_breasts / "datalist.json").read_text())["test"]
    assert [Path(r["image"]).name for r in per_view] == [Path(i["image"]).name for i in listed]
    assert all((trained / "evaluation" / "test" / "overlays" / r["overlay"]).is_file() for r in per_view)


def test_true_boxes_of_the_scores_are_those_of_the_mask_files(trained, tiny_breasts):
    listed = json.loads((tiny_breasts / "datalist.json").read_text())["test"]
    truths = rows(trained / "evaluation" / "test" / "truths.csv")
    assert len(truths) == 4
    for item, row in zip(listed, truths, strict=True):
        places = np.argwhere(read_view(read_header(tiny_breasts / item["label"]))[0] > 0)
        assert Path(row["view"]).name == Path(item["image"]).name
        assert [float(row[k]) for k in BOX] == [*places.min(axis=0), *(places.max(axis=0) + 1)]


def test_scores_are_those_of_the_written_boxes(trained):
    folder = trained / "evaluation" / "test"
    detections, truths, views = read_run(folder)
    found = metrics(folder)["metrics"]
    for name, by, rule in (
        ("froc_area", "breast", "iou>0.5"),
        ("froc_area_lesion", "lesion", "iou>0.5"),
        ("froc_area_centre", "breast", "centre"),
        ("froc_area_iou30", "breast", "iou>0.3"),
    ):
        assert found[name]["mean"] == pytest.approx(froc(detections, truths, views, by, rule).area(4.0), abs=1e-9)


def test_anchors_were_fitted_to_the_training_masses(trained):
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    anchors = state["proposals.anchors"]
    assert anchors.shape == (3, 2, 3)
    volumes = anchors.prod(dim=2).flatten()
    assert (volumes.diff() >= 0).all()
    assert (anchors <= torch.tensor([16.0, 48, 48])).all()


def test_froc_analysis_of_the_run(trained, tmp_path):
    done = medseg("froc", f"tiny={trained}", "--out", tmp_path / "froc", cwd=REPOSITORY)
    assert "| tiny | 2 |" in done.stdout, "two breasts with one mass each"
    written = {p.name for p in (tmp_path / "froc").iterdir()}
    assert {"froc.csv", "table2.csv", "table3.csv", "froc_tables.md", "froc.png", "froc_subgroups.png"} <= written


def test_a_truncated_view_is_named_and_the_exit_code_tells(detected, studies):
    done, out = detected
    assert done.returncode == 1
    message = done.stderr[done.stderr.rindex("\nerror: ") :]
    assert f"1 of 3 views could not be processed (the others are done, see {out})" in message
    assert f"{studies / 'two' / 'cut.dcm'} is cut off" in message
    assert (out / "problems.txt").read_text().count("\n") == 1


def test_the_other_views_are_complete(detected, studies):
    _, out = detected
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    stems = ["one/P0004_R_CC", "two/P0008_L_MLO"]
    assert written == sorted(
        ["breasts.csv", "detections.csv", "detections.json", "problems.txt", f"overlays/{stems[0]}.gif"]
        + [f"overlays/{s}.png" for s in stems]
        + [f"{s}_mass{end}" for s in stems for end in (".dcm", ".nii.gz")]
    )
    by_view = json.loads((out / "detections.json").read_text())
    assert list(by_view) == [str(studies / f"{s}.dcm") for s in stems]
    table = rows(out / "detections.csv")
    for stem in stems:
        view = read_header(studies / f"{stem}.dcm")
        own = [r for r in table if r["file"] == view.name]
        assert len(own) == len(by_view[view.name]["detections"]) > 0
        labels, affine = read_view(read_header(out / f"{stem}_mass.nii.gz"))
        assert labels.shape == view.shape
        np.testing.assert_allclose(affine, view.affine, atol=1e-4)
        numbers = {i for i, r in enumerate(own, start=1) if r["reported"] == "True" and float(r["volume_ml"]) > 0}
        assert set(np.unique(labels).astype(int)) == {0, *numbers}
        segmentation = pydicom.dcmread(out / f"{stem}_mass.dcm")
        assert len(segmentation.SegmentSequence) == len(numbers)
        source = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
        assert source.ReferencedSOPInstanceUID == by_view[view.name]["sop_instance"]
    with Image.open(out / "overlays" / f"{stems[0]}.gif") as film:
        assert film.n_frames == 16


def test_the_table_per_breast(detected):
    _, out = detected
    table, breasts = rows(out / "detections.csv"), rows(out / "breasts.csv")
    assert [(r["breast"], r["laterality"], r["views"]) for r in breasts] == [
        ("P0004-R", "R", "CC"), ("P0008-L", "L", "MLO")
    ]  # fmt: skip
    for row in breasts:
        scores = [float(r["score"]) for r in table if r["patient"] == row["patient"]]
        assert float(row["score"]) == max(scores)
        assert int(row["masses"]) == sum(score >= 0.1 for score in scores)


def test_the_configs_of_the_run_hold_its_network(trained):
    for name in ("train", "inference", "evaluate"):
        config = read_config(trained / "configs" / f"{name}.yaml")
        assert config["depth"] == 10
        assert config["patch_size"] == [16, 48, 48]
        assert config["spacing"] == [4.0, 2.5, 2.5]
        assert config["regions"]["finest"] is True


def test_a_packed_detector_is_trusted_and_repeats_its_self_test(trained, tmp_path):
    """The detector is medseg's class: no program stands for it, and verify knows it."""
    weights = trained / "models" / "model.pt"
    medseg("pack", "dbt_mass", "--weights", weights, "--version", "0.1.1", "--out", tmp_path, cwd=REPOSITORY)
    packed = tmp_path / "dbt_mass_v0.1.1.zip"
    report = json.loads(medseg("verify", packed, "--run", "--json", cwd=tmp_path).stdout)
    assert report["verdict"] == "trusted", report
    assert "P0001_L_CC_mass.nii.gz: Dice" in report["checked"]["self-test"]
    with zipfile.ZipFile(packed) as archive:
        inference = json.loads(archive.read("dbt_mass/configs/inference.json"))
    assert inference["network_def"]["_target_"] == "medseg.tasks.dbt_mass.network.MassRCNN3D"
    assert inference["patch_size"] == [16, 48, 48]
