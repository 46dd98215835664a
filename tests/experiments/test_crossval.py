"""A cross-validation as a user runs it: interrupted by SIGKILL, taken up again, extended, compared, put together."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from conftest import REPOSITORY, TINY, bundle_command
from mlflow import MlflowClient

from medseg.experiments.crossval import _no_orphan, _reason
from medseg.experiments.engines import ATTEMPT
from medseg.experiments.plan import Child
from medseg.training.run_folder import living_holder, read_status

NETWORKS = ("unet-end_to_end", "unetpp-end_to_end")


def line(data: Path, out: Path, *extra: str, networks: str = "unet,unetpp") -> list[str]:
    settings = {"dataset_dir": data, **TINY, "max_epochs": 2, "drlse:image_size": "[64,64]"}
    words = [sys.executable, "-m", "medseg", "crossval", "fluorescence_tumor", "--folds", "2", "--networks", networks]
    words += ["--held-out", "--out", str(out), *extra]
    return words + [word for k, v in settings.items() for word in ("--set", f"{k}={v}")]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    return {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"}


def run(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=500)


@pytest.fixture(scope="module")
def crossed(tiny_data, tmp_path_factory, environment):
    """Two networks x two folds; killed with its child in the middle, and called again."""
    out = tmp_path_factory.mktemp("runs") / "crossval"
    driver = subprocess.Popen(
        line(tiny_data, out),
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first, second = (out / name / "repeat0-fold0" for name in NETWORKS)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and driver.poll() is None:
        if living_holder(second) and (second / "mlflow_run.json").exists():
            break
        time.sleep(0.05)
    assert read_status(first) == "FINISHED", driver.communicate()[0]
    driver.kill()
    os.kill(int((second / "running.pid").read_text().split()[0]), signal.SIGKILL)
    driver.wait()
    assert read_status(second) == "RUNNING"
    again = run(line(tiny_data, out), environment)
    assert again.returncode == 0, again.stdout + again.stderr
    return out, again.stdout


def test_dry_run_prints_commands_and_leaves_nothing(tiny_data, tmp_path, environment):
    done = run(line(tiny_data, tmp_path / "out", "--dry-run"), environment)
    commands = [shlex.split(text) for text in done.stdout.splitlines() if text.startswith("python -m monai.bundle run")]
    assert len(commands) == 4
    assert "4 children" in done.stdout
    assert not (tmp_path / "out").exists()
    assert "--fold" in commands[3]


def test_what_had_finished_is_not_run_again(crossed):
    _, printed = crossed
    lines = [text for text in printed.splitlines() if text.startswith("[")]
    assert len(lines) == 4
    assert "unet-end_to_end repeat0-fold0: had finished before  dice 0." in lines[0]
    assert all(": finished in " in text for text in lines[1:])
    assert "4 of 4 children finished" in printed


def test_one_parent_and_a_finished_child_for_each_run(crossed, environment):
    out, _ = crossed
    record = json.loads((out / "crossval.json").read_text())
    client = MlflowClient(environment["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("fluorescence_tumor-crossval")
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags["kind"] == "crossval"]
    assert [(r.info.run_id, r.info.status) for r in parents] == [(record["parent_run_id"], "FINISHED")]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == record["parent_run_id"]]
    assert len(children) == len(runs) - 1
    finished = [r for r in children if r.info.status == "FINISHED"]
    assert Counter((r.data.tags["configuration"], r.data.tags["fold"]) for r in finished) == Counter(
        (name, fold) for name in NETWORKS for fold in "01"
    )
    assert all(r.info.status == "KILLED" for r in children if r not in finished), "a dead child does not look alive"
    assert all({"test_dice", "held_out_dice", "best_val_dice"} <= set(r.data.metrics) for r in finished)
    assert {r.data.tags["data.style"] for r in finished} == {"abfm"}


def test_every_case_is_tested_once_and_never_by_a_model_that_saw_it(crossed, tiny_data):
    out, _ = crossed
    listed = {i["image"] for i in json.loads((tiny_data / "datalist.json").read_text())["training"]}
    for name in NETWORKS:
        tested = Counter()
        for fold in range(2):
            rows = list(csv.DictReader((out / name / f"repeat0-fold{fold}/evaluation/test/per_image.csv").open()))
            images = {str(Path(r["image"]).relative_to(tiny_data)) for r in rows}
            seen = {i["image"] for i in json.loads((out / f"folds/repeat0-fold{fold}.json").read_text())["training"]}
            assert not images & seen
            tested.update(images)
        assert tested == Counter(listed)


def test_failed_children_are_named_and_the_others_go_on(crossed, tiny_data, environment):
    out, _ = crossed
    # the sliding window of 32 pixels is too small for Swin UNETR
    done = run(line(tiny_data, out, networks="swin_unetr,drlse,unet"), environment)
    assert done.returncode == 1
    assert "4 of 6 children finished" in done.stdout
    for fold in range(2):
        assert f"swin_unetr-end_to_end repeat0-fold{fold} failed: " in done.stdout
        assert f"drlse repeat0-fold{fold}: finished" in done.stdout
    assert "spatial" in done.stdout
    assert "output.log" in done.stdout
    words = ["compare", "fluorescence_tumor-crossval", "--baseline", "unet", "--out", str(out / "c")]
    compared = run([sys.executable, "-m", "medseg", *words], environment)
    assert compared.returncode == 0, compared.stderr
    rows = list(csv.DictReader((out / "c" / "comparison.csv").open()))
    assert {r["configuration"] for r in rows} == {*NETWORKS, "drlse"}
    assert {r["n"] for r in rows if r["metric"] == "dice"} == {"8"}
    overview = {r["configuration"]: r for r in csv.DictReader((out / "c" / "runs.csv").open())}
    assert overview["swin_unetr-end_to_end"]["failed_runs"] == "2"
    assert (out / "c" / "report.html").read_text().count("data:image/jpeg") == 12, "overlays of the worst cases"


def test_other_settings_need_another_folder(crossed, tiny_data, environment):
    out, _ = crossed
    done = run([*line(tiny_data, out), "--set", "learning_rate=0.1"], environment)
    assert done.returncode == 1
    assert "holds a cross-validation with other settings" in done.stderr
    assert "choose another --out" in done.stderr


def test_an_ensemble_of_the_folds_is_one_predictor(crossed, tiny_data, environment):
    out, _ = crossed
    folds = [out / NETWORKS[0] / f"repeat0-fold{f}" for f in range(2)]
    target = out.parent / "ensemble"
    done = run([sys.executable, "-m", "medseg", "ensemble", *map(str, folds), "--out", str(target)], environment)
    assert done.returncode == 0, done.stderr
    evaluated = run(bundle_command(str(target / "configs" / "evaluate.yaml")), environment)
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    rows = list(csv.DictReader((target / "evaluation" / "held_out" / "per_image.csv").open()))
    held_out = {i["image"] for i in json.loads((tiny_data / "datalist.json").read_text())["test"]}
    assert {str(Path(r["image"]).relative_to(tiny_data)) for r in rows} == held_out, "only what no member has seen"
    words = ["compare", "fluorescence_tumor-crossval", "--part", "held_out", "--format", "csv", "--metric", "dice"]
    compared = run([sys.executable, "-m", "medseg", *words], environment)
    table = list(csv.DictReader(compared.stdout.splitlines()))
    assert {"unet-end_to_end", "unet-end_to_end-ensemble"} <= {r["configuration"] for r in table}, compared.stderr
    assert {r["n"] for r in table} == {"2"}
    new = target.parent / "images"
    new.mkdir()
    (new / "a.png").write_bytes((tiny_data / "images" / "abfm_0000.png").read_bytes())
    segmented = run(bundle_command(str(target / "configs" / "inference.yaml"), dataset_dir=new), environment)
    assert segmented.returncode == 0, segmented.stderr[-3000:]
    assert (target / "predictions" / "a_seg.png").is_file()
    states = [torch.load(f / "models" / "model.pt", weights_only=True) for f in (*folds, target)]
    key = next(iter(states[0]))
    for i in range(2):
        torch.testing.assert_close(states[2][f"networks.{i}.{key}"], states[i][key])
    again = run([sys.executable, "-m", "medseg", "ensemble", *map(str, folds), "--out", str(target)], environment)
    assert "not empty" in again.stderr
    mixed = [str(folds[0]), str(out / NETWORKS[1] / "repeat0-fold0")]
    other = run([sys.executable, "-m", "medseg", "ensemble", *mixed, "--out", str(target.parent / "x")], environment)
    assert "differ in network_name" in other.stderr


def test_an_orphan_is_waited_for(tmp_path, caplog):
    child = Child("unet", None, 0, 0, (), (), tmp_path)
    ready = _no_orphan(child)
    assert ready()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True) as orphan:
        started = psutil.Process(orphan.pid).create_time()
        (tmp_path / "running.pid").write_text(f"{orphan.pid} {started} {platform.node()}")
        assert not ready()
        orphan.communicate("\n")
    assert ready()
    assert "waiting for it" in caplog.text
    # the same number, but another process or another machine
    for content in (f"{os.getpid()} 1.0 {platform.node()}", "1 1.0 elsewhere"):
        (tmp_path / "running.pid").write_text(content)
        assert ready()


@pytest.mark.parametrize(
    ("log", "returncode", "expected"),
    [
        ("error: old\n{0}: again\nhello\nerror: 2 problem(s)\n  - a\n  - b\n", 1, "2 problem(s)\n  - a\n  - b"),
        ("error: old\n{0}: again\nTraceback\nKeyError: 'x'\n", 1, "KeyError: 'x'"),
        ("{0}: again\nepoch 3\n", -9, "ended by signal 9 after: epoch 3"),
        ("{0}: again\n", 2, "exit code 2"),
        ("", 1, "exit code 1"),
    ],
)  # fmt: skip
def test_why_a_child_failed_is_what_its_last_attempt_said(tmp_path, log, returncode, expected):
    (tmp_path / "output.log").write_text(log.format(ATTEMPT))
    assert _reason(Child("unet", None, 0, 0, (), (), tmp_path), returncode) == expected
