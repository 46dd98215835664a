"""From a finished run to a zip that stock tools use: promote, pack, card, self-test, reproducibility, consumers."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sample_bundle import medseg, write_sums

from medseg.bundles.archive import extract, open_bundle
from medseg.bundles.check import check_bundle
from medseg.bundles.pack import pack
from medseg.bundles.promote import promote
from medseg.bundles.self_test import check_self_test
from medseg.bundles.verify import verify
from medseg.experiments.ensemble import write_ensemble

NAME = "fluorescence_tumor"


@pytest.fixture
def unpacked(packed, tmp_path) -> Path:
    with open_bundle(packed) as bundle:
        extract(bundle, tmp_path / NAME)
    return tmp_path / NAME


def test_promoted(promoted):
    """Weights, version, changelog, scores and provenance; nothing of the machine."""
    bundle = promoted / "bundles" / NAME
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    before = json.loads(Path(f"bundles/{NAME}/configs/metadata.json").read_text())
    run = json.loads((promoted / "run" / "mlflow_run.json").read_text())["run_id"]
    assert metadata["version"] == "0.1.1"
    assert next(iter(metadata["changelog"])) == "0.1.1"
    assert metadata["changelog"]["0.1.1"].startswith(f"weights of run {run} (unet-end_to_end), dice ")
    assert metadata["changelog"]["0.1.0"] == before["changelog"]["0.1.0"]
    known = json.loads((bundle / "models" / "provenance.json").read_text())
    assert known["run_id"] == run
    for key in ("config_sha256", "datalist_sha256"):
        assert re.fullmatch("[0-9a-f]{64}", known[key]), key
    assert known["packages"]["torch"] == torch.__version__.partition("+")[0]
    scored = json.loads((promoted / "run" / "evaluation" / "test" / "metrics.json").read_text())
    assert metadata["eval_metrics"]["test"]["dice"] == scored["metrics"]["dice"]
    assert "simulated" in metadata["data_source"]
    for file in bundle.rglob("*"):
        if file.suffix in (".yaml", ".json", ".md"):
            text = file.read_text()
            assert str(promoted) not in text, f"{file} names a folder of the machine"
            assert "mlflow.db" not in text.replace("'sqlite:///mlflow.db'", "")
    weights = (bundle / "models" / "model.pt").read_bytes()
    assert weights == (promoted / "run" / "models" / "model.pt").read_bytes()
    assert check_bundle(bundle, promoted) == []
    settings = yaml.safe_load((bundle / "models" / "inference.yaml").read_text())
    assert (settings["encoder"], settings["bundle_root"]) == ("mobilenet_v2", f"bundles/{NAME}")


def test_promotion_is_refused_and_changes_nothing(promoted, monkeypatch, tmp_path):
    monkeypatch.chdir(promoted)
    bundle = promoted / "bundles" / NAME

    def state() -> str:
        files = sorted(f for f in bundle.rglob("*") if f.is_file())
        return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()

    before = state()
    with pytest.raises(FileNotFoundError, match="is no run's folder"):
        promote(tmp_path)
    with pytest.raises(ValueError, match="must be three numbers and above"):
        promote(promoted / "run", version="0.1.0")
    with pytest.raises(ValueError, match="no bundle 'other'"):
        promote(promoted / "run", "other")
    broken = tmp_path / "run"
    shutil.copytree(promoted / "run", broken)
    (broken / "status.json").write_text('{"status": "KILLED"}')
    with pytest.raises(ValueError, match="did not finish: KILLED"):
        promote(broken)
    (broken / "status.json").write_text('{"status": "FINISHED"}')
    (broken / "mlflow_run.json").write_text((broken / "mlflow_run.json").read_text().replace("mlflow.db", "gone.db"))
    with pytest.raises(ValueError, match="cannot be read"):
        promote(broken)
    monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        promote(promoted / "run")
    assert state() == before


def test_layout_and_content(packed, unpacked):
    names = set(zipfile.ZipFile(packed).namelist())
    assert {n.split("/")[0] for n in names} == {NAME}
    for file in (
        "LICENSE", "SHA256SUMS", "configs/metadata.json", "configs/inference.json", "configs/train.json",
        "configs/evaluate.json", "configs/logging.conf", "models/model.pt", "models/model.safetensors",
        "models/model.ts", "docs/README.md", "docs/environment.txt", "self_test/input/case.png",
        "self_test/expected/case_seg.png",
    ):  # fmt: skip
        assert f"{NAME}/{file}" in names, file
    state = torch.load(unpacked / "models" / "model.pt", weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    same = load_file(unpacked / "models" / "model.safetensors")
    assert set(same) == set(state)
    assert all(torch.equal(state[k], same[k]) for k in state)
    for file in unpacked.glob("configs/*.json"):
        text = file.read_text()
        assert '"%' not in text, "macros are resolved"
        assert "bundles/" not in text, "paths start in the bundle"
    assert check_bundle(unpacked, unpacked) == []
    metadata = json.loads((unpacked / "configs" / "metadata.json").read_text())
    assert metadata["pytorch_version"] == torch.__version__.partition("+")[0]
    assert metadata["required_packages_version"]["segmentation-models-pytorch"]
    environment = (unpacked / "docs" / "environment.txt").read_text().splitlines()
    assert any(line.startswith("torch==") for line in environment)
    assert not any(line.startswith(("medseg", "mlflow", "pytest")) for line in environment), "only what inference needs"
    card = (unpacked / "docs" / "README.md").read_text()
    scores = json.loads((unpacked / "models" / "provenance.json").read_text())["metrics"]
    assert f"| test | dice | {scores['test']['dice']['mean']:.4f} |" in card
    assert "**Simulated data**" in card
    assert "![best.png](overlays/best.png)" in card


def test_packing_twice_gives_the_same_bytes(promoted, packed, tmp_path):
    done = medseg("pack", NAME, "--out", tmp_path, cwd=promoted)
    assert hashlib.sha256(packed.read_bytes()).hexdigest() in done.stdout
    assert (tmp_path / packed.name).read_bytes() == packed.read_bytes()
    assert not [f for f in tmp_path.iterdir() if f.name != packed.name], "nothing else is left"


def test_a_published_version_is_not_replaced(promoted, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(promoted)
    before = packed.read_bytes()
    state = torch.load(promoted / "run" / "models" / "model.pt", weights_only=True)
    other = tmp_path / "models" / "other.pt"
    other.parent.mkdir()
    torch.save({k: v + 1 if v.is_floating_point() else v for k, v in state.items()}, other)
    with pytest.raises(ValueError, match="does not fit UnetPlusPlus"):  # of a lone file only the bundle's own is known
        pack(NAME, other)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        pack(NAME, tmp_path / "gone.pt")
    metadata = promoted / "bundles" / NAME / "configs" / "metadata.json"
    text = metadata.read_text()
    metadata.write_text(text.replace("Research only", "For research only"))
    with pytest.raises(FileExistsError, match="version is published once"):
        pack(NAME)
    metadata.write_text(text)
    assert packed.read_bytes() == before
    assert [f.name for f in packed.parent.iterdir()] == [packed.name], "nothing half-written is left"


def test_verify_trusts_it_and_its_self_test_passes(packed, unpacked):
    report = verify(packed)
    assert report.verdict == "trusted", report.table()
    assert "with equal values" in report.checked["weights"]
    done = medseg("verify", unpacked, "--run", "--json", cwd=unpacked.parent)
    result = json.loads(done.stdout)
    assert result["checked"]["self-test"] == "case_seg.png: Dice 1.0000"
    # other weights: the checksums see it, and if those are made right, the self-test does
    mask = unpacked / "self_test" / "expected" / "case_seg.png"
    pixels = np.asarray(Image.open(mask))
    Image.fromarray(np.roll(pixels, 40, axis=0)).save(mask)
    assert verify(unpacked).verdict == "refused"
    write_sums(unpacked)
    with pytest.raises(ValueError, match=r"case_seg.png: Dice 0\.\d+ with the expected mask"):
        check_self_test(unpacked)


def test_the_exported_program_is_the_network(unpacked):
    from monai.bundle import ConfigParser

    parser = ConfigParser(json.loads((unpacked / "configs" / "inference.json").read_text()))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(unpacked / "models" / "model.pt", weights_only=True))
    files = {"metadata.json": "", "inference.json": ""}
    program = torch.jit.load(str(unpacked / "models" / "model.ts"), _extra_files=files)
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(program(images), network(images), rtol=1e-4, atol=1e-4)
    assert json.loads(files["inference.json"])["bundle_root"] == "."


def test_monais_own_loader(unpacked, monkeypatch):
    """``monai.bundle.load`` reads one JSON file and gives the network with its weights."""
    from monai.bundle import load

    network = load(NAME, bundle_dir=str(unpacked.parent), workflow_type="inference", source="github")
    assert type(network).__name__ == "Unet"
    expected = torch.load(unpacked / "models" / "model.pt", weights_only=True)
    assert all(torch.equal(v, expected[k]) for k, v in network.state_dict().items())


def test_what_monai_label_and_deploy_read(unpacked):
    """Their published requirements; docs/sharing.md says which versions were really tried, and how."""
    inference = json.loads((unpacked / "configs" / "inference.json").read_text())
    train = json.loads((unpacked / "configs" / "train.json").read_text())
    metadata = json.loads((unpacked / "configs" / "metadata.json").read_text())
    # both: keys of the inference config, transforms as a Compose over dictionaries, an inferer of its own
    assert {"network_def", "network", "preprocessing", "postprocessing", "inferer", "device"} <= set(inference)
    for name in ("preprocessing", "postprocessing"):
        assert inference[name]["_target_"] == "Compose"
    load = [t for t in inference["load"] if t["_target_"] == "LoadImaged"]
    assert [inference["keys"], load[0]["keys"]] == [["image"], "@keys"], "Label's wrapper of LoadImaged takes no more"
    assert "allow_missing_keys" not in load[0]
    assert any(".float()" in str(t.get("func")) for t in inference["load"]), "Deploy takes LoadImaged and its cast away"
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "tumour"}
    # Label's training overrides these, and inserts into a literal list
    assert train["train"]["trainer"]["max_epochs"]
    assert "data" in train["train"]["dataset"]
    assert "data" in train["validate"]["dataset"]
    assert isinstance(train["train"]["handlers"], list)
    # Deploy reads a program file by itself: its folder inside is called after it, with the configs in extra/
    with zipfile.ZipFile(unpacked / "models" / "model.ts") as program:
        names = program.namelist()
        assert {n.split("/")[0] for n in names} == {"model"}
        assert {"model/extra/inference.json", "model/extra/metadata.json"} <= set(names)
        content = b"".join(program.read(n) for n in names if not n.startswith("model/data"))
    assert str(Path.cwd()).encode() not in content, "no path of the maker"


def test_what_the_model_zoo_checks(unpacked, packed):
    """The zoo's CI: files, version in the changelog, metadata by its schema, network input and output, export."""
    from monai.bundle import ckpt_export, verify_metadata, verify_net_in_out

    metadata = json.loads((unpacked / "configs" / "metadata.json").read_text())
    assert packed.name == f"{NAME}_v{metadata['version']}.zip"
    assert metadata["version"] in metadata["changelog"]
    schema = Path("src/medseg/bundles/metadata_schema.json").resolve()
    verify_metadata(meta_file=str(unpacked / "configs" / "metadata.json"), filepath=str(schema))
    config = str(unpacked / "configs" / "inference.json")
    meta = str(unpacked / "configs" / "metadata.json")
    verify_net_in_out(net_id="network_def", meta_file=meta, config_file=config, device="cpu")
    ckpt_export(
        net_id="network_def", filepath=str(unpacked / "again.ts"), ckpt_file=str(unpacked / "models" / "model.pt"),
        meta_file=meta, config_file=config, use_trace=True, input_shape=[1, 1, 64, 64],
    )  # fmt: skip
    assert (unpacked / "again.ts").is_file()


def test_an_ensemble_is_packed_as_a_program(promoted, packed, tmp_path, monkeypatch):
    """Its network is medseg's own: the zip brings the exported program, and inference loads that."""
    run = promoted / "run"
    second = tmp_path / "second"
    shutil.copytree(run, second)
    monkeypatch.chdir(promoted)
    write_ensemble([run, second], tmp_path / "both")
    done = pack(NAME, tmp_path / "both" / "models" / "model.pt", tmp_path, version="0.9.0")
    target = tmp_path / f"{NAME}_v0.9.0.zip"
    assert done.path == target
    report = verify(target)
    assert report.verdict == "trusted", report.table()
    with open_bundle(target) as bundle:
        inference = json.loads(bundle.read_bytes("configs/inference.json"))
        assert inference["network_def"]["_target_"] == "torch.jit.load"
        assert "comes as a program" in bundle.read_bytes("docs/README.md").decode()
        mask = bundle.read_bytes("self_test/expected/case_seg.png")
    with open_bundle(packed) as bundle:  # twice the same network: the same mask
        assert bundle.read_bytes("self_test/expected/case_seg.png") == mask


def test_card(promoted, packed, tmp_path):
    for what, name in ((NAME, "source.html"), (packed, "packed.html")):
        medseg("card", what, "--out", tmp_path / name, cwd=promoted)
        page = (tmp_path / name).read_text()
        assert page.startswith("<!doctype html>")
        assert "<td>dice</td>" in page
        assert page.count('src="data:image/png;base64,') == 2, "of two cases the median is the best"
        assert not re.search(r'(src|href)="(?!data:|https?://)', page), "nothing outside the page"
    text = "# T\n\n<script>alert(1)</script> ![x](../../../etc/passwd.png) [y](javascript:alert(1))\n"
    (tmp_path / "evil" / "docs").mkdir(parents=True)
    (tmp_path / "evil" / "docs" / "README.md").write_text(text)
    medseg("card", tmp_path / "evil", "--out", tmp_path / "evil.html", cwd=promoted)
    page = (tmp_path / "evil.html").read_text()
    assert "<script" not in page
    assert 'href="javascript' not in page
    assert "passwd" not in page.replace('alt="x"', "") or "not in the bundle" in page


def test_signed(promoted, tmp_path):
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    (tmp_path / "key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    medseg("pack", NAME, "--out", tmp_path, "--sign", tmp_path / "key", "--no-overlays", cwd=promoted)
    target = tmp_path / f"{NAME}_v0.1.1.zip"
    assert not [n for n in zipfile.ZipFile(target).namelist() if "overlays" in n]
    done = medseg("verify", target, "--trusted", tmp_path / "key.pub", cwd=tmp_path)
    assert "good, by SHA256:" in done.stdout
    done = medseg("install", target, "--into", tmp_path / "installed", "--trusted", tmp_path / "key.pub", cwd=tmp_path)
    assert "installed" in done.stdout
    record = json.loads((tmp_path / "installed" / f"{NAME}.origin.json").read_text())
    assert record["signed_by"].startswith("SHA256:")


def test_installed_it_predicts_as_the_run_did(promoted, packed, tiny_data, tmp_path, bundle_run):
    medseg("install", packed, "--into", tmp_path, cwd=tmp_path)
    again = medseg("install", packed, "--into", tmp_path, cwd=tmp_path)
    assert "is there already" in again.stdout
    images = {"dataset_dir": tiny_data / "images", "device": "cpu"}
    bundle_run(str(promoted / "run" / "configs" / "inference.yaml"), output_dir=tmp_path / "run", **images)
    line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    line += ["--dataset_dir", str(images["dataset_dir"]), "--device", "cpu", "--output_dir", str(tmp_path / "masks")]
    subprocess.run(line, cwd=tmp_path / NAME, check=True, capture_output=True, timeout=300)
    masks = sorted((tmp_path / "masks").glob("*.png"))
    assert len(masks) == 10
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "run" / mask.name).read_bytes()
    # a wrong key is refused here too, where the configs are JSON
    done = subprocess.run(
        [*line, "--treshold", "0.1"], cwd=tmp_path / NAME, capture_output=True, text=True, timeout=300
    )
    assert "unknown argument --treshold (did you mean --threshold?)" in done.stderr


@pytest.mark.slow
def test_in_a_fresh_environment_with_stock_tools(unpacked, tiny_data, tmp_path):
    """Only MONAI and what metadata.json names, from the package index: minutes, and gigabytes."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    card = (unpacked / "docs" / "README.md").read_text()
    packages = re.findall(r"^pip install (.*)$", card, re.MULTILINE)[0].split()
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, timeout=1500)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    for package in ("medseg", "pytorch_lightning", "mlflow"):
        absent = subprocess.run([python, "-c", f"import {package}"], capture_output=True, env=clean, check=False)
        assert absent.returncode, f"{package} is there: this shows nothing"
    line = ["-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    line += ["--dataset_dir", str(tiny_data / "images"), "--output_dir", str(tmp_path / "masks")]
    subprocess.run([python, *line], cwd=unpacked, check=True, timeout=300, env=clean)
    subprocess.run([sys.executable, *line[:-1], str(tmp_path / "here")], cwd=unpacked, check=True, timeout=300)
    masks = sorted((tmp_path / "masks").glob("*.png"))
    assert len(masks) == 10
    for mask in masks:
        assert mask.read_bytes() == (tmp_path / "here" / mask.name).read_bytes()
    assert not (tmp_path / "masks" / "predictions.csv").exists(), "that is medseg's"
    with (tmp_path / "here" / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 10
