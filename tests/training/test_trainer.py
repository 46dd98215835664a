"""Resume, interruption and results of the real trainer on a tiny problem, through the bundle's own config."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from conftest import CONFIGS, REPOSITORY, TINY, bundle_command
from mlflow import MlflowClient

from medseg.metrics import summarise
from medseg.training.module import Case
from medseg.training.results import by_file_name, typical_cases, write_results
from medseg.training.run_folder import claim_run_folder, run_lock


def train(bundle_run, data, out, **arguments):
    return bundle_run(
        f"{CONFIGS}/train.yaml", dataset_dir=data, output_dir=out, network_name="unet", **{**TINY, **arguments}
    )


def last_weights(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def test_resumed_run_equals_an_uninterrupted_one(bundle_run, tiny_data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(bundle_run, tiny_data, whole, max_epochs=3)
    train(bundle_run, tiny_data, parts, max_epochs=2)
    run_id = json.loads((parts / "mlflow_run.json").read_text())["run_id"]
    bundle_run(str(parts / "configs" / "train.yaml"), resume=True, max_epochs=3)
    assert json.loads((parts / "mlflow_run.json").read_text())["run_id"] == run_id, "one run, not two"
    torch.testing.assert_close(last_weights(parts), last_weights(whole), rtol=0, atol=0)
    assert (parts / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert len((parts / "train.log").read_text().splitlines()) == 3
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    table = client.load_table(client.get_run(run_id).info.experiment_id, "best_val/per_image.json", [run_id])
    assert len(table) == 2, "the table of the resumed run replaces the first one"


def test_the_last_checkpoint_is_the_last_epoch_though_nothing_improves(bundle_run, tiny_data, tmp_path):
    out = tmp_path / "run"
    # a threshold above every probability: Dice is 0 in all epochs
    train(bundle_run, tiny_data, out, max_epochs=4, val_interval=2, threshold=1.1)
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3
    assert ["val_dice" in line for line in (out / "train.log").read_text().splitlines()] == [False, True, False, True]
    record = json.loads((out / "mlflow_run.json").read_text())
    history = MlflowClient(record["tracking_uri"]).get_metric_history(record["run_id"], "val_dice")
    assert [m.step for m in history] == [1, 3]
    # other settings are refused on resume, and a word is no truth value
    for arguments, message in (
        ({"resume": True, "learning_rate": 0.5}, "learning_rate"),
        ({"resume": "false"}, "True"),
    ):
        done = bundle_run(str(out / "configs" / "train.yaml"), check=False, **arguments)
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1]


def test_a_diverged_training_fails(bundle_run, tiny_data, tmp_path):
    out = tmp_path / "run"
    arguments = {**TINY, "dataset_dir": tiny_data, "output_dir": out, "network_name": "unet"}
    done = bundle_run(f"{CONFIGS}/train.yaml", check=False, max_epochs=3, learning_rate=1e30, **arguments)
    assert done.returncode != 0
    assert "lower --learning_rate" in done.stderr.splitlines()[-1]
    record = json.loads((out / "mlflow_run.json").read_text())
    assert MlflowClient(record["tracking_uri"]).get_run(record["run_id"]).info.status == "FAILED"


def test_a_folder_belongs_to_one_process(tmp_path):
    with run_lock(tmp_path / "r"), pytest.raises(FileExistsError, match="in use by process"), run_lock(tmp_path / "r"):
        pass
    (tmp_path / "r" / "running.pid").write_text(
        f"999999999 1.0 {platform.node()}"
    )  # left behind by a process that was killed
    with run_lock(tmp_path / "r"):
        pass
    assert not (tmp_path / "r" / "running.pid").exists()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_is_resumable_and_marked_as_killed(tiny_data, tmp_path, how):
    out = tmp_path / "run"
    arguments = {**TINY, "dataset_dir": tiny_data, "output_dir": out, "network_name": "unet", "max_epochs": 500}
    process = subprocess.Popen(
        bundle_command(f"{CONFIGS}/train.yaml", **arguments),
        cwd=REPOSITORY,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores Ctrl-C, and its children would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "train.log"
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 2:
            break
        time.sleep(0.2)
    process.send_signal(how)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "continue with: python -m monai.bundle run" in printed
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(json.loads((out / "mlflow_run.json").read_text())["run_id"])
    assert run.info.status == "KILLED"
    assert claim_run_folder(out, resume=True) == out / "checkpoints" / "last.ckpt"
    assert not list(out.rglob("*.part"))


def test_a_finished_run_is_not_overwritten(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    with pytest.raises(FileExistsError, match="--resume True"):
        claim_run_folder(tmp_path, resume=False)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        claim_run_folder(tmp_path, resume=True)


def case(name: str, dice: float, empty: bool = False) -> Case:
    masks = (np.packbits(np.eye(3, dtype=bool)), np.packbits(np.eye(3, dtype=bool)), (3, 3))
    return Case(
        name, {"dice": dice, "hausdorff_distance": math.nan if empty else 2.0}, empty, False, {"style": "x"}, masks
    )


def test_results_count_empty_cases_and_make_nothing_up(tmp_path):
    cases = [case("a", 0.5), case("b", 0.0, empty=True), case("c", 1.0)]
    summary = write_results(tmp_path, cases)
    assert summary["metrics"]["dice"] == {"mean": 0.5, "sd": 0.5, "n": 3}
    assert summary["metrics"]["hausdorff_distance"] == {"mean": 2.0, "sd": 0.0, "n": 2}
    assert (summary["cases"], summary["empty_predictions"], summary["empty_truths"]) == (3, 1, 0)
    assert json.loads((tmp_path / "metrics.json").read_text()) == summary
    rows = list(csv.DictReader((tmp_path / "per_image.csv").open()))
    assert rows[1]["hausdorff_distance"] == "nan"
    assert rows[1]["empty_prediction"] == "True"
    assert rows[0]["style"] == "x"


def test_nothing_defined_is_nan_and_null(tmp_path):
    assert math.isnan(summarise([math.nan])["mean"])
    assert summarise([1.0]) == {"mean": 1.0, "sd": pytest.approx(math.nan, nan_ok=True), "n": 1}
    write_results(tmp_path, [case("a", math.nan, empty=True)])
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"]["dice"]["mean"] is None


def test_equal_file_names_do_not_overwrite_each_others_overlays():
    cases = [case("a/x.png", 1.0), case("b/x.png", 0.5), case("b/y.png", 0.5)]
    assert list(by_file_name(cases)) == ["0000_x", "0001_x", "0002_y"]


def test_worst_median_best():
    cases = [case("a", 0.5), case("b", math.nan), case("c", 1.0), case("d", 0.7)]
    assert {k: c.image for k, c in typical_cases(cases).items()} == {"worst": "b", "median": "d", "best": "c"}
    pred, truth = cases[0].unpacked()
    np.testing.assert_array_equal(pred, np.eye(3, dtype=bool))
    np.testing.assert_array_equal(truth, pred)
