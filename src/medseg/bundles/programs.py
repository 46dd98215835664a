"""Exported programs (TorchScript, torch.export, ONNX): what in them a segmentation network has no use for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from medseg.bundles.archive import BLOCK, LOCAL, BundleFiles, RefusedError, ZipFiles
from medseg.bundles.pickles import MAX_HEADER, PickleReader, brief, head_of
from medseg.bundles.weights import open_torch_zip, open_weights

#: TorchScript operators that read or write files or leave torch, however they are reached.
_OPERATORS = (
    "save|load|from_file|read_file|write_file|load_tensor|PythonOp|IgnoredPythonOp|rpc_async|rpc_sync|rpc_remote"
)
_LIBRARIES = "aten|prim|torchvision"
_STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"')
_SCRIPT_RULES = (
    (re.compile(rf"\b({_OPERATORS})\b"), "uses the operator {}, which reads or writes files or leaves torch"),
    # A network may have an attribute called ops; TorchScript writes it as self.ops and declares it with " : ".
    (
        re.compile(rf"(?<![\w.])(ops\b(?! : |\.(?:{_LIBRARIES})\.\w)[\w.]*)"),
        "uses {}, an operator from outside of torch",
    ),
    (re.compile(r"(?<![\w.])(torch)\b(?! : |\.\w)"), "passes {} itself around, which hides what is called"),
    (re.compile(r"(__torch__\.torch\.classes[\w.]*)"), "uses {}, a class of a compiled library"),
    (re.compile(r"\b(import\b(?! __torch__)[^\n]*)"), "has {!r}"),
    (re.compile(r"(['\"\\#])"), "has {} where TorchScript never writes one; it was edited by hand"),
)
#: What torch.export may call: it looks the name up from ``torch``, and ``torch.os.system`` would be found there, too.
_TARGET = re.compile(
    rf"torch\.ops\.(?:{_LIBRARIES}|prims|higher_order)\.(?!(?:{_OPERATORS})\b)\w+(?:\.\w+)?|torch\.sym_\w+|math\.\w+"
    r"|_operator\.(?!attrgetter|methodcaller|call|setitem|delitem)\w+"
)
#: torch.export evaluates its sizes and guards as Python: only arithmetic of sizes may be there.
_FORMULA_WORDS = re.compile(
    r"[a-z]{1,3}\d+|L|size|stride|storage_offset|and|or|not|positive|nonnegative|integer|True|False|true|false|oo|int_oo"
    r"|Symbol|Integer|Rational|Float|Mul|Add|Pow|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Where"
    r"|IntTrueDiv|FloatTrueDiv|ToFloat|TruncToInt|Eq|Ne|Le|Lt|Ge|Gt|And|Or|Not|ceiling|floor|Equality|Unequality"
    r"|StrictGreaterThan|StrictLessThan|GreaterThan|LessThan"
)
_MACHINE_CODE = {".so", ".dll", ".dylib", ".o", ".cubin", ".hsaco", ".ptx", ".exe"}

__all__ = ["scan_program"]


def scan_program(name: str, file: BinaryIO) -> list[str]:
    """Look for what a segmentation network has no use for in a TorchScript, torch.export or ONNX file.

    Args:
        name: what the findings call the file.
        file: the ``.ts``, ``.pt2`` or ``.onnx`` file; seekable.

    Returns:
        Findings as short texts; empty if nothing is suspicious.
    """
    try:
        if head_of(file)[:4] == LOCAL:
            return list(_scan_archive(name, ZipFiles(Path(name), file)))
        if name.lower().endswith(".onnx"):
            return list(_scan_onnx(name, file))
    except RefusedError as error:
        return [str(error)]
    return [f"{name}: neither TorchScript, torch.export nor ONNX"]


def _scan_archive(name: str, archive: BundleFiles) -> Iterator[str]:
    pickled = _declared_pickles(name, archive)
    for member in archive.names():
        where, path = f"{name}: {member}", PurePosixPath(member)
        with archive.open(member) as file:
            head = file.read(4)
            if member == "bytecode.pkl":
                yield f"{where}: a program for phones, which cannot be checked; save it with torch.jit.save"
            elif member in ("data.pkl", "constants.pkl"):
                yield from _refusal(open_torch_zip, name, archive, member, True)
            elif path.suffix in (".pkl", ".debug_pkl"):
                file.seek(0)
                yield from _refusal(PickleReader(where, file, script=True).load)
            elif path.suffix in _MACHINE_CODE or head == b"\x7fELF" or "aotinductor" in path.parts:
                yield f"{where}: machine code, which cannot be checked"
            elif path.name.startswith(("custom_obj_", "opaque_obj_")):
                yield f"{where}: an object of a compiled library, which cannot be checked"
            elif path.suffix == ".py":
                yield from _scan_code(where, archive.read_bytes(member))
            elif path.parts[0] == "models" and path.suffix == ".json":
                yield from _scan_exported(where, _json(where, archive, member))
            elif path.name in pickled or path.suffix == ".pt" or head in (LOCAL, b"\x80\2\x8a\x0a"):
                yield from _refusal(open_weights, where, file)


def _refusal(read: Callable[..., object], *arguments: object) -> list[str]:
    try:
        read(*arguments)
    except RefusedError as error:
        return [str(error)]
    return []


def _json(where: str, archive: BundleFiles, member: str) -> Any:
    try:
        return json.loads(archive.read_bytes(member, MAX_HEADER))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, RefusedError) else RefusedError(f"{where}: bad JSON: {error}") from error


def _declared_pickles(name: str, archive: BundleFiles) -> set[str]:
    """Files that torch.export would unpickle without any restriction, because its tables of weights say so."""
    found = set()
    for member in archive.names():
        if member.startswith("data/") and member.endswith("_config.json"):
            for key, value in _items(_json(f"{name}: {member}", archive, member)):
                if key is None and value.get("use_pickle"):
                    found.add(PurePosixPath(str(value.get("path_name"))).name)
    return found


def _scan_code(where: str, code: bytes) -> Iterator[str]:
    try:
        text = code.decode("ascii")
    except UnicodeDecodeError:
        yield f"{where}: not plain ASCII, which TorchScript always writes"
        return
    # Without the texts, which TorchScript always writes in double quotes, and without blanks around dots. Three quotes
    # in a row it never writes, and they would be read otherwise here and there.
    bare = text if '"""' in text else re.sub(r" ?\. ?", ".", re.sub(r"[ \t]+", " ", _STRING.sub(" 0 ", text)))
    for pattern, finding in _SCRIPT_RULES:
        for found in sorted(set(pattern.findall(bare))):
            yield f"{where}: {finding.format(found)}"


def _scan_exported(where: str, program: Any) -> Iterator[str]:
    for key, value in _items(program):
        if key == "target" and not (isinstance(value, str) and _TARGET.fullmatch(value)):
            yield f"{where}: calls {brief(value)}, which is no operator of a network"
        formulas = {"expr_str": [value], "guards_code": value, "range_constraints": value}.get(str(key), [])
        for formula in map(str, formulas or []):
            bare = re.sub(r"'\w*'", "", formula)
            words = re.findall(r"[A-Za-z_]\w*", bare)
            if not all(map(_FORMULA_WORDS.fullmatch, words)) or not re.fullmatch(r"[\w ()\[\].,+*/%<>=!-]*", bare):
                yield f"{where}: evaluates {formula[:100]!r}, which is no arithmetic of sizes"
        # torch.export pastes the arguments' names into the guards' code.
        if key in ("in_spec", "out_spec") and re.search(r"[()=;'\n]", str(value)):
            yield f"{where}: names an argument in {brief(value)!r} with signs that no name has"


def _items(value: Any) -> Iterator[tuple[str | None, Any]]:
    """Every key and value in nested JSON, however deep, and every dict itself under the key None."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield None, found
            yield from found.items()
            waiting.extend(found.values())
        elif isinstance(found, list):
            waiting.extend(found)


def _scan_onnx(name: str, file: BinaryIO) -> Iterator[str]:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    while (at := file.tell()) < size:
        tag = _varint(file)
        length = _varint(file) if tag & 7 in (0, 2) else -1
        if length < 0 or not 1 <= tag >> 3 <= 100 or (tag & 7 == 2 and file.tell() + length > size):
            raise RefusedError(f"{name}: no ONNX file, bad field at byte {at:,}")
        if tag & 7 == 2:
            file.seek(length, os.SEEK_CUR)
    file.seek(0)
    kept = b""
    while block := file.read(BLOCK):
        window = kept + block
        # key "location" (field 1) and its value (field 2) of an external tensor's entry; a path may be cut in two by
        # the block's end and is then found whole in the next window.
        for match in re.finditer(rb"\x0a\x08location\x12(?:[\x80-\xff][\x01-\x7f]|[\x01-\x7f])([^\x00-\x1f]*)", window):
            path = match[1].decode("utf-8", "replace")
            if path.startswith(("/", "\\", "~")) or ".." in path or ":" in path:
                yield f"{name}: reads its weights from {path[:100]!r}, outside of the bundle"
        kept = window[-BLOCK // 256 :]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return -1
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    return -1
