"""Bundles from strangers: zips and folders listed, checked, read, packed and unpacked without running anything."""

from __future__ import annotations

import io
import os
import shutil
import stat
import struct
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self, cast

from medseg.io.files import file_sha256, sha256_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: The list of a bundle's files and their hashes, as sha256sum writes it.
SUMS = "SHA256SUMS"

MAX_FILES = 10_000
MAX_BYTES = 20 * 2**30
#: A member above ``BIG`` bytes may not be packed tighter than ``MAX_RATIO`` to one; weights hardly shrink at all.
MAX_RATIO = 100
BIG = 10 * 2**20
BLOCK = 2**20
#: The central directory is held in memory, so a lie about its size must not fill it.
MAX_DIRECTORY = 32 * 2**20

#: Already dense: deflating them again costs time and gains nothing.
STORED_SUFFIXES = frozenset({".pt", ".ts", ".pt2", ".safetensors", ".onnx", ".png", ".jpg", ".gz"})

END, END64, LOCATOR64, LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\3\4"
_FOREIGN = "; a bundle never needs this, so do not use the file"

__all__ = [
    "SUMS",
    "BundleFiles",
    "RefusedError",
    "ZipFiles",
    "copy_texts",
    "extract",
    "open_bundle",
    "open_member",
    "write_zip",
    "zip_members",
]


class RefusedError(ValueError):
    """A bundle that must not be opened or used; the message says which file and why."""


class Member(NamedTuple):
    """One file of a zip: its entry in the central directory and where its data start."""

    info: zipfile.ZipInfo
    start: int


class BundleFiles(ABC):
    """The files of one bundle, whether it is a folder or a zip.

    Attributes:
        name: the top folder's name.
        path: the folder or zip itself.
    """

    name: str
    path: Path
    _sizes: dict[str, int]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of the file behind it."""

    def names(self) -> list[str]:
        """POSIX paths relative to the bundle's folder, sorted, files only."""
        return sorted(self._sizes)

    def size(self, name: str) -> int:
        """Bytes of one file as it unpacks.

        Raises:
            FileNotFoundError: if the bundle has no such file.
        """
        if name not in self._sizes:
            raise FileNotFoundError(f"{self.path} has no {name}; it holds {len(self._sizes)} files, see names()")
        return self._sizes[name]

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Read one file piece by piece; seekable. Several may be open, but in one thread only.

        Raises:
            FileNotFoundError: if the bundle has no such file.
            RefusedError: while reading, if a zip's member is damaged or longer than declared. The checksum is looked at
                when the last byte was read and everything before it was, too.
        """

    def read_bytes(self, name: str, limit: int = 10 * 2**20) -> bytes:
        """Read one small file whole.

        Raises:
            RefusedError: if it is larger than ``limit`` bytes or damaged.
        """
        if self.size(name) > limit:
            raise RefusedError(
                f"{self.path}: {name} has {self.size(name):,} bytes, more than the {limit:,} it may have"
            )
        with self.open(name) as file:
            return file.read(self.size(name))

    def sha256(self, name: str) -> str:
        """SHA-256 of one file in lower-case hexadecimal, read block by block."""
        with self.open(name) as file:
            return sha256_of(file)


class _Folder(BundleFiles):
    def __init__(self, path: Path) -> None:
        self.path, self.name, self._sizes = path, path.resolve().name, {}
        _check_name(self.name, str(path))
        for folder, folders, files in os.walk(path, onerror=_raise):
            for item in sorted(folders + files):
                where = Path(folder, item)
                name, found = where.relative_to(path).as_posix(), where.lstat()
                _check_name(name, str(path))
                if stat.S_ISREG(found.st_mode):
                    self._sizes[name] = found.st_size
                elif not stat.S_ISDIR(found.st_mode):
                    raise RefusedError(f"{path}: {name} is {_kind(found.st_mode)}, not a file{_FOREIGN}")
        _check_together(self._sizes, str(path))

    def close(self) -> None:
        """Nothing is held open."""

    def open(self, name: str) -> BinaryIO:
        self.size(name)
        return (self.path / name).open("rb")


class ZipFiles(BundleFiles):
    """A zip of one top folder, read from an open file; torch's weights and programs are such zips, too."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        members = zip_members(file, str(path))
        tops = {name.partition("/")[0] for name in members}
        loose = [name for name in members if "/" not in name]
        if loose or len(tops) != 1:
            found = f"{loose[0]} lies outside" if loose else f"it holds {', '.join(sorted(tops)[:3])}"
            raise RefusedError(f"{path}: a bundle's zip holds exactly one top folder, but {found}; pack it again")
        self.name = tops.pop()
        self._members = {name.partition("/")[2]: member for name, member in members.items()}
        self._sizes = {name: member.info.file_size for name, member in self._members.items()}

    def close(self) -> None:
        """Close the zip."""
        self._file.close()

    def open(self, name: str) -> BinaryIO:
        """Read one member piece by piece, see ``BundleFiles.open``."""
        self.size(name)
        return open_member(self._file, self._members[name], str(self.path))


class _Stored(io.RawIOBase):
    """A member that was not compressed, as a window on the zip: a seek costs nothing."""

    def __init__(self, outer: BinaryIO, member: Member, label: str) -> None:
        self._outer, self._info, self._start = outer, member.info, member.start
        self._label = f"{label}: {member.info.filename}"
        self._position = self._summed = self._crc = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._info.file_size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        buffer = memoryview(buffer).cast("B")
        wanted = min(len(buffer), self._info.file_size - self._position)
        if wanted <= 0:
            return 0
        data = self._take(wanted)
        if not data:
            raise RefusedError(
                f"{self._label} ends after {self._position:,} of {self._info.file_size:,} bytes; fetch it again"
            )
        buffer[: len(data)] = data
        if self._position == self._summed:
            # Only what is read in order can be summed; sha256(), read_bytes() and extract() all read so.
            self._crc, self._summed = zlib.crc32(data, self._crc), self._summed + len(data)
            if self._summed == self._info.file_size and self._crc != self._info.CRC:
                raise RefusedError(f"{self._label} is damaged: its checksum (CRC-32) is another; fetch the file again")
        self._position += len(data)
        return len(data)

    def _take(self, count: int) -> bytes:
        self._outer.seek(self._start + self._position)
        return self._outer.read(count)


class _Deflated(_Stored):
    """A compressed member, inflated as it is read; a seek backwards starts again."""

    def __init__(self, outer: BinaryIO, member: Member, label: str) -> None:
        super().__init__(outer, member, label)
        self._restart()

    def _restart(self) -> None:
        self._inflate, self._eaten, self._done = zlib.decompressobj(-zlib.MAX_WBITS), 0, 0

    def _take(self, count: int) -> bytes:
        if self._position < self._done:
            self._restart()
        while self._done < self._position and self._more(min(BLOCK, self._position - self._done)):
            pass
        if self._done < self._position:
            return b""
        data = self._more(count)
        if self._done == self._info.file_size and (self._more(1) or not self._inflate.eof):
            raise RefusedError(
                f"{self._label} does not unpack to the {self._info.file_size:,} bytes it declares{_FOREIGN}"
            )
        return data

    def _more(self, count: int) -> bytes:
        data = b""
        while not data and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail
            if not packed:
                self._outer.seek(self._start + self._eaten)
                packed = self._outer.read(min(BLOCK // 16, self._info.compress_size - self._eaten))
                self._eaten += len(packed)
            try:
                data = self._inflate.decompress(packed, count)
            except zlib.error as error:
                raise RefusedError(f"{self._label} is damaged: {error}; fetch the file again") from error
            if not packed and not data:
                break
        self._done += len(data)
        return data


def open_bundle(path: Path) -> BundleFiles:
    """Open a bundle to look at its files; nothing of it is run, unpickled or written.

    Args:
        path: a folder, or a zip whatever its suffix.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        RefusedError: if the zip is damaged or made to do harm (see ``zip_members``), or the folder holds links or
            devices.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no bundle at {path}; give a bundle's folder or its zip")
    file = path.open("rb")
    try:
        return ZipFiles(path, file)
    except BaseException:
        file.close()
        raise


def zip_members(file: BinaryIO, label: str) -> dict[str, Member]:
    """List a zip's files after checking everything that can be checked without unpacking them.

    Args:
        file: the zip; seekable.
        label: what error messages call it.

    Returns:
        Each file's name (POSIX) and member, folders left out, in the order of their place in the zip.

    Raises:
        RefusedError: if it is no zip, truncated or damaged; or for unsafe names, links, encryption, duplicates, members
            that overlap or share data, too many or too large ones, or compression other than deflate.
    """
    directory = _find_directory(file, label)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    # the second one is how zipfile refuses a zip of a later version of the format
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error, EOFError) as error:
        raise RefusedError(f"{label}: damaged zip, {error}; fetch the file again") from error
    seen: set[str] = set()
    members: dict[str, Member] = {}
    for info, end in zip(infos, [*(i.header_offset for i in infos[1:]), directory], strict=False):
        where = f"{label}: {info.orig_filename!r}"
        _check_name(info.orig_filename.removesuffix("/"), label)
        _check_entry(info, where)
        start = _data_start(file, info, where)
        if start + info.compress_size > end:
            raise RefusedError(f"{where} shares its bytes with the next member or the zip's directory{_FOREIGN}")
        if info.orig_filename in seen:
            raise RefusedError(f"{where} is there twice, and programs differ in which of them they take{_FOREIGN}")
        seen.add(info.orig_filename)
        if not info.is_dir():
            members[info.filename] = Member(info, start)
    if infos and infos[0].header_offset:
        raise RefusedError(f"{label}: {infos[0].header_offset:,} bytes before the first member{_FOREIGN}")
    _check_together({name: member.info.file_size for name, member in members.items()}, label)
    return members


def open_member(file: BinaryIO, member: Member, label: str) -> BinaryIO:
    """Read one member that ``zip_members`` listed, see ``BundleFiles.open``."""
    view = (_Deflated if member.info.compress_type == zipfile.ZIP_DEFLATED else _Stored)(file, member, label)
    return cast(BinaryIO, io.BufferedReader(view, BLOCK // 16))


def _find_directory(file: BinaryIO, label: str) -> int:
    """Offset of the central directory, which must fill the gap before the end record: one way to read the zip."""
    size = file.seek(0, os.SEEK_END)
    tail_start = max(size - 2**16 - 22, 0)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(END)
    if at < 0 or len(tail) < at + 22:
        raise RefusedError(f"{label}: not a zip, or a truncated one (no end record); fetch the file again")
    _, _, _, count, length, offset, comment = struct.unpack("<4H2LH", tail[at + 4 : at + 22])
    if at + 22 + comment != len(tail):
        raise RefusedError(
            f"{label}: {len(tail) - at - 22 - comment:,} bytes after the zip's end; fetch the file again"
        )
    end = tail_start + at
    if at >= 76 and tail[at - 20 : at - 16] == LOCATOR64:
        if tail[at - 76 : at - 72] != END64:
            raise RefusedError(
                f"{label}: damaged zip, its 64-bit end record is not where it belongs; fetch the file again"
            )
        narrow, end = (count, length, offset), end - 76
        count, length, offset = struct.unpack("<3Q", tail[at - 44 : at - 20])
        if any(a not in (b, 0xFFFF, 0xFFFFFFFF) for a, b in zip(narrow, (count, length, offset), strict=True)):
            raise RefusedError(f"{label}: damaged zip, its two end records differ{_FOREIGN}")
    if offset + length != end:
        raise RefusedError(
            f"{label}: damaged zip, its directory is not where the end record says; fetch the file again"
        )
    if count > 2 * MAX_FILES or length > MAX_DIRECTORY:
        raise RefusedError(f"{label}: {count:,} entries; a bundle has at most {MAX_FILES:,} files")
    return int(offset)


def _data_start(file: BinaryIO, info: zipfile.ZipInfo, where: str) -> int:
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != LOCAL:
        raise RefusedError(f"{where} has no header where the zip's directory says; fetch the file again")
    flags, method = struct.unpack("<2H", header[6:10])
    name_length, extra_length = struct.unpack("<2H", header[26:30])
    name = file.read(name_length).decode("utf-8" if flags & 0x800 else "cp437", "replace")
    if name != info.orig_filename or method != info.compress_type or flags & 0x2041:
        raise RefusedError(
            f"{where} is described otherwise in its own header ({name!r}) than in the directory{_FOREIGN}"
        )
    return int(info.header_offset + 30 + name_length + extra_length)


def _check_entry(info: zipfile.ZipInfo, where: str) -> None:
    mode = info.external_attr >> 16
    if stat.S_IFMT(mode) not in (0, stat.S_IFDIR if info.is_dir() else stat.S_IFREG):
        raise RefusedError(f"{where} is {_kind(mode)}, not a file{_FOREIGN}")
    if info.flag_bits & 0x2041:
        raise RefusedError(f"{where} is encrypted, so nobody can check it; ask for a zip without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise RefusedError(f"{where} is compressed by method {info.compress_type}; pack it again with deflate")
    stored = info.compress_type == zipfile.ZIP_STORED
    empty = not info.file_size
    if (stored and info.file_size != info.compress_size) or (info.is_dir() and not empty) or (empty and info.CRC):
        raise RefusedError(f"{where} declares {info.file_size:,} bytes but holds {info.compress_size:,}{_FOREIGN}")
    if info.file_size > BIG and info.file_size > MAX_RATIO * info.compress_size:
        raise RefusedError(
            f"{where} would unpack from {info.compress_size:,} to {info.file_size:,} bytes, more than {MAX_RATIO} times"
            f" as much: a zip bomb, or a file better packed without compression"
        )


def _check_name(name: str, label: str) -> None:
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise RefusedError(f"{label}: {name!r} would lie outside of the bundle's folder{_FOREIGN}")
    # isprintable() is false for control characters, for the marks that turn the direction of writing round (a name
    # that reads otherwise than it is) and for bytes that are no text.
    if "" in parts or "." in parts or not name.isprintable():
        raise RefusedError(f"{label}: {name!r} is no proper file name{_FOREIGN}")


def _check_together(sizes: dict[str, int], label: str) -> None:
    if not sizes:
        raise RefusedError(f"{label}: holds no files, so it is no bundle")
    if len(sizes) > MAX_FILES:
        raise RefusedError(f"{label}: {len(sizes):,} files; a bundle has at most {MAX_FILES:,}")
    if sum(sizes.values()) > MAX_BYTES:
        raise RefusedError(f"{label}: unpacks to {sum(sizes.values()):,} bytes; a bundle has at most {MAX_BYTES:,}")
    folded: dict[str, str] = {}
    for name in sizes:
        other = folded.setdefault(_fold(name), name)
        if other != name:
            raise RefusedError(f"{label}: {name!r} and {other!r} are one file on other systems; rename one of them")
    for name in sizes:
        for folder in PurePosixPath(name).parents:
            if _fold(str(folder)) in folded:
                raise RefusedError(f"{label}: {str(folder)!r} is both a file and a folder{_FOREIGN}")


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _kind(mode: int) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or another special file")


def _raise(error: OSError) -> None:
    raise error


def write_zip(folder: Path, target: Path, files: Sequence[str] | None = None) -> str:
    """Pack a bundle's folder; the same contents give the same bytes, whatever the files' times, modes and order.

    Dense files (weights, pictures) and those above 10 MiB are stored as they are, the rest is deflated.

    Args:
        folder: the bundle; everything goes under its name.
        target: the zip to write, whole or not at all; its folder is made if needed.
        files: what to pack, relative to ``folder``; everything by default.

    Returns:
        The zip's SHA-256 in lower-case hexadecimal.

    Raises:
        RefusedError: if the folder holds what ``open_bundle`` would refuse.
        FileNotFoundError: if one of ``files`` is missing.
        OSError: if the zip cannot be written; the unfinished one is removed.
    """
    bundle = _Folder(folder)
    chosen = bundle.names() if files is None else sorted(set(files))
    for name in chosen:
        bundle.size(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:
            for name in chosen:
                _pack(archive, bundle, name)
        digest = file_sha256(unfinished)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return digest


def _pack(archive: zipfile.ZipFile, bundle: BundleFiles, name: str) -> None:
    info = zipfile.ZipInfo(f"{bundle.name}/{name}", (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    info.file_size = bundle.size(name)
    # A large file of zeros would deflate to what open_bundle() must take for a bomb.
    if PurePosixPath(name).suffix.lower() not in STORED_SUFFIXES and info.file_size <= BIG:
        archive.writestr(info, bundle.read_bytes(name), zipfile.ZIP_DEFLATED, 9)
        return
    with bundle.open(name) as source, archive.open(info, "w") as out:
        shutil.copyfileobj(source, out, BLOCK)


def extract(files: BundleFiles, target: Path) -> None:
    """Unpack a bundle, all of it or nothing; no file is executable.

    Args:
        files: an open bundle.
        target: folder to make; it takes the place of the bundle's top folder.

    Raises:
        FileExistsError: if there is something at ``target``.
        RefusedError: if a member is damaged or longer than declared.
        OSError: if a file cannot be written, say on a full disk; what was unpacked is removed.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists; remove it first or choose another place")
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.part")
    unfinished.mkdir(0o755)
    try:
        for name in files.names():
            out = unfinished / name
            out.parent.mkdir(parents=True, exist_ok=True)
            with files.open(name) as source, out.open("xb") as sink:
                shutil.copyfileobj(source, sink, BLOCK)
            out.chmod(0o644)
        for folder, _, _ in os.walk(unfinished):
            Path(folder).chmod(0o755)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def copy_texts(files: BundleFiles, names: Iterable[str], folder: Path, limit: int) -> None:
    """Copy some small files of a bundle, as readers that need paths can be given.

    Raises:
        RefusedError: if one is larger than ``limit`` bytes or damaged.
    """
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files.read_bytes(name, limit))
