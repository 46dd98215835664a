"""Weights in the forms that other tools read: plain state_dict, safetensors, TorchScript, ONNX."""

from __future__ import annotations

import io
import json
import logging
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.io.files import write_atomically
from medseg.training.checkpoint import load_weights, save_state_dict

log = logging.getLogger(__name__)

#: How far the exported program may be from the network, relative to its largest output.
TOLERANCE = 1e-4

__all__ = ["build_network", "export_weights"]


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """The network of a bundle's inference config, on the CPU, in evaluation mode.

    Args:
        config: text of a config without macros. It is run: only for one's own.
    """
    from monai.bundle import ConfigParser

    parser = ConfigParser({k: v for k, v in config.items() if k not in ("initialize", "run", "finalize")})
    network: nn.Module = parser.get_parsed_content("network_def")
    return network.eval()


def export_weights(
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    weights: Path,
    folder: Path,
    onnx: bool = False,
    extra: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, str]:
    """Write ``model.pt``, ``model.safetensors``, ``network_layout.json`` and, where it can be traced, ``model.ts``.

    Args:
        config: the inference config, without macros.
        metadata: content of ``metadata.json``; its ``network_data_format`` and the config's ``roi_size`` give the size
            that is traced, which is that of the sliding window.
        weights: any file of tensors that fits the network.
        folder: where to.
        onnx: write ``model.onnx`` as well.
        extra: JSON files by name that ``model.ts`` carries inside, as MONAI Deploy reads it.

    Returns:
        What was written, with a remark for each file; a program that does not reproduce the network within 1e-4 of its
        largest output, alone and in a batch, is left out and the remark says so.

    Raises:
        ValueError: if the weights do not fit the network, or ONNX was asked for and cannot be had.
    """
    from safetensors.torch import save

    network = load_weights(build_network(config), weights)
    state = {k: v.detach().cpu().clone().contiguous() for k, v in network.state_dict().items()}
    save_state_dict(state, folder / "model.pt")
    write_atomically(folder / "model.safetensors", save(state, {"format": "pt"}))
    layout = {k: [str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in state.items()}
    write_atomically(folder / "network_layout.json", (json.dumps(layout, indent=0) + "\n").encode())
    remarks = {"model.pt": "state_dict, tensors only", "model.safetensors": "the same tensors"}
    shape = _window(config, metadata)
    remarks["model.ts"] = _trace(network, shape, extra or {}, folder / "model.ts")
    if onnx:
        remarks["model.onnx"] = _onnx(network, shape, folder / "model.onnx")
    return remarks


def _window(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> list[int]:
    """Shape (1, C, ...) of what the inferer feeds the network: its window, or the smallest size the metadata allow."""
    image = metadata["network_data_format"]["inputs"]["image"]
    size = config.get("roi_size")
    if not isinstance(size, list) or not all(isinstance(s, int) and s > 0 for s in size):
        size = [_smallest(s) for s in image["spatial_shape"]]
    return [1, int(image["num_channels"]), *size]


def _smallest(size: int | str) -> int:
    """The smallest size of a ``spatial_shape`` entry: ``64``, ``"64*n"`` or ``"2**p*n"`` with n = p = 1."""
    value = 1
    for factor in str(size).replace("**p", "").split("*"):
        value *= 1 if factor.strip() in ("n", "p") else int(factor)
    return value


def _trace(network: nn.Module, shape: list[int], extra: Mapping[str, Mapping[str, Any]], path: Path) -> str:
    # MONAI's own writer (save_net_with_metadata) would add the time of day, and no two files would be alike.
    files = {f"{name}.json": json.dumps(dict(content)) for name, content in extra.items()}
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    jit: Any = torch.jit  # comes without types
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary, path.name)  # torch calls the folder inside after the file, and readers look for that
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = jit.trace(network, example, check_trace=False)
                jit.save(program, str(fresh), _extra_files=files)
                content = _without_call_stack(fresh)
                again = jit.load(io.BytesIO(content))
                worst = _difference(network, again, shape)
        except Exception as error:  # what can be traced is not known before it is tried
            return f"left out: the network cannot be traced ({str(error).strip().splitlines()[-1][:120]})"
    if worst > TOLERANCE:
        return f"left out: the traced program differs by {worst:.1e} of the largest output"
    write_atomically(path, content)
    return f"TorchScript, traced at {' x '.join(map(str, shape))}, any batch size"


def _without_call_stack(program: Path) -> bytes:
    """A TorchScript file without its debugging files, which hold the maker's paths and differ from place to place."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            if not name.endswith((".debug_pkl", "/.data/serialization_id")):
                new.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), old.read(name))
    return buffer.getvalue()


def _onnx(network: nn.Module, shape: list[int], path: Path) -> str:
    missing = [package for package in ("onnx", "onnxscript") if find_spec(package) is None]
    if missing:
        raise ValueError(f"--onnx needs {' and '.join(missing)}: pip install 'medseg[onnx]'")
    batch = ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (torch.randn(2, *shape[1:]),), input_names=["image"], output_names=["pred"], dynamo=True,
            dynamic_shapes=batch, verbose=False,
        )  # fmt: skip
    if program is None:
        raise ValueError("the network cannot be exported to ONNX")
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, model.graph):
        part.ClearField("metadata_props")  # the maker's call stack, with paths
    write_atomically(path, model.SerializeToString(deterministic=True))
    return f"ONNX at {' x '.join(map(str, shape[1:]))}, any batch size"


def _difference(network: nn.Module, program: nn.Module, shape: list[int]) -> float:
    """Largest difference relative to the largest output, over one image and a batch of three."""
    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    with torch.no_grad():
        for batch in (1, 3):
            images = torch.randn([batch, *shape[1:]], generator=generator)
            expected = network(images)
            worst = max(worst, float((program(images) - expected).abs().max() / expected.abs().max().clamp(min=1e-9)))
    return worst
