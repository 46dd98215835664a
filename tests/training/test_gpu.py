"""What needs a CUDA device: ``python -m pytest -m gpu``."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import CONFIGS, TINY
from mlflow import MlflowClient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("network", ["unet", "unetpp", "deeplabv3plus", "swin_unetr"])
def test_training_and_inference_run_on_the_gpu_in_bf16(bundle_run, tiny_data, tmp_path, network):
    arguments = {**TINY, "encoder_depth": 5, "feature_size": 12, "roi_size": "[64,64]", "max_epochs": 2}
    if network in ("unet", "unetpp"):
        arguments |= {"decoder_channels": "[64,32,16,8,8]"}
    out = tmp_path / "run"
    bundle_run(f"{CONFIGS}/train.yaml", dataset_dir=tiny_data, output_dir=out, network_name=network, **arguments)
    record = json.loads((out / "mlflow_run.json").read_text())
    run = MlflowClient(record["tracking_uri"]).get_run(record["run_id"])
    assert run.data.params["precision"] == "bf16-mixed"
    assert "CPU" not in run.data.tags["machine"]
    assert 0 < run.data.metrics["peak_memory_gb"] < 20
    bundle_run(str(out / "configs" / "inference.yaml"), dataset_dir=tiny_data / "images", output_dir=tmp_path / "p")
    assert len(list((tmp_path / "p").glob("*_seg.png"))) == 10
