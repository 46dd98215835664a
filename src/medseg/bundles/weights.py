"""What weight files hold, found without torch: names, types, shapes and hashes of their tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from medseg.bundles.archive import BLOCK, LOCAL, BundleFiles, RefusedError, ZipFiles
from medseg.bundles.pickles import (
    ITEM_BYTES,
    MAX_HEADER,
    PickleReader,
    Tensor,
    brief,
    counts,
    head_of,
    looks_like_pickle,
    pickled_objects,
)

#: name -> (dtype such as "float32", shape)
Layout = dict[str, tuple[str, tuple[int, ...]]]

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}

__all__ = ["Layout", "open_torch_zip", "open_weights", "read_layout", "tensor_digests"]


class _Weights(NamedTuple):
    value: Any
    open_at: Callable[[Tensor], BinaryIO]


def read_layout(name: str, file: BinaryIO) -> Layout:
    """Find the names, dtypes and shapes of a weight file's tensors; nothing in it is imported, called or run.

    Args:
        name: what error messages call the file; a safetensors file is named so.
        file: safetensors, or what ``torch.save`` wrote (its zip or its older stream); seekable.

    Returns:
        The tensors of the dict under ``state_dict`` or ``model`` if there is one, else of the outermost dict. Numbers,
        strings and deeper dicts beside them are left out.

    Raises:
        RefusedError: if it is anything else, or damaged, or its pickle calls what no weight file needs.
    """
    return {key: (tensor.dtype, tensor.shape) for key, tensor in _tensors(name, open_weights(name, file)).items()}


def tensor_digests(name: str, file: BinaryIO) -> dict[str, str]:
    """SHA-256 of every contiguous tensor's little-endian bytes, to compare weight files of different formats.

    Args:
        name: what error messages call the file.
        file: a weight file, see ``read_layout``.

    Returns:
        name -> lower-case hexadecimal digest. Tensors that are not contiguous, or are conjugate views, are left out.

    Raises:
        RefusedError: see ``read_layout``.
    """
    weights = open_weights(name, file)
    known: dict[Tensor, str] = {}  # tied weights are hashed once
    for tensor in sorted(_tensors(name, weights).values(), key=lambda t: (t.storage, t.begin)):
        if tensor.contiguous and tensor not in known:
            known[tensor] = _hash(name, weights.open_at(tensor), math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype])
    return {key: known[tensor] for key, tensor in _tensors(name, weights).items() if tensor in known}


def _hash(name: str, file: BinaryIO, left: int) -> str:
    digest = hashlib.sha256()
    while left:
        block = file.read(min(left, BLOCK))
        if not block:
            raise RefusedError(f"{name}: ends within a tensor; fetch the file again")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _tensors(name: str, weights: _Weights) -> dict[str, Tensor]:
    value = weights.value
    if not isinstance(value, dict):
        raise RefusedError(f"{name}: holds no dict of tensors; save a network's state_dict()")
    for key in ("state_dict", "model"):
        if isinstance(value.get(key), dict):
            value = value[key]
            break
    return {str(key): found for key, found in value.items() if isinstance(found, Tensor)}


def open_weights(name: str, file: BinaryIO) -> _Weights:
    """A weight file of any format, its tensors still unread.

    Raises:
        RefusedError: see :func:`read_layout`.
    """
    head = head_of(file)
    # The suffix decides which loader takes the file, so a file that is two things at once must be what it is called.
    if name.lower().endswith(".safetensors"):
        return _open_safetensors(name, file)
    if head[:4] == LOCAL:
        archive = ZipFiles(Path(name), file)
        weights = open_torch_zip(name, archive)
        _check_rest(name, archive)
        return weights
    if looks_like_pickle(head):
        return _open_legacy(name, file)
    raise RefusedError(f"{name}: not a weight file; name safetensors so, or save a state_dict with torch.save")


def _open_safetensors(name: str, file: BinaryIO) -> _Weights:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(size - 8, MAX_HEADER):
        raise RefusedError(f"{name}: no safetensors file, its header would have {length:,} of {size:,} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        entries = {key: _safetensor(key, entry) for key, entry in header.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RefusedError(f"{name}: bad safetensors header: {error}") from error
    at = 0
    for key, (_, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != at:
            raise RefusedError(f"{name}: {key} begins at {begin:,} instead of {at:,}: tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise RefusedError(f"{name}: the tensors end at {at:,}, the file's data at {size - 8 - length:,}")

    def open_at(tensor: Tensor) -> BinaryIO:
        file.seek(8 + length + tensor.begin)
        return file

    return _Weights({key: tensor for key, (tensor, _, _) in entries.items()}, open_at)


def _safetensor(key: str, entry: dict[str, Any]) -> tuple[Tensor, int, int]:
    if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _SAFETENSORS:
        raise ValueError(f"{key} needs a known dtype, shape and data_offsets, but has {brief(entry)}")
    dtype = _SAFETENSORS[entry["dtype"]]
    shape, (begin, end) = counts(entry["shape"]), counts(entry["data_offsets"])
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{key} has {end - begin:,} bytes, which is not shape {shape} of {dtype}")
    return Tensor(dtype, shape, True, "", begin), begin, end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def open_torch_zip(name: str, archive: BundleFiles, pickle: str = "data.pkl", script: bool = False) -> _Weights:
    """One of torch's pickles and its storages, which lie in the folder of the pickle's name."""
    sizes = {member: archive.size(member) for member in archive.names()}
    if pickle not in sizes:
        raise RefusedError(f"{name}: a zip without {pickle}, so torch did not save it")
    if archive.read_bytes("byteorder", 10) != b"little" if "byteorder" in sizes else False:
        raise RefusedError(f"{name}: saved big-endian; save it again on an ordinary machine")
    with archive.open(pickle) as file:
        machine = PickleReader(name if pickle == "data.pkl" else f"{name}: {pickle}", file, script)
        value = machine.load()
    folder = pickle.removesuffix(".pkl")
    for key, storage in machine.storages.items():
        if sizes.get(f"{folder}/{key}") != storage.size:
            found = sizes.get(f"{folder}/{key}", "no")
            raise RefusedError(f"{name}: storage {folder}/{key} has {found} bytes instead of {storage.size:,}")

    def open_at(tensor: Tensor) -> BinaryIO:
        file = archive.open(f"{folder}/{tensor.storage}")
        file.seek(tensor.begin)
        return file

    return _Weights(value, open_at)


def _check_rest(name: str, archive: BundleFiles) -> None:
    """No second pickle beside data.pkl; storages are never unpickled, so what they look like does not matter."""
    for member in archive.names():
        if member == "data.pkl" or re.fullmatch(r"data/\d+", member):
            continue
        with archive.open(member) as file:
            if wrong := pickled_objects(f"{name}: {member}", file, depth=1):
                raise RefusedError(wrong)


def _open_legacy(name: str, file: BinaryIO) -> _Weights:
    """The stream of torch before 1.6: magic, version, system, value, storage keys, then the storages themselves."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic, version, system = (PickleReader(name, file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise RefusedError(f"{name}: a pickle that torch did not write; save the state_dict with torch.save")
    machine = PickleReader(name, file)
    value, keys = machine.load(), PickleReader(name, file).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(machine.storages):
        raise RefusedError(f"{name}: lists other storages than its tensors use")
    starts: dict[str, int] = {}
    for key in keys:
        storage, count = machine.storages[key], int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        if count * ITEM_BYTES[storage.dtype] != storage.size or starts[key] + storage.size > size:
            raise RefusedError(f"{name}: storage {key} has not the {storage.size:,} bytes that its tensors need")
        file.seek(storage.size, os.SEEK_CUR)
    if file.tell() != size:
        raise RefusedError(f"{name}: {size - file.tell():,} bytes after the last tensor")

    def open_at(tensor: Tensor) -> BinaryIO:
        file.seek(starts[tensor.storage] + tensor.begin)
        return file

    return _Weights(value, open_at)
