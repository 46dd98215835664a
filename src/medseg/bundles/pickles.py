"""Pickles read as mere data: what they name and hold, without importing, calling or building anything."""

from __future__ import annotations

import ast
import pickletools
import re
import reprlib
import struct
from pathlib import PurePosixPath
from typing import IO, Any, BinaryIO, NamedTuple, cast

from medseg.bundles.archive import BLOCK, LOCAL, RefusedError, open_member, zip_members

#: A pickle or header is parsed in memory; 16 MiB describe some 60,000 tensors.
MAX_HEADER = 16 * 2**20
MAX_OPCODES = 2_000_000

#: Bytes of one number.
ITEM_BYTES = {
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
_CALLS = {"collections.OrderedDict", "torch.Size"} | {
    f"torch._utils.{name}" for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
}
_TYPES = {f"torch.{name}" for name in (*_STORAGES, *ITEM_BYTES)}
#: What TorchScript writes besides: typed containers and devices. They only wrap a value.
_SCRIPT_CALLS = {"torch.device", "torch.jit._pickle.restore_type_tag"} | {
    f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

_PICKLE_SUFFIXES = {".pkl", ".pickle", ".joblib", ".dill", ".cloudpickle"}
_OPCODES = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
_TEXT_PICKLE = re.compile(rb"\(?[ci][A-Za-z_][\w.]*\n[A-Za-z_][\w.]*\n(?:p\d+\n|q.)?[()t]", re.DOTALL)

__all__ = [
    "ITEM_BYTES",
    "MAX_HEADER",
    "PickleReader",
    "Storage",
    "Tensor",
    "brief",
    "counts",
    "has_pickled_objects",
    "head_of",
    "looks_like_pickle",
    "pickled_objects",
]


class Global(NamedTuple):
    name: str


class Storage(NamedTuple):
    """The bytes that tensors are views of."""

    key: str
    dtype: str
    size: int  # bytes


class Tensor(NamedTuple):
    """One tensor: a view of a storage."""

    dtype: str
    shape: tuple[int, ...]
    contiguous: bool
    storage: str
    begin: int  # bytes from the start of the storage


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
    return pickled_objects(name, file, depth=3)


def pickled_objects(name: str, file: BinaryIO, depth: int) -> str | None:
    """As :func:`has_pickled_objects`, with how many zips within zips are opened."""
    head = head_of(file)
    if head[:6] == b"\x93NUMPY":
        return _numpy_objects(name, head)
    if head[:4] == LOCAL:
        if not depth:
            return f"{name}: zips within zips within zips; unpack them"
        try:
            for inner, member in zip_members(file, name).items():
                if wrong := pickled_objects(f"{name}: {inner}", open_member(file, member, name), depth - 1):
                    return wrong
        except RefusedError as error:
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


def head_of(file: BinaryIO) -> bytes:
    """The first 4 KiB of a file."""
    file.seek(0)
    return file.read(4096)


def brief(value: object) -> str:
    """A value in a message. Its own text may be endless: a list that holds itself twice, sixty times over."""
    return value[:100] if isinstance(value, str) else reprlib.repr(value)[:100]


def counts(value: Any) -> tuple[int, ...]:
    """A list of sizes, checked.

    Raises:
        ValueError: if it is anything else.
    """
    if not isinstance(value, (list, tuple)) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        raise ValueError(f"{brief(value)} are no sizes")
    return tuple(value)


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
            raise RefusedError(f"{self._name}: a pickle of more than {MAX_HEADER:,} bytes; save tensors only")
        return data


class PickleReader:
    """Reads a pickle as data. It knows the few opcodes torch writes, keeps stand-ins for tensors and calls nothing.

    Python's own Unpickler would do with a find_class of ours, but lets a file of a few bytes ask for gigabytes (memo
    indices) and set attributes on whatever find_class returns.
    """

    def __init__(self, name: str, file: BinaryIO, script: bool = False) -> None:
        self.storages: dict[str, Storage] = {}
        self._name, self._file, self._script = name, _Limited(name, file), script
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self) -> Any:
        """Read one pickle, with stand-ins for its tensors.

        Raises:
            RefusedError: if it is damaged, endless, or names what no weight file needs.
        """
        try:
            for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(IO[bytes], self._file))):
                if count > MAX_OPCODES:
                    raise RefusedError(f"{self._name}: a pickle of more than {MAX_OPCODES:,} steps; save tensors only")
                self._step(opcode.name, argument)
            return self._stack.pop()
        except RefusedError:
            raise
        except (ValueError, TypeError, LookupError, OverflowError, struct.error) as error:
            raise RefusedError(
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
                    raise RefusedError(f"{self._name}: a dict with keys that are neither text nor numbers")
                self._top(dict).update(zip(items[::2], items[1::2], strict=True))
            case "GLOBAL" | "INST":
                stack.append(self._look_up(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not (isinstance(name, str) and isinstance(module, str)):
                    raise RefusedError(f"{self._name}: pickle names something that is no text")
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
                raise RefusedError(
                    f"{self._name}: pickle does {opcode}, which torch never writes; save it with torch.save"
                )

    def _since_mark(self) -> list[Any]:
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise RefusedError(f"{self._name}: pickle fills a {type(self._stack[-1]).__name__} like a {kind.__name__}")
        return self._stack[-1]

    def _look_up(self, name: str) -> Global:
        script = name in _SCRIPT_CALLS or (name.startswith("__torch__.") and ".torch.classes." not in name)
        if name not in _CALLS and name not in _TYPES and not (self._script and script):
            raise RefusedError(f"{self._name}: pickle calls {name}; a weight file may hold tensors only")
        return Global(name)

    def _call(self, called: Any, arguments: Any) -> Any:
        match (called.name if isinstance(called, Global) else None), arguments:
            case "collections.OrderedDict", ():
                return {}
            case "torch.Size", (size,):
                return counts(size)
            case "torch._utils._rebuild_tensor_v2", (Storage() as storage, offset, size, stride, _, _, *metadata):
                return self._tensor(storage, storage.dtype, (offset, size, stride), bool(metadata and metadata[0]))
            case "torch._utils._rebuild_tensor_v3", (
                Storage() as storage, offset, size, stride, _, _, Global(name), *metadata,
            ):  # fmt: skip
                dtype = name.removeprefix("torch.")
                return self._tensor(storage, dtype, (offset, size, stride), bool(metadata and metadata[0]))
            case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
                return tensor
            case name, (value, *_) if self._script and name in _SCRIPT_CALLS:
                return value
        raise RefusedError(f"{self._name}: pickle calls {brief(called)} as torch never does; save it with torch.save")

    def _storage(self, address: Any) -> Storage:
        match address:
            case ("storage", Global(name), str(key), str(), int(count), *views) if views in ([], [None]):
                dtype = _STORAGES[name.removeprefix("torch.")]
                storage = Storage(key, dtype, counts([count])[0] * ITEM_BYTES[dtype])
                if self.storages.setdefault(key, storage).size != storage.size:
                    raise RefusedError(f"{self._name}: storage {key} has two sizes")
                return storage
        raise RefusedError(f"{self._name}: pickle refers to something that is no storage: {brief(address)}")

    def _tensor(self, storage: Storage, dtype: str, view: tuple[Any, Any, Any], changed: bool) -> Tensor:
        (offset,), shape, stride = counts([view[0]]), counts(view[1]), counts(view[2])
        item = ITEM_BYTES[dtype]
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if 0 not in shape and (last + 1) * item > storage.size:
            raise RefusedError(
                f"{self._name}: a tensor of shape {shape}, stride {stride} and offset {offset} does not fit into"
                f" its storage of {storage.size:,} bytes"
            )
        expected, contiguous = 1, not changed
        for n, step in zip(reversed(shape), reversed(stride), strict=True):
            contiguous &= n == 1 or step == expected or 0 in shape
            expected *= n
        return Tensor(dtype, shape, contiguous, storage.key, offset * item)
