"""A small hand-made bundle in the model zoo's layout, to break in every way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

METADATA = {
    "schema": "https://example.org/meta_schema_20240725.json",
    "version": "0.1.0",
    "changelog": {"0.1.0": "first"},
    "monai_version": "1.6.1",
    "pytorch_version": "2.15.0",
    "numpy_version": "2.4.6",
    "required_packages_version": {"nibabel": "5.4.2"},
    "task": "Blobs",
    "description": "Segments blobs",
    "authors": "A. Nobody",
    "copyright": "Copyright (c) A. Nobody",
    "network_data_format": {
        "inputs": {
            "image": {
                "type": "image",
                "format": "magnitude",
                "num_channels": 1,
                "spatial_shape": ["4*n", "4*n"],
                "dtype": "float32",
                "value_range": [],
            }
        },
        "outputs": {
            "pred": {
                "type": "image",
                "format": "segmentation",
                "num_channels": 2,
                "spatial_shape": ["4*n", "4*n"],
                "dtype": "float32",
                "value_range": [0, 1],
                "channel_def": {"0": "background", "1": "blob"},
            }
        },
    },
}

#: As bundles of the zoo are written.
INFERENCE = {
    "imports": ["$import glob", "$import os"],
    "bundle_root": ".",
    "dataset_dir": "/workspace/data",
    "output_dir": "$@bundle_root + '/eval'",
    "ckpt_path": "$@bundle_root + '/models/model.pt'",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.png')))",
    "network_def": {
        "_target_": "UNet",
        "spatial_dims": 2,
        "in_channels": 1,
        "out_channels": 2,
        "channels": [4, 8],
        "strides": [2],
    },
    "network": "$@network_def.to(@device)",
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image", "reader": "PILReader"},
            {"_target_": "EnsureChannelFirstd", "keys": "image"},
            {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x.float().mean(0, keepdim=True)"},
            {"_target_": "NormalizeIntensityd", "keys": "image"},
        ],
    },
    "dataset": {
        "_target_": "Dataset",
        "data": "$[{'image': i} for i in @datalist]",
        "transform": "@preprocessing",
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32]},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_dtype": "$np.uint8"},
        ],
    },
    "handlers": [
        {"_target_": "CheckpointLoader", "load_path": "@ckpt_path", "load_dict": {"model": "@network"}},
        {"_target_": "StatsHandler", "output_transform": "$monai.handlers.from_engine(['pred'], first=True)"},
    ],
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
        "val_handlers": "@handlers",
    },
    "initialize": ["$monai.utils.set_determinism(seed=123)", "$setattr(torch.backends.cudnn, 'benchmark', True)"],
    "run": ["$@evaluator.run()"],
}


def write_sums(folder: Path) -> None:
    """``SHA256SUMS`` of what is there now: an attacker can do that too."""
    names = sorted(
        f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != "SHA256SUMS"
    )
    lines = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (folder / "SHA256SUMS").write_text("".join(lines))


def small_bundle(folder: Path) -> Path:
    """A sound bundle of a stranger: two weight files, the network's layout, checksums."""
    from monai.networks.nets import UNet

    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    (folder / "LICENSE").write_text("Apache-2.0")
    (folder / "docs" / "README.md").write_text("# Blobs\n")
    (folder / "configs" / "metadata.json").write_text(json.dumps(METADATA))
    (folder / "configs" / "inference.json").write_text(json.dumps(INFERENCE))
    torch.manual_seed(0)
    state = UNet(2, 1, 2, [4, 8], [2]).state_dict()
    torch.save(state, folder / "models" / "model.pt")
    save_file(state, folder / "models" / "model.safetensors")
    layout = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in state.items()}
    (folder / "models" / "network_layout.json").write_text(json.dumps(layout))
    write_sums(folder)
    return folder


def medseg(*words: object, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The command as a user has it."""
    line = [sys.executable, "-m", "medseg", *map(str, words)]
    done = subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=500)
    if check and done.returncode:
        pytest.fail(f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done
