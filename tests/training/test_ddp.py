"""Training with two processes on the CPU: the same config, one data coverage, one MLflow run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CONFIGS, REPOSITORY, TINY, bundle_command
from mlflow import MlflowClient

#: At depth 3 the encoder has a last level that is never used and gets no gradient.
STRATEGY = "ddp_find_unused_parameters_true"


def arguments(data: Path, out: Path, overlay: Path) -> list[str]:
    (overlay.parent / "seen").mkdir()
    overlay.write_text(
        f"+train::handlers:\n- {{_target_: coverage_probe.CoverageProbe, folder: {str(overlay.parent / 'seen')!r}}}\n"
    )
    settings = {**TINY, "dataset_dir": data, "output_dir": out, "network_name": "unet", "max_epochs": 2}
    settings |= {"devices": 2, "strategy": STRATEGY, "score": "[test]"}
    return bundle_command([f"{CONFIGS}/train.yaml", str(overlay)], **settings)


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes_share_the_data_and_one_run(tiny_data, tmp_path, launcher):
    command = arguments(tiny_data, tmp_path / "run", tmp_path / "probe.yaml")
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]

    items = json.loads((tiny_data / "datalist.json").read_text())["training"]
    trained = {str(tiny_data / i["image"]) for i in items if i["fold"] != 0}
    for epoch in range(2):
        shares = [(tmp_path / "seen" / f"epoch{epoch}-rank{rank}.txt").read_text().split() for rank in range(2)]
        assert set(shares[0]) | set(shares[1]) == trained, "all images in every epoch"
        # 6 images in batches of 2 x 2: the last batch is filled up with 2 that come twice
        assert [len(share) for share in shares] == [4, 4]
        assert len(set(shares[0]) & set(shares[1])) <= 2

    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    runs = client.search_runs([client.get_experiment_by_name("fluorescence_tumor").experiment_id])
    assert [r.info.status for r in runs] == ["FINISHED"], "one run, not two"
    assert runs[0].data.metrics["best_val_cases"] == 2
    assert runs[0].data.metrics["test_cases"] == 2
    assert [m.step for m in client.get_metric_history(runs[0].info.run_id, "train_loss")] == [0, 1]
    assert len((tmp_path / "run" / "train.log").read_text().splitlines()) == 2
