"""What weight and program files hold, found without torch and without unpickling: pickles are read as mere data."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import pickletools
import re
import reprlib
import struct
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from medseg.bundles.archive import BLOCK, LOCAL, BundleFiles, Refused, ZipFiles, open_member, zip_members

#: name -> (dtype such as "float32", shape)
Layout = dict[str, tuple[str, tuple[int, ...]]]

#: A pickle or header is parsed in memory; 16 MiB describe some 60,000 tensors.
MAX_HEADER = 16 * 2**20
MAX_OPCODES = 2_000_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_SIZES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("float8_e8m0fnu",), 1),
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
_STORAGES = {
    **{"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16"},
    **{"LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8"},
    **{"ByteStorage": "uint8", "BoolStorage": "bool"},
    **{"ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128", "storage.UntypedStorage": "uint8"},
}
_SAFETENSORS = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}
_CALLS = {"collections.OrderedDict", "torch.Size"} | {
    f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
}
_TYPES = {f"torch.{name}" for name in (*_STORAGES, *_SIZES)}
#: What TorchScript writes besides: typed containers and devices. They only wrap a value.
_SCRIPT_CALLS = {"torch.device", "torch.jit._pickle.restore_type_tag"} | {
    f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

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
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle"}
_OPCODES = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
_TEXT_PICKLE = re.compile(rb"\(?[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n(?:p\d+\n|q.)?[()t]", re.DOTALL)

__all__ = ["Layout", "has_pickled_objects", "looks_like_pickle", "read_layout", "scan_program", "tensor_digests"]


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int  # bytes


class _Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    contiguous: bool
    storage: str
    begin: int  # bytes from the start of the storage


class _Weights(NamedTuple):
    value: Any
    open_at: Callable[[_Tensor], BinaryIO]


def read_layout(name: str, file: BinaryIO) -> Layout:
    """Find the names, dtypes and shapes of a weight file's tensors; nothing in it is imported, called or run.

    Args:
        name: what error messages call the file; a safetensors file is named so.
        file: safetensors, or what ``torch.save`` wrote (its zip or its older stream); seekable.

    Returns:
        The tensors of the dict under ``state_dict`` or ``model`` if there is one, else of the outermost dict. Numbers,
        strings and deeper dicts beside them are left out.

    Raises:
        Refused: if it is anything else, or damaged, or its pickle calls what no weight file needs.
    """
    return {key: (tensor.dtype, tensor.shape) for key, tensor in _tensors(name, _open_weights(name, file)).items()}


def tensor_digests(name: str, file: BinaryIO) -> dict[str, str]:
    """SHA-256 of every contiguous tensor's little-endian bytes, to compare weight files of different formats.

    Args:
        name: what error messages call the file.
        file: a weight file, see ``read_layout``.

    Returns:
        name -> lower-case hexadecimal digest. Tensors that are not contiguous, or are conjugate views, are left out.

    Raises:
        Refused: see ``read_layout``.
    """
    weights = _open_weights(name, file)
    known: dict[_Tensor, str] = {}  # tied weights are hashed once
    for tensor in sorted(_tensors(name, weights).values(), key=lambda t: (t.storage, t.begin)):
        if tensor.contiguous and tensor not in known:
            known[tensor] = _hash(name, weights.open_at(tensor), math.prod(tensor.shape) * _SIZES[tensor.dtype])
    return {key: known[tensor] for key, tensor in _tensors(name, weights).items() if tensor in known}


def scan_program(name: str, file: BinaryIO) -> list[str]:
    """Look for what a segmentation network has no use for in a TorchScript, torch.export or ONNX file.

    Args:
        name: what the findings call the file.
        file: the ``.ts``, ``.pt2`` or ``.onnx`` file; seekable.

    Returns:
        Findings as short texts; empty if nothing is suspicious.
    """
    try:
        if _head(file)[:4] == LOCAL:
            return list(_scan_archive(name, ZipFiles(Path(name), file)))
        if name.lower().endswith(".onnx"):
            return list(_scan_onnx(name, file))
    except Refused as error:
        return [str(error)]
    return [f"{name}: neither TorchScript, torch.export nor ONNX"]


def looks_like_pickle(head: bytes) -> bool:
    """Whether a file that begins so is a pickle, judged by its first few kilobytes.

    Pickles of protocol 0 and 1 have no mark of their own; they are recognised if they name something to call early on.
    """
    if head[:1] == b"\x80":
        return len(head) > 2 and head[1] <= 5 and head[2:3] in _OPCODES
    if _TEXT_PICKLE.match(head):
        return True
    seen = set()
    try:
        for opcode, _, _ in pickletools.genops(head):
            seen.add(opcode.name)
    except ValueError:
        return False
    names = {"GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4"}
    return bool(seen & names) and bool(seen & {"REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"})


def has_pickled_objects(name: str, file: BinaryIO) -> str | None:
    """Say whether a file that is neither weights nor program holds a pickle: openly, in NumPy's files or in a zip.

    Args:
        name: what the answer calls the file.
        file: any file; seekable.

    Returns:
        What is wrong, or None.
    """
    return _pickled_objects(name, file, depth=3)


def _pickled_objects(name: str, file: BinaryIO, depth: int) -> str | None:
    head = _head(file)
    if head[:6] == b"\x93NUMPY":
        return _numpy_objects(name, head)
    if head[:4] == LOCAL:
        if not depth:
            return f"{name}: zips within zips within zips; unpack them"
        try:
            for inner, member in zip_members(file, name).items():
                if wrong := _pickled_objects(f"{name}: {inner}", open_member(file, member, name), depth - 1):
                    return wrong
        except Refused as error:
            return str(error)
        return None
    if looks_like_pickle(head) or PurePosixPath(name).suffix.lower() in _PICKLE_SUFFIXES:
        return f"{name}: a pickle, which can run anything when it is loaded; save the data as JSON, CSV or .npy"
    return None


def _numpy_objects(name: str, head: bytes) -> str | None:
    wide = head[6:7] != b"\1"
    length = int.from_bytes(head[8 : 12 if wide else 10], "little")
    header = head[12 if wide else 10 :][:length]
    if len(header) < length:
        return f"{name}: a NumPy file whose header of {length:,} bytes cannot be checked; save a plain array"
    try:
        if _plain(ast.literal_eval(header.decode("latin-1").strip())["descr"]):
            return None
    except (ValueError, SyntaxError, TypeError, LookupError, RecursionError, MemoryError) as error:
        return f"{name}: a NumPy file with a bad header, {type(error).__name__}; save a plain array"
    return f"{name}: a NumPy array of Python objects, that is a pickle; save it with a plain dtype"


def _plain(dtype: Any) -> bool:
    """Whether NumPy's description of a dtype, or of every field of a record, is one of numbers, text or times."""
    if isinstance(dtype, list):
        return all(_plain(field[1]) for field in dtype)
    if isinstance(dtype, tuple):
        return _plain(dtype[0])
    return isinstance(dtype, str) and bool(re.fullmatch(r"[<>|=]?[?biufcmMSUV]\d*(\[\w+\])?", dtype))


def _head(file: BinaryIO) -> bytes:
    file.seek(0)
    return file.read(4096)


def _hash(name: str, file: BinaryIO, left: int) -> str:
    digest = hashlib.sha256()
    while left:
        block = file.read(min(left, BLOCK))
        if not block:
            raise Refused(f"{name}: ends within a tensor; fetch the file again")
        digest.update(block)
        left -= len(block)
    return digest.hexdigest()


def _tensors(name: str, weights: _Weights) -> dict[str, _Tensor]:
    value = weights.value
    if not isinstance(value, dict):
        raise Refused(f"{name}: holds no dict of tensors; save a network's state_dict()")
    for key in ("state_dict", "model"):
        if isinstance(value.get(key), dict):
            value = value[key]
            break
    return {str(key): found for key, found in value.items() if isinstance(found, _Tensor)}


def _open_weights(name: str, file: BinaryIO) -> _Weights:
    head = _head(file)
    # The suffix decides which loader takes the file, so a file that is two things at once must be what it is called.
    if name.lower().endswith(".safetensors"):
        return _open_safetensors(name, file)
    if head[:4] == LOCAL:
        archive = ZipFiles(Path(name), file)
        weights = _open_torch_zip(name, archive)
        _check_rest(name, archive)
        return weights
    if looks_like_pickle(head):
        return _open_legacy(name, file)
    raise Refused(f"{name}: not a weight file; name safetensors so, or save a state_dict with torch.save")


def _open_safetensors(name: str, file: BinaryIO) -> _Weights:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > min(size - 8, MAX_HEADER):
        raise Refused(f"{name}: no safetensors file, its header would have {length:,} of {size:,} bytes")
    try:
        header = json.loads(file.read(length), object_pairs_hook=_no_duplicates)
        entries = {key: _safetensor(key, entry) for key, entry in header.items() if key != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Refused(f"{name}: bad safetensors header: {error}") from error
    at = 0
    for key, (_, begin, end) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if begin != at:
            raise Refused(f"{name}: {key} begins at {begin:,} instead of {at:,}: tensors overlap or leave a gap")
        at = end
    if at != size - 8 - length:
        raise Refused(f"{name}: the tensors end at {at:,}, the file's data at {size - 8 - length:,}")

    def open_at(tensor: _Tensor) -> BinaryIO:
        file.seek(8 + length + tensor.begin)
        return file

    return _Weights({key: tensor for key, (tensor, _, _) in entries.items()}, open_at)


def _safetensor(key: str, entry: dict[str, Any]) -> tuple[_Tensor, int, int]:
    if set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _SAFETENSORS:
        raise ValueError(f"{key} needs a known dtype, shape and data_offsets, but has {_brief(entry)}")
    dtype = _SAFETENSORS[entry["dtype"]]
    shape, (begin, end) = _counts(entry["shape"]), _counts(entry["data_offsets"])
    if end - begin != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{key} has {end - begin:,} bytes, which is not shape {shape} of {dtype}")
    return _Tensor(dtype, shape, True, "", begin), begin, end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


def _brief(value: object) -> str:
    """A value in a message. Its own text may be endless: a list that holds itself twice, sixty times over."""
    return value[:100] if isinstance(value, str) else reprlib.repr(value)[:100]


def _counts(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise ValueError(f"{_brief(value)} are no sizes")
    return tuple(value)


def _open_torch_zip(name: str, archive: BundleFiles, pickle: str = "data.pkl", script: bool = False) -> _Weights:
    """One of torch's pickles and its storages, which lie in the folder of the pickle's name."""
    sizes = {member: archive.size(member) for member in archive.names()}
    if pickle not in sizes:
        raise Refused(f"{name}: a zip without {pickle}, so torch did not save it")
    if archive.read_bytes("byteorder", 10) != b"little" if "byteorder" in sizes else False:
        raise Refused(f"{name}: saved big-endian; save it again on an ordinary machine")
    with archive.open(pickle) as file:
        machine = _Machine(name if pickle == "data.pkl" else f"{name}: {pickle}", file, script)
        value = machine.load()
    folder = pickle.removesuffix(".pkl")
    for key, storage in machine.storages.items():
        if sizes.get(f"{folder}/{key}") != storage.size:
            found = sizes.get(f"{folder}/{key}", "no")
            raise Refused(f"{name}: storage {folder}/{key} has {found} bytes instead of {storage.size:,}")

    def open_at(tensor: _Tensor) -> BinaryIO:
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
            if wrong := _pickled_objects(f"{name}: {member}", file, depth=1):
                raise Refused(wrong)


def _open_legacy(name: str, file: BinaryIO) -> _Weights:
    """The stream of torch before 1.6: magic, version, system, value, storage keys, then the storages themselves."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic, version, system = (_Machine(name, file).load() for _ in range(3))
    if magic != LEGACY_MAGIC or version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise Refused(f"{name}: a pickle that torch did not write; save the state_dict with torch.save")
    machine = _Machine(name, file)
    value, keys = machine.load(), _Machine(name, file).load()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(machine.storages):
        raise Refused(f"{name}: lists other storages than its tensors use")
    starts: dict[str, int] = {}
    for key in keys:
        storage, count = machine.storages[key], int.from_bytes(file.read(8), "little")
        starts[key] = file.tell()
        if count * _SIZES[storage.dtype] != storage.size or starts[key] + storage.size > size:
            raise Refused(f"{name}: storage {key} has not the {storage.size:,} bytes that its tensors need")
        file.seek(storage.size, os.SEEK_CUR)
    if file.tell() != size:
        raise Refused(f"{name}: {size - file.tell():,} bytes after the last tensor")

    def open_at(tensor: _Tensor) -> BinaryIO:
        file.seek(starts[tensor.storage] + tensor.begin)
        return file

    return _Weights(value, open_at)


class _Limited:
    """A file that gives up before a lie about a length fills the memory."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._name, self._file, self._left = name, file, MAX_HEADER

    def read(self, count: int) -> bytes:
        data = self._take(self._file.read(min(count, BLOCK)))
        while len(data) < count and (block := self._take(self._file.read(min(count - len(data), BLOCK)))):
            data += block
        return data

    def readline(self) -> bytes:
        return self._take(self._file.readline(min(4096, self._left + 1)))

    def _take(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise Refused(f"{self._name}: a pickle of more than {MAX_HEADER:,} bytes; save tensors only")
        return data


class _Machine:
    """Reads a pickle as data. It knows the few opcodes torch writes, keeps stand-ins for tensors and calls nothing.

    Python's own Unpickler would do with a find_class of ours, but lets a file of a few bytes ask for gigabytes (memo
    indices) and set attributes on whatever find_class returns.
    """

    def __init__(self, name: str, file: BinaryIO, script: bool = False) -> None:
        self.storages: dict[str, _Storage] = {}
        self._name, self._file, self._script = name, _Limited(name, file), script
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(self._file)):  # type: ignore[arg-type]
                if count > MAX_OPCODES:
                    raise Refused(f"{self._name}: a pickle of more than {MAX_OPCODES:,} steps; save tensors only")
                self._step(opcode.name, argument)
            return self._stack.pop()
        except Refused:
            raise
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise Refused(
                f"{self._name}: bad pickle, {error or type(error).__name__}; save it with torch.save"
            ) from error

    def _step(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _LITERALS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack[-_TUPLES[opcode] :] = [tuple(stack[-_TUPLES[opcode] :])]
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "MARK":
            self._marks.append(len(stack))
        elif opcode in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": []}.get(opcode, ()))
        elif opcode not in ("PROTO", "FRAME", "STOP"):
            self._build(opcode, argument)

    def _build(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        match opcode:
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "APPEND" | "APPENDS":
                items = self._since_mark() if opcode == "APPENDS" else [stack.pop()]
                self._top(list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._since_mark() if opcode == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, (str, int, float)) for key in items[::2]):
                    raise Refused(f"{self._name}: a dict with keys that are neither text nor numbers")
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL" | "INST":
                stack.append(self._look_up(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise Refused(f"{self._name}: pickle names something that is no text")
                stack.append(self._look_up(f"{module}.{name}"))
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self._call(called, arguments))
            case "NEWOBJ" if self._script:
                stack[-2:] = [{}]
            case "BUILD":
                stack.pop()  # attributes of an OrderedDict (_metadata) or of a TorchScript object
                self._top(dict)
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _:
                raise Refused(f"{self._name}: pickle does {opcode}, which torch never writes; save it with torch.save")

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise Refused(f"{self._name}: pickle fills a {type(self._stack[-1]).__name__} like a {kind.__name__}")
        return self._stack[-1]

    def _look_up(self, name: str) -> _Global:
        script = name in _SCRIPT_CALLS or (name.startswith("__torch__.") and ".torch.classes." not in name)
        if name not in _CALLS and name not in _TYPES and not (self._script and script):
            raise Refused(f"{self._name}: pickle calls {name}; a weight file may hold tensors only")
        return _Global(name)

    def _call(self, called: Any, arguments: Any) -> Any:
        match (called.name if isinstance(called, _Global) else None), arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (size,):
                return _counts(size)
            case "torch._utils._rebuild_tensor_v2", (_Storage() as storage, offset, size, stride, _, _, *metadata):
                return self._tensor(storage, storage.dtype, (offset, size, stride), bool(metadata and metadata[0]))
            case "torch._utils._rebuild_tensor_v3", (
                _Storage() as storage, offset, size, stride, _, _, _Global(name), *metadata,
            ):  # fmt: skip
                dtype = name.removeprefix("torch.")
                return self._tensor(storage, dtype, (offset, size, stride), bool(metadata and metadata[0]))
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, _, _):
                return tensor
            case name, (value, *_) if self._script and name in _SCRIPT_CALLS:
                return value
        raise Refused(f"{self._name}: pickle calls {_brief(called)} as torch never does; save it with torch.save")

    def _storage(self, address: Any) -> _Storage:
        match address:
            case ("storage", _Global(name), str(key), str(), int(count), *views) if views in ([], [None]):
                dtype = _STORAGES[name.removeprefix("torch.")]
                storage = _Storage(key, dtype, _counts([count])[0] * _SIZES[dtype])
                if self.storages.setdefault(key, storage).size != storage.size:
                    raise Refused(f"{self._name}: storage {key} has two sizes")
                return storage
        raise Refused(f"{self._name}: pickle refers to something that is no storage: {_brief(address)}")

    def _tensor(self, storage: _Storage, dtype: str, view: tuple[Any, Any, Any], changed: bool) -> _Tensor:
        (offset,), shape, stride = _counts([view[0]]), _counts(view[1]), _counts(view[2])
        item = _SIZES[dtype]
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * item > storage.size:
            raise Refused(
                f"{self._name}: a tensor of shape {shape}, stride {stride} and offset {offset} does not fit into"
                f" its storage of {storage.size:,} bytes"
            )
        expected, contiguous = 1, not changed
        for n, step in zip(reversed(shape), reversed(stride), strict=True):
            contiguous &= n == 1 or step == expected or 0 in shape
            expected *= n
        return _Tensor(dtype, shape, contiguous, storage.key, offset * item)


def _scan_archive(name: str, archive: BundleFiles) -> Iterator[str]:
    pickled = _declared_pickles(name, archive)
    for member in archive.names():
        where, path = f"{name}: {member}", PurePosixPath(member)
        with archive.open(member) as file:
            head = file.read(4)
            if member == "bytecode.pkl":
                yield f"{where}: a program for phones, which cannot be checked; save it with torch.jit.save"
            elif member in ("data.pkl", "constants.pkl"):
                yield from _refusal(_open_torch_zip, name, archive, member, True)
            elif path.suffix in (".pkl", ".debug_pkl"):
                file.seek(0)
                yield from _refusal(_Machine(where, file, script=True).load)
            elif path.suffix in _MACHINE_CODE or head == b"\x7fELF" or "aotinductor" in path.parts:
                yield f"{where}: machine code, which cannot be checked"
            elif path.name.startswith(("custom_obj_", "opaque_obj_")):
                yield f"{where}: an object of a compiled library, which cannot be checked"
            elif path.suffix == ".py":
                yield from _scan_code(where, archive.read_bytes(member))
            elif path.parts[0] == "models" and path.suffix == ".json":
                yield from _scan_exported(where, _json(where, archive, member))
            elif path.name in pickled or path.suffix == ".pt" or head in (LOCAL, b"\x80\2\x8a\x0a"):
                yield from _refusal(_open_weights, where, file)


def _refusal(read: Callable[..., object], *arguments: object) -> list[str]:
    try:
        read(*arguments)
    except Refused as error:
        return [str(error)]
    return []


def _json(where: str, archive: BundleFiles, member: str) -> Any:
    try:
        return json.loads(archive.read_bytes(member, MAX_HEADER))
    except (ValueError, RecursionError) as error:
        raise error if isinstance(error, Refused) else Refused(f"{where}: bad JSON: {error}") from error


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
            yield f"{where}: calls {_brief(value)}, which is no operator of a network"
        formulas = {"expr_str": [value], "guards_code": value, "range_constraints": value}.get(str(key), [])
        for formula in map(str, formulas or []):
            bare = re.sub(r"'\w*'", "", formula)
            words = re.findall(r"[A-Za-z_]\w*", bare)
            if not all(map(_FORMULA_WORDS.fullmatch, words)) or not re.fullmatch(r"[\w ()\[\].,+*/%<>=!-]*", bare):
                yield f"{where}: evaluates {formula[:100]!r}, which is no arithmetic of sizes"
        # torch.export pastes the arguments' names into the guards' code.
        if key in ("in_spec", "out_spec") and re.search(r"[()=;'\n]", str(value)):
            yield f"{where}: names an argument in {_brief(value)!r} with signs that no name has"


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
            raise Refused(f"{name}: no ONNX file, bad field at byte {at:,}")
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
