"""Train, evaluate, infer and read the MLflow run back, each as a user would type it."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, TINY, bundle_command
from mlflow import MlflowClient
from PIL import Image

from medseg.io.overlay import GREEN
from medseg.metrics import dice

pytestmark = pytest.mark.usefixtures("one_store")


@pytest.fixture(scope="module")
def trained(tiny_data, tmp_path_factory, store):
    """A run of three epochs, shared by the tests below."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = {**TINY, "dataset_dir": tiny_data, "output_dir": out, "max_epochs": 3, "network_name": "unetpp"}
    line = bundle_command(f"{CONFIGS}/train.yaml", **arguments)
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=300, env={**os.environ, "MLFLOW_TRACKING_URI": store}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out, done.stdout


def mlflow_run(folder: Path):
    record = json.loads((folder / "mlflow_run.json").read_text())
    client = MlflowClient(record["tracking_uri"])
    return client, client.get_run(record["run_id"])


def artifacts(client, run_id: str, path: str | None = None) -> set[str]:
    found = set()
    for entry in client.list_artifacts(run_id, path):
        found |= artifacts(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def test_training_writes_a_run_folder_and_plain_lines(trained):
    out, printed = trained
    assert re.findall(r"INFO epoch (\d/\d) train_loss=", printed) == ["1/3", "2/3", "3/3"]
    log = (out / "train.log").read_text().splitlines()
    assert len(log) == 3
    assert all("train_loss=" in line and "val_dice=" in line for line in log)
    state = torch.load(out / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert {p.name for p in (out / "overlays").iterdir()} == {"worst.png", "median.png", "best.png"}
    assert not list(Path("bundles").rglob("*.pt")), "a run never writes into the bundle"


def test_training_is_recorded(trained):
    client, run = mlflow_run(trained[0])
    assert run.info.status == "FINISHED"
    params, metrics, tags = run.data.params, run.data.metrics, run.data.tags
    # every scalar of the resolved config, with arguments and references resolved
    expected = {
        "network_name": "unetpp",
        "max_epochs": "3",
        "train.trainer.max_epochs": "3",
        "optimizer.lr": "0.001",
        "roi_size.0": "32",
        "seed": "0",
        "networks.unetpp.encoder_name": "resnet18",
        "augment.2.prob": "0.75",
    }
    assert {k: params.get(k) for k in expected} == expected
    assert int(params["trainable_parameters"]) == int(params["parameters"]) > 100_000
    for name in ("train_loss", "val_loss", "val_dice", "learning_rate", "epoch_seconds", "images_per_second"):
        history = client.get_metric_history(run.info.run_id, name)
        assert [m.step for m in history] == [0, 1, 2], name
    assert metrics["peak_memory_gb"] > 0.1
    assert {"best_val_dice", "best_val_hausdorff_distance", "best_val_fpsr", "best_val_fnsr_sd"} <= set(metrics)
    assert len(tags["datalist.sha256"]) == 64
    assert tags["training_items"] == "8"
    assert tags["version.monai"]
    assert tags["task"] == "fluorescence_tumor"
    assert run.inputs.dataset_inputs[0].dataset.digest == tags["datalist.sha256"][:32]
    names = artifacts(client, run.info.run_id)
    assert {f"configs/{n}.yaml" for n in ("train", "evaluate", "inference")} <= names
    assert {f"best_val/overlays/{n}.png" for n in ("worst", "median", "best")} <= names
    tables = {f"best_val/{n}" for n in ("per_image.csv", "per_image.json", "metrics.json", "reliability.png")}
    assert {"models/model.pt", "train.log", *tables} <= names
    assert tags["data.style"] == "abfm"
    assert "evaluate.yaml" in tags["mlflow.note.content"]
    assert metrics["train_seconds"] >= metrics["epoch_seconds"] > 0
    assert 0 <= metrics["best_val_ece"] <= 1


def test_evaluation_scores_the_test_part_and_is_recorded(trained, bundle_run):
    out, _ = trained
    done = bundle_run(str(out / "configs" / "evaluate.yaml"))
    assert "2 cases, " in done.stdout
    rows = list(csv.DictReader((out / "evaluation" / "test" / "per_image.csv").open()))
    assert [Path(r["image"]).name for r in rows] == ["abfm_0000.png", "abfm_0001.png"]
    for row in rows:
        assert float(row["dice"]) + float(row["fpsr"]) + float(row["fnsr"]) == pytest.approx(1)
    summary = json.loads((out / "evaluation" / "test" / "metrics.json").read_text())
    assert summary["metrics"]["dice"]["mean"] == pytest.approx(np.mean([float(r["dice"]) for r in rows]))
    _, run = mlflow_run(out / "evaluation")
    assert run.data.metrics["test_dice"] == pytest.approx(summary["metrics"]["dice"]["mean"])
    assert run.data.tags["training_run_id"] == json.loads((out / "mlflow_run.json").read_text())["run_id"]


def test_source_configs_evaluate_with_arguments(trained, bundle_run, tiny_data, tmp_path):
    """The long form, without the run's own config, gives the same numbers."""
    out, _ = trained
    bundle_run(
        [f"{CONFIGS}/train.yaml", f"{CONFIGS}/evaluate.yaml"],
        **{**TINY, "dataset_dir": tiny_data, "output_dir": tmp_path / "e", "network_name": "unetpp"},
        ckpt_path=out / "models" / "model.pt",
        part="validation",
    )
    best = json.loads((out / "metrics.json").read_text())
    assert json.loads((tmp_path / "e" / "validation" / "metrics.json").read_text()) == best


@pytest.fixture
def mixed_folder(tiny_data, tmp_path):
    """Grey and RGB, 8 and 16 bit, PNG, TIFF, JPEG and DICOM, odd sizes, equal stems, and things that are no images."""
    from io_formats import write_dicom

    folder = tmp_path / "mixed"
    folder.mkdir()
    grey = np.asarray(Image.open(tiny_data / "images" / "abfm_0003.png"))
    odd = np.pad(grey, ((0, 13), (0, 47)), mode="reflect")  # 77 x 111
    Image.fromarray(odd).save(folder / "odd.png")
    Image.fromarray(odd.astype(np.uint16) * 257).save(folder / "odd.tif")
    Image.fromarray(np.stack([odd] * 3, -1)).save(folder / "colour.jpg", quality=95)
    Image.fromarray(grey[:20, :24]).save(folder / "tiny.png")
    write_dicom(folder / "scan.dcm", odd.astype(np.uint16) * 16)
    write_dicom(folder / "IM0001", odd.astype(np.uint16) * 16)
    Image.fromarray(odd).save(folder / "zlast.png")  # after a DICOM: MONAI's SaveImaged must not keep its axes
    (folder / "notes.txt").write_text("not an image")
    (folder / "LICENSE").write_text("not DICOM either")
    return folder, odd


def test_inference_on_a_folder_of_everything(trained, bundle_run, mixed_folder, tmp_path):
    out, _ = trained
    folder, odd = mixed_folder
    done = bundle_run(str(out / "configs" / "inference.yaml"), dataset_dir=folder, output_dir=tmp_path / "p")
    masks = {p.name: np.asarray(Image.open(p)) for p in (tmp_path / "p").glob("*.png")}
    names = {"odd.png_seg", "odd.tif_seg", "colour_seg", "tiny_seg", "scan_seg", "IM0001_seg", "zlast_seg"}
    assert set(masks) == {f"{n}.png" for n in names}
    assert all(set(np.unique(m)) <= {0, 255} for m in masks.values())
    assert masks.pop("tiny_seg.png").shape == (20, 24)
    assert {m.shape for m in masks.values()} == {odd.shape}
    # one picture in seven files: standardisation makes the bit depth irrelevant
    reference = masks["odd.png_seg.png"] > 0
    assert reference.any()
    for name in ("odd.tif_seg", "scan_seg", "IM0001_seg", "zlast_seg"):
        np.testing.assert_array_equal(masks[f"{name}.png"] > 0, reference, err_msg=name)
    assert dice(masks["colour_seg.png"] > 0, reference) > 0.9
    rows = list(csv.DictReader((tmp_path / "p" / "predictions.csv").open()))
    assert {Path(r["file"]).name for r in rows} == {
        "odd.png",
        "odd.tif",
        "colour.jpg",
        "tiny.png",
        "scan.dcm",
        "IM0001",
        "zlast.png",
    }
    row = next(r for r in rows if r["file"].endswith("odd.png"))
    assert int(row["area_pixels"]) == reference.sum()
    assert all(Path(r["overlay"]).is_file() for r in rows)
    assert "7 of 7 images" in done.stdout


def test_inference_keeps_subfolders_and_draws_truth(trained, bundle_run, tiny_data, tmp_path):
    out, _ = trained
    for name in ("a", "b"):
        for part in ("images", "masks"):
            (tmp_path / part / name).mkdir(parents=True)
            picture = tiny_data / part / "abfm_0004.png"
            (tmp_path / part / name / "x.png").write_bytes(picture.read_bytes())
    bundle_run(
        str(out / "configs" / "inference.yaml"),
        dataset_dir=tmp_path / "images",
        pattern="**/*",
        label_dir=tmp_path / "masks",
        output_dir=tmp_path / "p",
    )
    for name in ("a", "b"):
        assert (tmp_path / "p" / name / "x_seg.png").is_file()
        picture = np.asarray(Image.open(tmp_path / "p" / "overlays" / name / "x.png.png"))
        assert (picture == GREEN).all(-1).any()


def test_inference_without_medseg_and_lightning(trained, mixed_folder, tmp_path):
    """What a collaborator has: stock MONAI and the network's library. The masks are the same; the extras are not."""
    out, _ = trained
    folder, _ = mixed_folder
    block = (
        "import sys, runpy\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('medseg', 'pytorch_lightning', 'lightning'):\n"
        "            raise ModuleNotFoundError(f'no {name} here', name=name)\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] == 'medseg' else found(name, *a)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv = ['monai.bundle', *sys.argv[1:]]\n"
        "runpy.run_module('monai.bundle', run_name='__main__')\n"
    )
    line = [sys.executable, "-c", block, "run", "--config_file", str(out / "configs" / "inference.yaml")]
    line += ["--dataset_dir", str(folder), "--output_dir", str(tmp_path / "p")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "p").glob("*_seg.png"))) == 7
    assert not (tmp_path / "p" / "predictions.csv").exists()


def test_an_empty_folder_and_a_movie_are_errors(trained, bundle_run, tmp_path):
    from io_formats import write_dicom

    out, _ = trained
    (tmp_path / "empty").mkdir()
    done = bundle_run(str(out / "configs" / "inference.yaml"), check=False, dataset_dir=tmp_path / "empty")
    assert done.returncode != 0
    assert "no images to segment" in done.stderr.splitlines()[-1]
    write_dicom(tmp_path / "empty" / "movie.dcm", np.zeros((3, 40, 60), np.uint8), frames=3)
    done = bundle_run(str(out / "configs" / "inference.yaml"), check=False, dataset_dir=tmp_path / "empty")
    assert done.returncode != 0
    assert "movie.dcm could not be segmented" in done.stderr


def test_a_broken_image_is_named_and_the_others_are_kept(trained, bundle_run, tiny_data, tmp_path):
    out, _ = trained
    folder = tmp_path / "images"
    folder.mkdir()
    content = [(tiny_data / "images" / f"abfm_000{i}.png").read_bytes() for i in range(2)]
    (folder / "a.png").write_bytes(content[0])
    (folder / "b.png").write_bytes(content[1][: len(content[1]) // 2])
    done = bundle_run(
        str(out / "configs" / "inference.yaml"), check=False, dataset_dir=folder, output_dir=tmp_path / "p"
    )
    assert done.returncode != 0
    assert "b.png could not be segmented: " in done.stderr.splitlines()[-1]
    assert (tmp_path / "p" / "a_seg.png").is_file()
    assert len((tmp_path / "p" / "predictions.csv").read_text().splitlines()) == 2
    assert not list((tmp_path / "p").rglob("*.part"))


def test_missing_weights_and_a_mistyped_network_say_what_to_do(bundle_run, tiny_data):
    config = f"{CONFIGS}/inference.yaml"
    done = bundle_run(config, check=False, dataset_dir=tiny_data / "images")
    assert "models/model.pt: train first" in done.stderr.splitlines()[-1]
    done = bundle_run(config, check=False, dataset_dir=tiny_data / "images", network_name="unett")
    assert "choose from unet, unetpp, deeplabv3plus, swin_unetr" in done.stderr.splitlines()[-1]


def test_a_broken_list_stops_before_training(bundle_run, tiny_data, tmp_path):
    content = json.loads((tiny_data / "datalist.json").read_text())
    content["training"][3]["label"] = "masks/gone.png"
    (tmp_path / "list.json").write_text(json.dumps(content))
    done = bundle_run(
        f"{CONFIGS}/train.yaml", check=False, dataset_dir=tiny_data, datalist=tmp_path / "list.json",
        output_dir=tmp_path / "run",
    )  # fmt: skip
    assert done.returncode != 0
    assert "training[3]: label" in done.stderr.splitlines()[-1]
    assert "gone.png does not exist" in done.stderr
    assert not (tmp_path / "run").exists()


def test_drlse_is_scored_by_the_same_code(bundle_run, tiny_data, tmp_path):
    files = [f"{CONFIGS}/{n}.yaml" for n in ("train", "evaluate", "drlse")]
    bundle_run(files, dataset_dir=tiny_data, output_dir=tmp_path / "d", image_size="[64,64]")
    rows = list(csv.DictReader((tmp_path / "d" / "test" / "per_image.csv").open()))
    assert len(rows) == 2
    assert all(0 < float(r["dice"]) < 1 for r in rows)
    _, run = mlflow_run(tmp_path / "d")
    assert run.data.tags["network"] == "drlse"
    assert "calibration" not in json.loads((tmp_path / "d" / "test" / "metrics.json").read_text())


@pytest.mark.parametrize("network", ["deeplabv3plus", "swin_unetr"])
def test_the_other_networks_train(bundle_run, tiny_data, tmp_path, network):
    arguments = {**TINY, "encoder_depth": 5, "feature_size": 12, "roi_size": "[64,64]", "max_epochs": 1}
    bundle_run(
        f"{CONFIGS}/train.yaml", dataset_dir=tiny_data, output_dir=tmp_path / "r", network_name=network, **arguments
    )
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["cases"] == 2


def test_transfer_keeps_the_encoder(bundle_run, tiny_data, tmp_path):
    import segmentation_models_pytorch as smp

    encoder = smp.encoders.get_encoder("resnet18", in_channels=3, depth=3, weights=None).state_dict()
    torch.save(encoder, tmp_path / "encoder.pt")
    out = tmp_path / "r"
    bundle_run(
        f"{CONFIGS}/train.yaml", dataset_dir=tiny_data, output_dir=out, network_name="unet", mode="transfer",
        encoder_weights=tmp_path / "encoder.pt", max_epochs=2, **TINY,
    )  # fmt: skip
    state = torch.load(out / "models" / "model.pt", weights_only=True)
    for key, value in encoder.items():
        if key != "conv1.weight":
            torch.testing.assert_close(state[f"encoder.{key}"], value, rtol=0, atol=0)
    _, run = mlflow_run(out)
    assert int(run.data.params["trainable_parameters"]) < int(run.data.params["parameters"])


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data" / "nir_fluorescence"


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs ../shared/data/nir_fluorescence, which lies beside a developer's checkout only"
)
def test_real_near_infrared_images(trained, bundle_run, tmp_path):
    out, _ = trained
    bundle_run(
        str(out / "configs" / "inference.yaml"), dataset_dir=SHARED, output_dir=tmp_path / "p", roi_size="[64,64]"
    )
    assert len(list((tmp_path / "p" / "overlays").glob("*.png"))) == 3
    assert {Image.open(p).size for p in (tmp_path / "p").glob("*_seg.png")} == {(640, 512)}
