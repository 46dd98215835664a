"""Shared fixtures: everything is made on the spot, nothing reaches the network or the user's MLflow store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sample_bundle

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = "bundles/fluorescence_tumor/configs"

#: Small enough for a test: what the end-to-end runs override.
TINY = {
    "encoder": "resnet18",
    "encoder_depth": 3,
    "decoder_channels": "[32,16,8]",
    "roi_size": "[32,32]",
    "batch_size": 2,
}


def bundle_command(config: str | list[str], **arguments: object) -> list[str]:
    """``python -m monai.bundle run`` as a list of words."""
    files = config if isinstance(config, str) else "[" + ",".join(f"'{c}'" for c in config) + "]"
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, *words]


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow store that the tests of a file share."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def one_store(monkeypatch: pytest.MonkeyPatch, store: str, _isolated: None) -> None:
    """Let a test record into the store of its file."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 10 images of 64 x 64: 8 in the folds 0 to 4, 2 to test."""
    from medseg.tasks.fluorescence_tumor.simulate import simulate

    out = tmp_path_factory.mktemp("data")
    simulate(out, 10, seed=7, style=["abfm"], size=64)
    return out


@pytest.fixture(scope="session")
def tiny_subtomograms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 66 subtomograms of 32^3, 3 of each class: 42 in the folds 0 to 2, 24 to test."""
    from medseg.tasks.cryoet_one_shot.simulate import simulate

    out = tmp_path_factory.mktemp("subtomograms")
    simulate(out, 66, seed=7, method="analytic", folds=3, workers=1)
    return out


@pytest.fixture(scope="session")
def tiny_breasts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 8 breasts in two views of 16 x 48 x 48: 12 views in the folds 0 to 2, 4 to test."""
    from medseg.tasks.dbt_mass.simulate import simulate

    out = tmp_path_factory.mktemp("breasts")
    simulate(out, 8, seed=7, shape="16,48,48", spacing="4,2.5,2.5", test_share=0.25, folds=3, workers=1)
    return out


@pytest.fixture
def bundle_run() -> Callable[..., subprocess.CompletedProcess[str]]:
    """``python -m monai.bundle run`` in a process of its own, from the repository root."""

    def run(
        config: str | list[str], check: bool = True, env: dict[str, str] | None = None, **arguments: object
    ) -> subprocess.CompletedProcess[str]:
        line = bundle_command(config, **arguments)
        done = subprocess.run(
            line, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, **(env or {})}, timeout=500
        )
        if check and done.returncode:
            pytest.fail(f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run


@pytest.fixture
def write_list() -> Callable[[Path, dict], Path]:
    def write(folder: Path, content: object) -> Path:
        path = folder / "datalist.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def disc() -> Callable[..., np.ndarray]:
    """A boolean disc in a square of ``side`` pixels."""

    def make(side: int, radius: float, centre: tuple[float, float] | None = None) -> np.ndarray:
        y, x = np.mgrid[:side, :side]
        cy, cx = centre or ((side - 1) / 2, (side - 1) / 2)
        return (y - cy) ** 2 + (x - cx) ** 2 <= radius**2

    return make


@pytest.fixture
def small_bundle(tmp_path) -> Path:
    """A sound bundle of a stranger."""
    return sample_bundle.small_bundle(tmp_path / "blobs")


@pytest.fixture
def edit(small_bundle: Path) -> Callable[..., Path]:
    """Change ``inference.json`` of the small bundle and bring the checksums up to date."""

    def change(**keys: object) -> Path:
        file = small_bundle / "configs" / "inference.json"
        config = json.loads(file.read_text())
        config.update(keys)
        file.write_text(json.dumps(config))
        sample_bundle.write_sums(small_bundle)
        return small_bundle

    return change


@pytest.fixture(scope="session")
def promoted(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A copy of the bundles with a finished run in ``run/``, whose weights are promoted."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("bundles", "transforms"):
        shutil.copytree(REPOSITORY / part, folder / part, ignore=shutil.ignore_patterns("*.pt"))
    arguments = {
        "dataset_dir": tiny_data, "output_dir": folder / "run", "network_name": "unet", "encoder": "mobilenet_v2",
        "encoder_depth": 3, "decoder_channels": "[32,16,8]", "roi_size": "[64,64]", "batch_size": 4, "max_epochs": 24,
        "val_interval": 8, "learning_rate": 0.003, "score": "[test]",
        "tracking_uri": f"sqlite:///{folder / 'mlflow.db'}",
    }  # fmt: skip
    words = [w for k, v in arguments.items() for w in (f"--{k}", str(v))]
    config = "bundles/fluorescence_tumor/configs/train.yaml"
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=500, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]
    sample_bundle.medseg("promote", "run", cwd=folder)
    return folder


@pytest.fixture(scope="session")
def packed(promoted: Path) -> Path:
    """The zip of the promoted weights."""
    sample_bundle.medseg("pack", "fluorescence_tumor", cwd=promoted)
    return promoted / "dist" / "fluorescence_tumor_v0.1.1.zip"
