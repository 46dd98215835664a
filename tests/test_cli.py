from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def medseg(*args: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "medseg", *args], capture_output=True, text=True, cwd=cwd, timeout=300)


def test_help_is_instant_and_free_of_torch():
    best = 9.0
    for _ in range(3):  # a busy machine stretches the wall clock: CPU seconds, of the fastest of three
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = medseg("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == 0
    assert all(
        command in done.stdout
        for command in ("list", "doctor", "simulate", "demo", "crossval", "compare", "ensemble", "paper")
    )
    assert best < 0.5


def test_text_commands_import_neither_torch_nor_monai():
    code = (
        "import sys\nsys.argv = ['medseg', 'list']\nfrom medseg.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'monai', 'mlflow', 'scipy', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_list_names_every_bundle():
    found = json.loads(medseg("list", "--json").stdout)
    assert {b["name"] for b in found} == {p.name for p in (REPOSITORY / "bundles").iterdir() if p.is_dir()}
    task = next(b for b in found if b["name"] == "fluorescence_tumor")
    assert task["networks"] == ["unet", "unetpp", "deeplabv3plus", "swin_unetr"]
    assert "Surgical Innovation" in task["paper"]
    assert "fluorescence_tumor" in medseg("list").stdout


def test_doctor_finds_everything_installed():
    done = medseg("doctor", "--json")
    findings = json.loads(done.stdout)
    assert done.returncode == 0, findings["problems"]
    assert findings["problems"] == []
    assert findings["versions"]["monai"]
    assert findings["tasks"]["fluorescence_tumor"]["missing"] == []


def test_simulate_writes_a_data_set(tmp_path):
    done = medseg("simulate", "fluorescence_tumor", "--out", str(tmp_path), "--count", "3", "--size", "64")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "datalist.json").read_text())
    assert content["numTraining"] + content["numTest"] == 3


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("simulate", "nonsense", "--out", "x", "--count", "1"), 1, "no task 'nonsense'; there are: "),
        (("simulate", "fluorescence_tumor", "--out", "x", "--count", "0"), 1, "at least 1 image"),
        (("simulate", "fluorescence_tumor", "--out", "x", "--count", "1", "--style", "abc"), 1, "choose from abfm"),
        (("simulate", "fluorescence_tumor"), 2, "--out"),
        (
            ("simulate", "cryoet_one_shot", "--out", "x", "--count", "22", "--set", "tilt=3"),
            1,
            "the options are models=",
        ),
        (
            ("simulate", "cryoet_one_shot", "--out", "x", "--count", "22", "--set", "folds=many"),
            1,
            "folds is a int, e.g. 5",
        ),
        (("import", "nonsense", "x", "--out", "y"), 1, "no layout 'nonsense' is known; there are: cos-net"),
        (("paper", "cryoet_one_shot", "--folds", "3"), 1, "the tables of cryoet_one_shot have no --folds"),
        (("fit-crf", "fluorescence_tumor", "x"), 1, "fluorescence_tumor has no `medseg fit_crf`"),
        (("fit-crf", "cryoet_one_shot", "x"), 1, "x is no finished run"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(args, code, message, tmp_path):
    done = medseg(*args)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_further_options_of_a_simulator(tmp_path):
    words = ("--out", str(tmp_path), "--count", "22", "--set", "method=analytic", "--set", "train_classes=12")
    done = medseg("simulate", "cryoet_one_shot", *words, "--set", "workers=1")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "datalist.json").read_text())
    assert (content["numTraining"], content["numTest"]) == (12, 10)


def test_outside_of_a_checkout_the_installed_one_is_used(tmp_path):
    assert "fluorescence_tumor" in medseg("list", cwd=tmp_path).stdout


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = medseg("demo", "fluorescence_tumor", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "choose another --out" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def demo(task: str, out: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, float]]:
    started = time.perf_counter()
    done = medseg("demo", task, "--out", str(out))
    seconds = time.perf_counter() - started
    assert done.returncode == 0, done.stderr[-3000:]
    assert seconds < 240
    return done, json.loads((out / "metrics.json").read_text())


@pytest.mark.slow
def test_the_demo_finds_structures_it_never_saw(tmp_path):
    _, metrics = demo("cryoet_one_shot", tmp_path / "demo")
    assert metrics["accuracy_2way"] >= 0.85
    assert metrics["dice"] >= max(0.65, metrics["dice_without_crf"])
    assert metrics["search_accuracy"] >= 0.4  # of 8
    assert (tmp_path / "demo" / "predictions" / "overlays" / "match_matrix.png").is_file()


@pytest.mark.slow
def test_demo_reaches_its_scores_in_time(tmp_path):
    done, metrics = demo("fluorescence_tumor", tmp_path / "demo")
    assert metrics["dice"] >= 0.85
    assert metrics["dice_abfm"] >= 0.85
    assert metrics["dice_dthp"] >= 0.85
    assert 0 < metrics["dice_dthl"] < 1
    # The last lines are the table that metrics.json holds.
    table = [line.split() for line in done.stdout.strip().splitlines()[-len(metrics) :]]
    assert [name for name, _ in table] == list(metrics)
    assert all(float(value) == pytest.approx(metrics[name], abs=1e-4) for name, value in table)
    assert len(list((tmp_path / "demo" / "predictions" / "overlays").glob("*.png"))) == 12
