from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sample_bundle import INFERENCE, METADATA

from medseg.training import export
from medseg.training.export import build_network, export_weights

CONFIG = {k: INFERENCE[k] for k in ("network_def",)} | {"roi_size": [32, 32]}


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.manual_seed(0)
    torch.save(build_network(CONFIG).state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_all_forms_hold_the_same_network(weights, tmp_path):
    remarks = export_weights(CONFIG, METADATA, weights, tmp_path / "out", extra={"inference": CONFIG})
    expected = torch.load(weights, weights_only=True)
    for state in (
        torch.load(tmp_path / "out" / "model.pt", weights_only=True),
        load_file(tmp_path / "out" / "model.safetensors"),
    ):
        assert list(state) == list(expected) or set(state) == set(expected)
        assert all(torch.equal(v, expected[k]) for k, v in state.items())
    layout = json.loads((tmp_path / "out" / "network_layout.json").read_text())
    assert layout == {k: ["float32", list(v.shape)] for k, v in expected.items()}
    assert remarks["model.ts"] == "TorchScript, traced at 1 x 1 x 32 x 32, any batch size"
    network = build_network(CONFIG)
    network.load_state_dict(expected)
    images = torch.randn(5, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(tmp_path / "out" / "model.ts"))(images), network(images))


def test_a_program_that_is_not_the_network_is_left_out(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_difference", lambda *_: 0.5)
    remarks = export_weights(CONFIG, METADATA, weights, tmp_path / "out")
    assert remarks["model.ts"].startswith("left out: the traced program differs by 5.0e-01")
    assert not (tmp_path / "out" / "model.ts").exists()
    monkeypatch.setattr(torch.jit, "trace", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no\nway")))
    assert "cannot be traced (way)" in export_weights(CONFIG, METADATA, weights, tmp_path / "out")["model.ts"]


def test_other_weights_are_refused(weights, tmp_path):
    other = {**CONFIG, "network_def": {**CONFIG["network_def"], "channels": [8, 16]}}
    with pytest.raises(ValueError, match="does not fit UNet"):
        export_weights(other, METADATA, weights, tmp_path / "out")


def test_onnx(weights, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    export_weights(CONFIG, METADATA, weights, tmp_path / "a", onnx=True)
    export_weights(CONFIG, METADATA, weights, tmp_path / "b", onnx=True)
    content = (tmp_path / "a" / "model.onnx").read_bytes()
    assert content == (tmp_path / "b" / "model.onnx").read_bytes()
    assert str(Path.cwd()).encode() not in content, "no path of the maker"
    session = onnxruntime.InferenceSession(content)
    network = build_network(CONFIG)
    network.load_state_dict(torch.load(weights, weights_only=True))
    for batch in (1, 3):
        images = torch.randn(batch, 1, 32, 32)
        (found,) = session.run(None, {"image": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, network(images).numpy(), atol=1e-4)


def test_without_onnx_the_message_says_what_to_install(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"--onnx needs onnx and onnxscript: pip install 'medseg\[onnx\]'"):
        export_weights(CONFIG, METADATA, weights, tmp_path / "out", onnx=True)


def test_the_program_carries_no_call_stack(weights, tmp_path):
    """The same bytes from two processes: test_packing_twice_gives_the_same_bytes."""
    export_weights(CONFIG, METADATA, weights, tmp_path)
    with zipfile.ZipFile(tmp_path / "model.ts") as program:
        assert {n.split("/")[0] for n in program.namelist()} == {"model"}
        assert not [n for n in program.namelist() if n.endswith(".debug_pkl")]
        assert not any(str(Path.cwd()).encode() in program.read(n) for n in program.namelist())
