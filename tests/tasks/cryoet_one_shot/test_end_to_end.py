"""Train, score, resume, search and fit the CRF, each as a user would type it."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, bundle_command
from mlflow import MlflowClient
from monai.bundle import create_workflow
from PIL import Image
from sample_bundle import medseg

from medseg.bundles.configs import read_config
from medseg.crf import DenseCRF3D
from medseg.io.mrc import read_mrc, write_mrc
from medseg.metrics import dice
from medseg.tasks.cryoet_one_shot import fit_crf
from medseg.tasks.cryoet_one_shot.episodes import NWayAccuracy
from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.tasks.cryoet_one_shot.refine import MaskRefiner, grey_levels

TRAIN = "bundles/cryoet_one_shot/configs/train.yaml"
TINY = {
    "channels": 4, "stem_stride": 2, "feature_size": 16, "n_way": 4, "batch_size": 4, "steps_per_epoch": 3,
    "max_epochs": 2, "test_episodes": 3, "learning_rate": 0.01,
}  # fmt: skip
WAYS = [f"accuracy_{n}way" for n in (2, 4, 6, 8)]


pytestmark = pytest.mark.usefixtures("one_store")


@pytest.fixture(scope="module")
def datalist(tiny_subtomograms, tmp_path_factory) -> Path:
    """Folds of whole classes: 4 validate, 10 train. The simulator's own would leave one volume of each to validate."""
    content = json.loads((tiny_subtomograms / "datalist.json").read_text())
    names = content["classes"]["training"]
    content["training"] = [{**i, "fold": int(names.index(i["class"]) < 10)} for i in content["training"]]
    path = tmp_path_factory.mktemp("folds") / "datalist.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def trained(tiny_subtomograms, datalist, tmp_path_factory, store) -> Path:
    """A run of two epochs with its test part scored, shared by the tests below."""
    out = tmp_path_factory.mktemp("runs") / "run"
    arguments = {**TINY, "dataset_dir": tiny_subtomograms, "datalist": datalist, "output_dir": out, "score": "[test]"}
    line = bundle_command(TRAIN, **arguments)
    env = {**os.environ, "MLFLOW_TRACKING_URI": store}
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def run_parts(trained) -> tuple[COSNet, MaskRefiner]:
    """The run's network and its CRF, built here from the weights and the config alone."""
    network = COSNet(4, stem_stride=2, feature_size=16)
    network.load_state_dict(torch.load(trained / "models" / "model.pt", weights_only=True))
    return network.eval(), MaskRefiner(DenseCRF3D(**read_config(trained / "configs" / "train.yaml")["crf"]))


def run_here(config: str | Path, kind: str, **arguments: object) -> None:
    """As ``bundle_run``, without a process of its own: half of a tiny run is importing torch and MONAI."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
    workflow = create_workflow(config_file=str(config), workflow_type=kind, **settings)
    workflow.initialize()
    workflow.run()


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def standardised(path: str | Path) -> torch.Tensor:
    volume = read_mrc(path)[0]
    return torch.from_numpy((volume - volume.mean()) / volume.std())[None, None]


@torch.no_grad()
def expected_masks(parts: tuple[COSNet, MaskRefiner], path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Masks of a file before and after the CRF."""
    network, refine = parts
    probability = network(standardised(path)).sigmoid()
    refined = refine(probability, standardised(path))
    return probability[0, 0].numpy() > 0.5, refined[0, 0].numpy() > 0.5


def test_training_leaves_scores_of_both_parts(trained):
    best, test = metrics(trained), metrics(trained / "evaluation" / "test")
    assert (best["cases"], test["cases"]) == (12, 24)
    for summary, defined in ((best, WAYS[:2]), (test, WAYS)):  # the validation fold has four classes
        found = summary["metrics"]
        for name in WAYS:
            assert found[name]["n"] == (summary["cases"] if name in defined else 0), name
            if name in defined:
                assert 0 <= found[name]["mean"] <= 1
            else:
                assert found[name]["mean"] is None
        for name in ("dice", "dice_without_crf", "accuracy_2way_true_size", "accuracy_2way_found_size"):
            assert found[name]["n"] == summary["cases"]
            assert 0 <= found[name]["mean"] <= 1
    log = (trained / "train.log").read_text().splitlines()
    assert len(log) == 2
    assert all("train_loss=" in line and "train_accuracy=" in line and "val_accuracy_2way=" in line for line in log)
    state = torch.load(trained / "models" / "model.pt", weights_only=True)
    assert set(state) == set(COSNet(4, stem_stride=2, feature_size=16).state_dict()), "the CRF is in the configs"
    assert {p.name for p in (trained / "overlays").iterdir()} == {"worst.png", "median.png", "best.png"}
    record = json.loads((trained / "mlflow_run.json").read_text())
    recorded = MlflowClient(record["tracking_uri"]).get_run(record["run_id"]).data
    assert recorded.metrics["test_accuracy_8way"] == pytest.approx(test["metrics"]["accuracy_8way"]["mean"])
    assert recorded.params["crf.iterations"] == "4"
    assert recorded.tags["mode"] == "with_decoder"


def test_every_case_has_its_row(trained, tiny_subtomograms, run_parts):
    listed = json.loads((tiny_subtomograms / "datalist.json").read_text())["test"]
    table = rows(trained / "evaluation" / "test" / "per_image.csv")
    assert [r["image"] for r in table] == [str((tiny_subtomograms / i["image"]).resolve()) for i in listed]
    assert [r["class"] for r in table] == [i["class"] for i in listed]
    sizes = []
    for row, item in zip(table, listed, strict=True):
        truth = read_mrc(tiny_subtomograms / item["label"])[0] > 0
        sizes.append([float(np.log(truth.sum()))])
        assert int(row["true_voxels"]) == truth.sum()
        assert (trained / "evaluation" / "test" / "overlays" / row["overlay"]).is_file()
        for name in WAYS:
            assert float(row[name]) * 3 == pytest.approx(round(float(row[name]) * 3), abs=1e-6), "3 episodes, no ties"
        if item in listed[::6]:
            before, after = expected_masks(run_parts, row["image"])
            assert int(row["found_voxels"]) == pytest.approx(after.sum(), abs=3)
            assert float(row["dice"]) == pytest.approx(dice(after, truth), abs=0.02)
            assert float(row["dice_without_crf"]) == pytest.approx(dice(before, truth), abs=0.02)
    classes = [r["class"] for r in table]
    with torch.no_grad():
        features = torch.cat([run_parts[0].embed(standardised(r["image"]))[0] for r in table])
    for n_way, name in zip((2, 4, 6, 8), WAYS, strict=True):
        values = NWayAccuracy(n_way, episodes=3)(features, classes, run_parts[0].match)
        same = np.isclose([float(r[name]) for r in table], values.tolist())
        assert same.mean() > 0.85, "but for a close call"
    baseline = NWayAccuracy(2, episodes=3)(torch.tensor(sizes), classes, lambda s, t: -(t - s).abs().transpose(-1, -2))
    assert [float(r["accuracy_2way_true_size"]) for r in table] == pytest.approx(baseline.tolist(), abs=1e-6)
    assert any(r["dice"] != r["dice_without_crf"] for r in table)
    assert any(int(r["found_voxels"]) > 0 for r in table)


def test_evaluation_gives_the_numbers_of_the_training(trained, bundle_run, tmp_path):
    bundle_run(str(trained / "configs" / "evaluate.yaml"), output_dir=tmp_path / "e")
    assert metrics(tmp_path / "e" / "test") == metrics(trained / "evaluation" / "test")
    first, second = (rows(f / "test" / "per_image.csv") for f in (trained / "evaluation", tmp_path / "e"))
    assert second == first
    overlays = {p.name for p in (tmp_path / "e" / "test" / "overlays").iterdir()}
    assert overlays == {r["overlay"] for r in first}


def test_a_resumed_run_equals_an_uninterrupted_one(trained, bundle_run, tiny_subtomograms, datalist, tmp_path):
    out = tmp_path / "parts"
    arguments = {**TINY, "dataset_dir": tiny_subtomograms, "datalist": datalist, "output_dir": out}
    bundle_run(TRAIN, **{**arguments, "max_epochs": 1})
    one = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    bundle_run(str(out / "configs" / "train.yaml"), resume=True, max_epochs=2)
    parts, whole = (
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for f in (out, trained)
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert not torch.equal(one["network.score.weight"], whole["network.score.weight"])
    assert metrics(out) == metrics(trained)


def test_an_accuracy_that_no_fold_can_have_does_not_choose_a_checkpoint(tiny_subtomograms, tmp_path):
    content = json.loads((tiny_subtomograms / "datalist.json").read_text())
    for item in content["training"]:  # one class validates: no episode can be made of it
        item["fold"] = int(item["class"] != content["classes"]["training"][0])
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    arguments = {**TINY, "max_epochs": 1, "datalist": tmp_path / "datalist.json", "output_dir": tmp_path / "run"}
    with pytest.raises(RuntimeError) as error:
        run_here(TRAIN, "train", dataset_dir=tiny_subtomograms, **arguments)
    cause: BaseException = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause).startswith("accuracy_2way, which chooses the checkpoint, is undefined for every validation case")
    assert f"{content['classes']['training'][0]} (3)" in str(cause)


def test_without_a_decoder_matches_are_learned_and_masks_are_undefined(tiny_subtomograms, datalist, tmp_path):
    arguments = {**TINY, "max_epochs": 1, "mode": "without_decoder", "network_name": "scnn", "k_shot": 2}
    out = tmp_path / "run"
    run_here(
        TRAIN, "train", dataset_dir=tiny_subtomograms, datalist=datalist, output_dir=out, score=["test"], **arguments
    )
    best = metrics(out)["metrics"]
    defined = [best[name]["n"] for name in ("dice", "dice_without_crf", *WAYS[:2])]
    assert defined == [0, 0, 12, 12]
    found = metrics(out / "evaluation" / "test")
    for name in ("dice", "dice_without_crf", "accuracy_2way_found_size"):
        assert found["metrics"][name] == {"mean": None, "sd": None, "n": 0}
    for name in (*WAYS, "accuracy_2way_true_size"):
        assert found["metrics"][name]["n"] == 24
        assert 0 <= found["metrics"][name]["mean"] <= 1
    assert "calibration" not in found, "there is no probability to calibrate"
    assert {r["dice"] for r in rows(out / "evaluation" / "test" / "per_image.csv")} == {"nan"}
    state = torch.load(out / "models" / "model.pt", weights_only=True)
    assert not [name for name in state if "decoder" in name or "squeeze" in name]


@pytest.fixture
def folder(tiny_subtomograms, tmp_path) -> Path:
    """Targets, one of them in a subfolder and with voxel sizes of its own, and a support set among them."""
    folder, source = tmp_path / "in", tiny_subtomograms / "subtomograms"
    names = json.loads((tiny_subtomograms / "datalist.json").read_text())["classes"]["test"][:3]
    first, second, third = names
    (folder / "support" / third).mkdir(parents=True)
    for name in (first, second):
        shutil.copy(source / f"{name}_0000_snrinf.mrc", folder / "support" / f"{name}.mrc")
    for shot in range(2):
        shutil.copy(source / f"{third}_000{shot}_snrinf.mrc", folder / "support" / third)
    for name in names:
        shutil.copy(source / f"{name}_0002_snrinf.mrc", folder / f"{name}.mrc")
    write_mrc(folder / "grid1" / "stretched.mrc", read_mrc(source / f"{first}_0001_snrinf.mrc")[0], (8.0, 9.0, 11.5))
    return folder


@torch.no_grad()
def expected_scores(network: COSNet, support: dict[str, list[Path]], target: Path) -> dict[str, float]:
    features = [torch.cat([network.embed(standardised(f))[0] for f in files]).mean(0) for files in support.values()]
    logits = network.match(torch.stack(features), network.embed(standardised(target))[0])[0].double()
    return dict(zip(support, logits.softmax(0).tolist(), strict=True))


def test_a_search_names_and_outlines_every_target(trained, bundle_run, folder, run_parts, tmp_path):
    out = tmp_path / "p"
    done = bundle_run(
        str(trained / "configs" / "inference.yaml"), dataset_dir=folder, output_dir=out, pattern="**/*",
        targets_per_batch=3,
    )  # fmt: skip
    assert "4 of 4 targets: " in done.stdout
    support = {f.stem if f.is_file() else f.name: [f] if f.is_file() else sorted(f.iterdir())
               for f in sorted((folder / "support").iterdir())}  # fmt: skip
    table = {Path(r["file"]).relative_to(folder).as_posix(): r for r in rows(out / "predictions.csv")}
    targets = sorted(p.relative_to(folder) for p in folder.rglob("*.mrc") if "support" not in p.parts)
    assert sorted(table) == [t.as_posix() for t in targets]
    for target in targets:
        row = table[target.as_posix()]
        scores = expected_scores(run_parts[0], support, folder / target)
        assert {n: float(row[f"score_{n}"]) for n in support} == pytest.approx(scores, abs=2e-4)
        assert float(row["score"]) == max(float(row[f"score_{n}"]) for n in support)
        assert row["nearest"].startswith(row["structure"])
        written = out / target.with_name(f"{target.stem}_seg.mrc")
        mask, spacing = read_mrc(written, size=32)
        assert spacing == pytest.approx(read_mrc(folder / target)[1])
        assert set(np.unique(mask)) <= {0, 1}
        with mrcfile.open(written) as file:
            assert file.header.mode == 0
        assert int(row["voxels"]) == mask.sum()
        expected = expected_masks(run_parts, folder / target)[1]
        assert (mask > 0).sum() == pytest.approx(expected.sum(), abs=3)
        assert dice(mask > 0, expected) > 0.9
        assert Path(row["overlay"]) == out / "overlays" / target.with_name(f"{target.name}.png")
        assert Image.open(row["overlay"]).size == (3 * 512 + 16, 2 * 512 + 8)
    assert read_mrc(out / "grid1" / "stretched_seg.mrc")[1] == pytest.approx((8.0, 9.0, 11.5))
    assert sum(int(r["voxels"]) for r in table.values()) > 0, "there are masks to compare"
    assert (out / "overlays" / "match_matrix.png").is_file()
    assert len(list(out.rglob("*.mrc"))) == 4, "the support set is no target"


def test_a_missing_support_set_stops_the_search(trained, folder, tmp_path):
    with pytest.raises(RuntimeError) as error:
        run_here(
            trained / "configs" / "inference.yaml", "infer", dataset_dir=folder, output_dir=tmp_path / "p",
            support_dir=tmp_path / "nowhere",
        )  # fmt: skip
    cause: BaseException = error.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert str(cause).startswith(f"no support set at {tmp_path / 'nowhere'}; put one subtomogram per structure there")
    assert not (tmp_path / "p").exists()


def test_targets_that_cannot_be_searched_stop_it_before_anything_is_written(trained, bundle_run, folder, tmp_path):
    write_mrc(folder / "constant.mrc", np.full((32, 32, 32), 3.0), 10.0)
    write_mrc(folder / "large.mrc", np.random.default_rng(0).normal(size=(32, 32, 40)), 10.0)
    done = bundle_run(
        str(trained / "configs" / "inference.yaml"), check=False, dataset_dir=folder, output_dir=tmp_path / "p"
    )
    assert done.returncode != 0
    message = done.stderr[done.stderr.rindex("\nerror: ") :]
    assert "2 of 5 targets cannot be searched" in message
    assert f"{folder / 'constant.mrc'} is constant (3 everywhere)" in message
    assert f"{folder / 'large.mrc'} is 32 x 32 x 40; the network takes 32 x 32 x 32 voxels" in message
    assert not (tmp_path / "p").exists()


def crf_of(run: Path) -> list[dict[str, float]]:
    return [read_config(run / "configs" / f"{name}.yaml")["crf"] for name in fit_crf.CONFIGS]


def check_fit(run: Path, printed: str, before: dict[str, float], fitted: int, judged: int) -> bool:
    """Message, record and configs agree; whether the fit was stored."""
    record = json.loads((run / "crf_fit.json").read_text())
    assert (record["fitting_cases"], record["judging_cases"]) == (fitted, judged)
    values = record["judging_dice"]
    assert record["stored"] == (record["step"] > 0 and values["after"] >= max(values["network"], values["before"]))
    parameters = {k: v for k, v in before.items() if k != "iterations"}
    assert record["before"] == pytest.approx(parameters, rel=1e-5)
    assert record["after"].keys() == parameters.keys()
    now = {**before, **{k: pytest.approx(v, rel=1e-5) for k, v in record["after"].items()}}
    assert crf_of(run) == [now if record["stored"] else before] * 3
    assert (f"stored in {run / 'configs'}" in printed) == record["stored"]
    assert ("not stored: " in printed) == (not record["stored"])
    assert ("best without a CRF" in printed) == (values["network"] > max(values["before"], values["after"]))
    for name in parameters:
        assert f"{name:<20} {record['before'][name]:>10.4f} {record['after'][name]:>10.4f}" in printed
    return record["stored"]


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


def test_the_crf_of_a_run_is_fitted_on_its_validation_cases(run_copy):
    before = crf_of(run_copy)
    assert before == [before[0]] * 3
    done = medseg("fit-crf", "cryoet_one_shot", run_copy, "--cases", 6, "--steps", 4, cwd=REPOSITORY)
    check_fit(run_copy, done.stdout, before[0], 3, 3)
    assert not (run_copy / "running.pid").exists()


@pytest.fixture
def noisy_balls(monkeypatch) -> Callable[[float], None]:
    """Cases whose probabilities are a ball with noise, in place of a run's own masks."""

    def use(noise: float) -> None:
        generator = torch.Generator().manual_seed(0)
        axis = torch.arange(16.0) - 7.5
        ball = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < 25).float()[None, None]
        cases = []
        for _ in range(6):
            logits = (2 * ball - 1) * 1.5 + noise * torch.randn(ball.shape, generator=generator)
            image = grey_levels(ball + 0.2 * torch.randn(ball.shape, generator=generator))
            cases.append((torch.cat([(-logits).sigmoid(), logits.sigmoid()], 1), image, ball))
        monkeypatch.setattr(fit_crf, "_network_masks", lambda *_: (DenseCRF3D(**crf), cases))

    crf = read_config(Path(TRAIN))["crf"]
    return use


def test_a_fit_that_helps_is_stored_and_one_that_harms_is_not(run_copy, noisy_balls):
    before = crf_of(run_copy)[0]
    noisy_balls(noise=1.5)
    assert check_fit(run_copy, fit_crf.fit(run_copy, steps=10, learning_rate=0.1), before, 3, 3)
    for file in (run_copy / "configs").glob("*.yaml"):
        shutil.copy(REPOSITORY / TRAIN, file)  # something with the old parameters
    noisy_balls(noise=0.0)  # the network's masks are perfect: a fit can only harm, or leave them
    assert not check_fit(run_copy, fit_crf.fit(run_copy, steps=2), before, 3, 3)
    assert json.loads((run_copy / "crf_fit.json").read_text())["judging_dice"]["network"] == 1


def test_a_crf_cannot_be_fitted_on_what_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no finished run: .*train.yaml.*model.pt missing"):
        fit_crf.fit(tmp_path)
    done = medseg("fit-crf", "fluorescence_tumor", tmp_path, cwd=REPOSITORY, check=False)
    assert done.returncode != 0
    assert "fluorescence_tumor" in done.stderr


def test_the_bundle_is_sound():
    done = medseg("check", "cryoet_one_shot", cwd=REPOSITORY)
    assert done.stdout == "cryoet_one_shot: no problems\n"


def test_a_packed_search_is_trusted_and_repeats_its_self_test(trained, tmp_path):
    """Network and search are medseg's classes: no program stands for them, and verify knows them."""
    weights = trained / "models" / "model.pt"
    medseg("pack", "cryoet_one_shot", "--weights", weights, "--version", "0.1.1", "--out", tmp_path, cwd=REPOSITORY)
    packed = tmp_path / "cryoet_one_shot_v0.1.1.zip"
    report = json.loads(medseg("verify", packed, "--run", "--json", cwd=tmp_path).stdout)
    assert report["verdict"] == "trusted"
    assert "target_seg.mrc: Dice" in report["checked"]["self-test"]
    with zipfile.ZipFile(packed) as archive:
        inference = json.loads(archive.read("cryoet_one_shot/configs/inference.json"))
        card = archive.read("cryoet_one_shot/docs/README.md").decode()
    assert inference["network_def"]["_target_"] == "medseg.tasks.cryoet_one_shot.network.COSNet"
    assert inference["crf"] == read_config(trained / "configs" / "inference.yaml")["crf"]
    assert "install medseg in the version that metadata.json names" in card
    assert "medseg==" not in card
