"""Reading and writing weights: tensors only, nothing is ever unpickled into objects."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medseg.io.files import write_atomically

State = dict[str, torch.Tensor]

__all__ = ["load_weights", "read_state_dict", "save_state_dict", "save_weights"]


def read_state_dict(path: str | Path) -> State:
    """Read a state_dict from ``.safetensors``, a plain ``.pt`` or a Lightning checkpoint.

    Args:
        path: file to read. Of a checkpoint the entry ``state_dict`` (or ``model``) is taken; of a Lightning checkpoint
            only the module's ``network``, without that prefix.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds anything but tensors, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; pass --ckpt_path (or --encoder_weights) with an existing file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors errors have no common type
        raise ValueError(f"{path} is no readable file of tensors: {str(error).splitlines()[0][:200]}") from error
    from_lightning = isinstance(content, dict) and "pytorch-lightning_version" in content
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path} is no state_dict: it must map names to tensors")
    return {k.removeprefix("network."): v for k, v in content.items() if not from_lightning or k.startswith("network.")}


def load_weights(network: nn.Module, path: str | Path) -> nn.Module:
    """Load all of a network's weights.

    Args:
        network: to load into.
        path: as in :func:`read_state_dict`.

    Returns:
        The same network.

    Raises:
        FileNotFoundError: as in :func:`read_state_dict`.
        ValueError: if the weights belong to another network.
    """
    state = read_state_dict(path)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ValueError(
            f"{path} does not fit {type(network).__name__}: pass the --network_name and --encoder it was trained with "
            f"(its run folder has them in configs/). {' '.join(line.strip() for line in lines[1:3])[:400]}"
        ) from error
    return network


def save_weights(network: nn.Module, path: Path) -> None:
    """Write a network's weights as a plain state_dict on the CPU, whole or not at all.

    Args:
        network: what to save.
        path: file to write; loads with ``torch.load(path, weights_only=True)``.
    """
    save_state_dict(network.state_dict(), path)


def save_state_dict(state: State, path: Path) -> None:
    """As :func:`save_weights`, of a state_dict.

    Args:
        state: tensors by name.
        path: file to write.
    """
    buffer = io.BytesIO()
    torch.save({k: v.detach().cpu().contiguous() for k, v in state.items()}, buffer)
    write_atomically(path, buffer.getvalue())
