"""Files: written whole or not at all, hashed block by block, and tables as CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["file_sha256", "read_csv", "sha256_of", "write_atomically", "write_csv"]


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: into a neighbour first, then renamed over ``path``.

    Args:
        path: file to write; its folder is made if needed.
        content: all of the file's bytes.

    Raises:
        OSError: if the file cannot be written; the unfinished neighbour is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a table with a header, whole or not at all.

    Args:
        path: file to write.
        rows: values by column; what a row lacks stays empty.
        columns: in their order; by default those of the rows, in the order in which they first come.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns) or list(dict.fromkeys(k for row in rows for k in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table with a header, as text by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in lower-case hexadecimal."""
    with path.open("rb") as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """SHA-256 of what is left of an open file, read block by block."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()
