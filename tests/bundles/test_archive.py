from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest

from medseg.bundles import archive
from medseg.bundles.archive import RefusedError, extract, file_sha256, open_bundle, write_zip

FILES = {
    "LICENSE": b"Apache-2.0\n" * 40,
    "configs/metadata.json": b"{}",
    "docs/picture.png": os.urandom(3000),
    "models/model.pt": os.urandom(70_000),
    "models/empty.txt": b"",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "original" / "nuclei" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "original" / "nuclei"


def make(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in members:
            out.writestr(name, content)
    return path


def entry(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info


def refuse(path: Path, why: str) -> None:
    with pytest.raises(RefusedError, match=why) as caught:
        open_bundle(path)
    assert path.name in str(caught.value)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_and_its_zip_hold_the_same_files(folder, tmp_path, packed):
    if packed:
        write_zip(folder, tmp_path / "by-content-not.suffix")
    with open_bundle(tmp_path / "by-content-not.suffix" if packed else folder) as files:
        assert files.name == "nuclei"
        assert files.names() == sorted(FILES)
        for name, content in FILES.items():
            assert files.size(name) == len(content)
            assert files.read_bytes(name) == content
            assert files.sha256(name) == hashlib.sha256(content).hexdigest()
        with pytest.raises(RefusedError, match=r"model\.pt has 70,000 bytes, more than the 100"):
            files.read_bytes("models/model.pt", limit=100)
        with pytest.raises(FileNotFoundError, match="has no configs/inference"):
            files.open("configs/inference.json")


@pytest.mark.parametrize("name", ["LICENSE", "models/model.pt"])
def test_members_are_seekable_whether_deflated_or_stored(folder, tmp_path, name):
    write_zip(folder, tmp_path / "x.zip")
    content, whole = FILES[name], io.BytesIO(FILES[name])
    with open_bundle(tmp_path / "x.zip") as files, files.open(name) as member, files.open("docs/picture.png") as other:
        for offset, whence, count in [
            (10, 0, 5),
            (-7, 2, 9),
            (3, 0, 200),
            (5, 1, 8),
            (0, 0, -1),
            (10**6, 0, 4),
            (-9, 2, -1),
        ]:
            assert member.seek(offset, whence) == whole.seek(offset, whence)
            assert member.read(count) == whole.read(count)
            other.read(7)  # the members share one file
        assert member.tell() == len(content)


def test_a_stored_member_is_seeked_without_being_read(folder, tmp_path):
    write_zip(folder, tmp_path / "x.zip")
    outer = io.BytesIO((tmp_path / "x.zip").read_bytes())
    members = archive.zip_members(outer, "x.zip")
    reads: list[int] = []
    original = outer.read
    outer.read = lambda count: reads.append(count) or original(count)
    with archive.open_member(outer, members["nuclei/models/model.pt"], "x.zip") as member:
        member.seek(69_990)
        assert member.read() == FILES["models/model.pt"][69_990:]
    assert sum(reads) < 100


def test_write_zip_gives_the_same_bytes_whatever_the_times_modes_and_order(folder, tmp_path):
    first = write_zip(folder, tmp_path / "1" / "x.zip")
    twin = tmp_path / "twin" / "nuclei"
    for name in sorted(FILES, reverse=True):
        (twin / name).parent.mkdir(parents=True, exist_ok=True)
        (twin / name).write_bytes(FILES[name])
        (twin / name).chmod(0o755)
        os.utime(twin / name, (10**9, 10**9))
    assert write_zip(twin, tmp_path / "2" / "x.zip") == first == file_sha256(tmp_path / "1" / "x.zip")
    assert (tmp_path / "1" / "x.zip").read_bytes() == (tmp_path / "2" / "x.zip").read_bytes()
    assert [p.name for p in (tmp_path / "1").iterdir()] == ["x.zip"]
    with zipfile.ZipFile(tmp_path / "1" / "x.zip") as packed:
        for info in packed.infolist():
            assert (info.date_time, info.create_system, info.extra) == ((1980, 1, 1, 0, 0, 0), 3, b"")
            assert info.external_attr >> 16 == stat.S_IFREG | 0o644
        methods = {i.filename.rpartition("/")[2]: i.compress_type for i in packed.infolist()}
    assert {name for name, method in methods.items() if method == zipfile.ZIP_STORED} == {"model.pt", "picture.png"}


def test_write_zip_packs_only_the_files_named(folder, tmp_path):
    write_zip(folder, tmp_path / "x.zip", ["LICENSE", "configs/metadata.json"])
    with open_bundle(tmp_path / "x.zip") as files:
        assert files.names() == ["LICENSE", "configs/metadata.json"]
    with pytest.raises(FileNotFoundError, match=r"has no docs/missing\.md"):
        write_zip(folder, tmp_path / "y.zip", ["LICENSE", "docs/missing.md"])
    assert not (tmp_path / "y.zip").exists()


def test_a_large_file_of_zeros_is_stored_so_that_the_zip_can_be_opened_again(folder, tmp_path):
    (folder / "docs" / "mask.nii").write_bytes(bytes(11 * 2**20))
    write_zip(folder, tmp_path / "x.zip")
    with open_bundle(tmp_path / "x.zip") as files:
        assert files.size("docs/mask.nii") == 11 * 2**20


@pytest.mark.parametrize("packed", [False, True])
def test_extract_restores_the_files_and_makes_nothing_executable(folder, tmp_path, packed):
    (folder / "LICENSE").chmod(0o777)
    source = folder
    if packed:
        source = make(tmp_path / "x.zip", *((entry(f"n/{n}", stat.S_IFREG | 0o4777), c) for n, c in FILES.items()))
    with open_bundle(source) as files:
        extract(files, tmp_path / "out" / "nuclei")
        with pytest.raises(FileExistsError, match="remove it first"):
            extract(files, tmp_path / "out" / "nuclei")
    out = tmp_path / "out" / "nuclei"
    assert {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()} == FILES
    for path in (out, *out.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
    assert [p.name for p in out.parent.iterdir()] == ["nuclei"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(folder, tmp_path, monkeypatch, error):
    original, calls = shutil.copyfileobj, []

    def fail(source: object, sink: object, length: int) -> None:
        calls.append(1)
        if len(calls) > 1:
            sink.write(b"half")
            raise error
        original(source, sink, length)

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    (tmp_path / "out").mkdir()
    with open_bundle(folder) as files, pytest.raises(type(error)):
        extract(files, tmp_path / "out" / "nuclei")
    with pytest.raises(type(error)):
        write_zip(folder, tmp_path / "out" / "x.zip")
    assert list((tmp_path / "out").iterdir()) == []


def test_there_must_be_something_to_open(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no bundle at .*missing\.zip"):
        open_bundle(tmp_path / "missing.zip")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "holds no files")
    refuse(make(tmp_path / "empty.zip"), "holds no files")
    (tmp_path / "text.zip").write_text("hello " * 20)
    refuse(tmp_path / "text.zip", "not a zip")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../escaped", "outside of the bundle"),
        ("n/../../escaped", "outside of the bundle"),
        ("/evil/escaped", "outside of the bundle"),
        ("n/C:/escaped", "outside of the bundle"),
        ("C:escaped", "outside of the bundle"),
        ("n\\..\\escaped", "outside of the bundle"),
        ("n/a\0b", "no proper file name"),
        ("n/a\nb", "no proper file name"),
        ("n/a\u202egnp.exe", "no proper file name"),
        ("n//a", "no proper file name"),
        ("n/./a", "no proper file name"),
        ("loose", "loose lies outside"),
        ("other/a", "exactly one top folder, but it holds n, other"),
        ("n/license", "one file on other systems"),
        ("n/LICENSE/a", "both a file and a folder"),
    ],
)
def test_names_that_reach_out_or_mislead_are_refused(tmp_path, name, why):
    wanted = name.encode()
    # zipfile mends such names when it writes them, so they are put in afterwards
    path = make(tmp_path / "x.zip", ("n/LICENSE", b"a"), ("q" * len(wanted), b"b"))
    data = path.read_bytes().replace(b"q" * len(wanted), wanted)
    path.write_bytes(data if name.isascii() else set_flags(data, 0x800))
    refuse(path, why)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def set_flags(data: bytes, flags: int) -> bytes:
    """Set general purpose flags in the local and the central header of every member."""
    out = bytearray(data)
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for place in (i for i in range(len(data)) if data[i : i + 4] == signature):
            out[place + at : place + at + 2] = struct.pack("<H", flags | data[place + at])
    return bytes(out)


def test_names_equal_after_unicode_normalisation_are_refused(tmp_path):
    refuse(make(tmp_path / "x.zip", ("n/é", b"a"), ("n/e\u0301", b"b")), "one file on other systems")


@pytest.mark.parametrize("mode", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK, stat.S_IFDIR])
def test_links_and_devices_in_a_zip_are_refused(tmp_path, mode):
    path = make(tmp_path / "x.zip", ("n/a", b"a"), (entry("n/link", mode | 0o777), b"/etc/passwd"))
    refuse(path, r"'n/link' is a.*, not a file")


def test_links_and_pipes_in_a_folder_are_refused(folder):
    (folder / "docs" / "link").symlink_to("/etc/passwd")
    refuse(folder, r"docs/link is a symbolic link")
    (folder / "docs" / "link").unlink()
    (folder / "more").symlink_to(folder.parent)
    refuse(folder, r"more is a symbolic link")
    (folder / "more").unlink()
    os.mkfifo(folder / "pipe")
    refuse(folder, r"pipe is a pipe")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path):
    refuse(make(tmp_path / "x.zip", ("n/a", b"1"), ("n/a", b"2")), "'n/a' is there twice")


def test_encrypted_members_are_refused(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"1"))
    path.write_bytes(set_flags(path.read_bytes(), 1))
    refuse(path, "'n/a' is encrypted")


def test_a_member_described_otherwise_in_its_own_header_is_refused(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"1"))
    path.write_bytes(path.read_bytes().replace(b"n/a", b"n/b", 1))
    refuse(path, r"'n/a' is described otherwise .*'n/b'")


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_only_stored_and_deflated_members_are_read(tmp_path, method):
    refuse(make(tmp_path / "x.zip", ("n/a", b"1" * 99), method=method), f"compressed by method {method}")


def declare(path: Path, member: int, **fields: int) -> None:
    """Change fields of a member's entry in the central directory."""
    data = bytearray(path.read_bytes())
    places = [i for i in range(len(data)) if data[i : i + 4] == b"PK\1\2"]
    for field, value in fields.items():
        at = places[member] + {"crc": 16, "packed": 20, "size": 24, "offset": 42}[field]
        data[at : at + 4] = struct.pack("<L", value)
    path.write_bytes(data)


def test_ten_gigabytes_in_a_few_megabytes_are_refused(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", bytes(12 * 2**20)), method=zipfile.ZIP_DEFLATED)
    refuse(path, r"'n/a' would unpack from .* to 12,582,912 bytes.*zip bomb")
    parts = [(f"n/{i}", b"") for i in range(6)]
    path = make(tmp_path / "y.zip", *parts, method=zipfile.ZIP_DEFLATED)
    for i in range(6):
        declare(path, i, size=2**32 - 2)
    refuse(path, "zip bomb")


def test_too_much_or_too_many_is_refused(folder, tmp_path, monkeypatch):
    write_zip(folder, tmp_path / "x.zip")
    monkeypatch.setattr(archive, "MAX_BYTES", 70_000)
    refuse(tmp_path / "x.zip", "at most 70,000")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_FILES", 4)
    refuse(tmp_path / "x.zip", "5 files; a bundle has at most 4")
    refuse(folder, "5 files; a bundle has at most 4")


def test_members_that_share_their_bytes_are_refused(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"1" * 50), ("n/b", b"1" * 50))
    declare(path, 0, packed=100, size=100)
    refuse(path, "'n/a' shares its bytes")
    path = make(tmp_path / "y.zip", ("n/a", b"1" * 50), ("n/b", b"1" * 50))
    declare(path, 1, offset=0)
    refuse(path, "shares its bytes|described otherwise")
    path = make(tmp_path / "z.zip", ("n/a", b"1" * 50))
    declare(path, 0, packed=90, size=90)
    refuse(path, "'n/a' shares its bytes")


def test_a_member_that_unpacks_to_more_than_declared_is_refused_while_reading(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"1" * 5000), method=zipfile.ZIP_DEFLATED)
    declare(path, 0, size=100, crc=zlib.crc32(b"1" * 100))
    with open_bundle(path) as files:
        with pytest.raises(RefusedError, match=r"n/a does not unpack to the 100 bytes it declares"):
            files.read_bytes("a")
        with pytest.raises(RefusedError, match="n/a"):
            extract(files, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named_by_whatever_reads_it_whole(tmp_path, method):
    content = os.urandom(200_000)
    path = make(tmp_path / "x.zip", ("n/a", b"fine"), ("n/weights", content), method=method)
    data = bytearray(path.read_bytes())
    data[100_000] ^= 255
    path.write_bytes(data)
    with open_bundle(path) as files:
        for read in (files.sha256, files.read_bytes, lambda name: extract(files, tmp_path / "out")):
            with pytest.raises(RefusedError, match=r"n/weights (is damaged|does not unpack|ends after)"):
                read("weights")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_every_truncation_and_every_appendix_is_refused(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"123"), ("n/b", b"456"))
    data = path.read_bytes()
    for changed in [*(data[:n] for n in range(len(data))), data + b"x", b"#!/bin/sh\n" + data, data + data]:
        path.write_bytes(changed)
        with pytest.raises(RefusedError, match=r"x\.zip"):
            open_bundle(path)


def test_any_changed_byte_gives_the_contents_or_a_refusal(tmp_path):
    path = make(tmp_path / "x.zip", ("n/a", b"123" * 9), ("n/b", b"456"), method=zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    for place in range(len(data)):
        for value in (0, 255, data[place] ^ 1):
            changed = bytearray(data)
            changed[place] = value
            path.write_bytes(changed)
            try:
                with open_bundle(path) as files:
                    assert all(files.read_bytes(name) in (b"123" * 9, b"456") for name in files.names())
            except RefusedError:
                pass


def test_a_zip_with_64_bit_records_is_read(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as out, out.open("n/a", "w", force_zip64=True) as member:
        member.write(b"abc")
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    count, length, offset = struct.unpack("<H2L", data[end + 10 : end + 20])
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    path.write_bytes(data[:end] + record + locator + data[end:])
    with open_bundle(path) as files:
        assert files.read_bytes("a") == b"abc"
    lying = record[:48] + struct.pack("<Q", offset + 1)
    path.write_bytes(data[:end] + lying + locator + data[end:])
    refuse(path, "damaged zip")


def test_the_module_needs_neither_torch_nor_numpy():
    names = "archive, weights, signature"
    code = f"import sys; from medseg.bundles import {names}; print({{'torch', 'monai', 'numpy'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
