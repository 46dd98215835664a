"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["write_atomically"]


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
