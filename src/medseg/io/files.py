"""Files: written whole or not at all, and hashed block by block."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO

__all__ = ["file_sha256", "sha256_of", "write_atomically"]


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
