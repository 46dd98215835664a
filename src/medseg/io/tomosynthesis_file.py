"""DICOM image files: the header, and whether all of the pixels it announces are in the file."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["naming_file", "read_dicom_header"]


def read_dicom_header(path: Path) -> Any:
    """A DICOM image's header, up to the pixels, after checking that its pixels are grey and all there.

    Raises:
        ValueError: if it is no DICOM file, has no, colour or too few pixels.
    """
    import pydicom

    try:
        with path.open("rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True)
            start = file.tell()
        if not header:
            raise ValueError("no data elements")
    except Exception as error:  # pydicom raises many kinds on damaged files
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is no DICOM file, or its header is damaged: {error}") from error
    with naming_file(str(path)):
        _check_image(path, header, start)
    return header


@contextmanager
def naming_file(name: str) -> Iterator[None]:
    """Say whose header it is when an attribute is missing or of an impossible kind."""
    try:
        yield
    except Exception as error:  # pydicom raises many kinds when a damaged value is looked at
        if isinstance(error, OSError) or (isinstance(error, ValueError) and name in str(error)):
            raise
        raise ValueError(f"{name}: its header is damaged: {error}") from error


def _check_image(path: Path, header: Any, start: int) -> None:
    if not header.get("Rows") or not header.get("Columns"):
        raise ValueError(f"{path} is a DICOM object without an image ({header.get('Modality', 'no modality')})")
    if header.get("SamplesPerPixel", 1) != 1 or not str(header.PhotometricInterpretation).startswith("MONOCHROME"):
        raise ValueError(f"{path} is a colour image ({header.PhotometricInterpretation}); a grey one is needed")
    _check_pixels(path, header, start)


def _check_pixels(path: Path, header: Any, start: int) -> None:
    """Count the bytes, or the compressed frames, that are really in the file."""
    frames = int(header.get("NumberOfFrames") or 1)
    syntax = header.file_meta.get("TransferSyntaxUID") if hasattr(header, "file_meta") else None
    if syntax is not None and syntax.is_deflated:
        return  # the offsets are those of the inflated data; decoding will tell
    order = "<" if header.original_encoding[1] is not False else ">"
    with path.open("rb") as file:
        file.seek(start)
        tag = struct.unpack(f"{order}HH", file.read(4).ljust(4, b"\0"))
        if tag != (0x7FE0, 0x0010):
            raise ValueError(f"{path} has no pixel data")
        if not header.original_encoding[0]:
            file.seek(4, 1)  # value representation and two empty bytes
        length = struct.unpack(f"{order}I", file.read(4).ljust(4, b"\0"))[0]
        here, size = file.tell(), path.stat().st_size
        if length != 0xFFFFFFFF:
            needed = header.Rows * header.Columns * frames * header.BitsAllocated // 8
            there = min(length, size - here)
            if there < needed:
                raise ValueError(
                    f"{path} is cut off: {there:,} of {needed:,} bytes of pixels ({frames} frames of {header.Rows} x "
                    f"{header.Columns}); copy or export it again"
                )
            return
        found, whole = _fragments(file, size)
    extended = header.get("ExtendedOffsetTable")
    if not whole or found < frames or (extended and len(extended) // 8 != frames):
        raise ValueError(f"{path} is cut off: {found} of {frames} compressed frames; copy or export it again")


def _fragments(file: Any, size: int) -> tuple[int, bool]:
    """Compressed fragments that are wholly in the file, and whether their list ends as it should."""
    count = -1  # the first item is the offset table
    while True:
        head = file.read(8)
        if len(head) < 8:
            return max(count, 0), False
        group, element, length = struct.unpack("<HHI", head)
        if (group, element) == (0xFFFE, 0xE0DD):
            return max(count, 0), True
        if (group, element) != (0xFFFE, 0xE000) or file.tell() + length > size:
            return max(count, 0), False
        file.seek(length, 1)
        count += 1
