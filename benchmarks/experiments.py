"""What ``medseg crossval`` costs per child over the plain command, and how long ``medseg compare`` takes.

The cross-validation is raced against its own children typed by hand: the commands that ``--dry-run`` prints, one after
another. Making the store, the parent run and the folds is part of the race. ``medseg compare`` reads a store of
8 configurations x 5 folds x 5 repeats, 100 cases and 4 metrics each, with as many parameters as a real run has.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TINY = {
    "encoder": "resnet18", "encoder_depth": "3", "decoder_channels": "[32,16,8]", "roi_size": "[32,32]",
    "batch_size": "2", "max_epochs": "1",
}  # fmt: skip


def medseg(*words: str, store: Path) -> str:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{store}"}
    line = [sys.executable, "-m", "medseg", *words]
    return subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout


def crossval_overhead(folder: Path, repeats: int) -> None:
    data = folder / "data"
    medseg("simulate", "fluorescence_tumor", "--out", str(data), "--count", "10", "--size", "64", store=folder / "x.db")
    settings = [word for k, v in {**TINY, "dataset_dir": str(data)}.items() for word in ("--set", f"{k}={v}")]
    overheads, children = [], 4
    for repeat in range(-1, repeats):  # the first round warms up
        out, store = folder / f"crossval{repeat}", folder / f"crossval{repeat}.db"
        line = [
            "crossval",
            "fluorescence_tumor",
            "--networks",
            "unet",
            "--folds",
            str(children),
            "--out",
            str(out),
            *settings,
        ]
        commands = [t for t in medseg(*line, "--dry-run", store=store).splitlines() if t.startswith("python ")]
        started = time.perf_counter()
        medseg(*line, store=store)
        crossed = time.perf_counter() - started
        started = time.perf_counter()
        for command in commands:  # the same folds, elsewhere, into a store that is made on the way as well
            words = shlex.split(command.replace(f"{out}/unet", f"{out}/plain"))
            environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder / f'plain{repeat}.db'}"}
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, check=True, capture_output=True)
        plain = time.perf_counter() - started
        print(f"crossval of {children} children {crossed:.1f} s, the plain commands {plain:.1f} s", flush=True)
        if repeat >= 0:
            overheads.append((crossed - plain) / children)
    print(f"| `medseg crossval`, overhead per child (median of {repeats}) | {statistics.median(overheads):+.2f} s |")


def compare_seconds(folder: Path, repeats: int) -> None:
    from fake_store import FakeStore

    store = FakeStore(folder, "many")
    rng = np.random.default_rng(0)
    metrics = ("dice", "hausdorff_distance", "fpsr", "fnsr")
    params = {f"train.setting.{i}": "value of usual length" for i in range(150)}
    for configuration in range(8):
        for repeat in range(5):
            for fold in range(5):
                cases = [f"images/{100 * fold + i:04d}.png" for i in range(100)]
                scores = {m: rng.random(100) for m in metrics}
                fields = {"style": ["abfm", "dthp"] * 50, "patient": [f"p{100 * fold + i}" for i in range(100)]}
                store.run(
                    f"net{configuration}-end_to_end", scores, cases, fold, repeat, fields, params, history=50,
                    pictures=fold == 0, data=f"{repeat}{fold}" * 32,
                )  # fmt: skip
    for name, extra in (("table", []), ("table, report.html and CSV files", ["--out", str(folder / "out")])):
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            medseg("compare", "many", *extra, store=folder / "mlflow.db")
            times.append(time.perf_counter() - started)
        what = f"`medseg compare`, 200 runs x 100 cases: {name} (median of {repeats})"
        print(f"| {what} | {statistics.median(times[1:]):.1f} s |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--races", nargs="+", choices=["crossval", "compare"], default=["crossval", "compare"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "compare" in options.races:
            compare_seconds(Path(folder), options.repeats)
        if "crossval" in options.races:
            crossval_overhead(Path(folder), options.repeats)


if __name__ == "__main__":
    main()
