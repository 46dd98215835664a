"""The support set: one or a few subtomograms of each structure that targets are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from medseg.io.mrc import SUFFIXES
from medseg.tasks.cryoet_one_shot.volumes import read_subtomogram
from medseg.training.module import plain_tensor

__all__ = ["SupportSet", "find_support"]


def find_support(folder: str | Path) -> dict[str, list[Path]]:
    """Files of each structure, by its name.

    A structure is a file (``support/ribosome.mrc``, one-shot) or a folder of files (``support/ribosome/*.mrc``,
    few-shot).

    Args:
        folder: the support set's folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds fewer than two structures, an empty one, or one name twice.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no support set at {folder}; put one subtomogram per structure there (ribosome.mrc, proteasome.mrc, ...), "
            "or pass --support_dir"
        )
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        files = (
            sorted(f for f in entry.iterdir() if _is_volume(f) and not f.name.startswith("."))
            if entry.is_dir()
            else [entry]
        )
        if entry.is_dir() and not files:
            raise ValueError(f"{entry} holds no MRC file: give the structure a subtomogram, or delete the folder")
        if entry.is_dir() or _is_volume(entry):
            name = entry.name if entry.is_dir() else _stem(entry)
            if name in found:
                first = found[name][0].relative_to(folder)
                raise ValueError(f"{folder} holds the structure {name} twice ({first} and {entry.name}); keep one")
            found[name] = files
    if len(found) < 2:
        held = ", ".join(found) or "none"
        raise ValueError(f"{folder} holds {len(found)} structure(s) ({held}); at least 2 are needed to choose from")
    return found


class SupportSet:
    """The volumes of a support set, ready for the network.

    Args:
        folder: as for :func:`find_support`.
        transform: what targets go through as well, from ``{"image": path}`` to an item with ``image`` (1, D, H, W).
        size: side of the volumes.

    Attributes:
        names: of the structures.
        files: of each.

    Raises:
        FileNotFoundError, ValueError: as :func:`find_support`, and for volumes that cannot be used; the file is named.
    """

    def __init__(self, folder: str | Path, transform: Callable[[Any], Any], size: int) -> None:
        self.files = find_support(folder)
        self.names = list(self.files)
        for files in self.files.values():
            for file in files:
                read_subtomogram(str(file), size)
        self._transform = transform

    def volumes(self, name: str) -> torch.Tensor:
        """All shots of a structure, (k, 1, D, H, W)."""
        items = [self._transform({"image": str(file)}) for file in self.files[name]]
        return torch.stack([plain_tensor(item["image"]) for item in items])


def _is_volume(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def _stem(path: Path) -> str:
    suffix = max((s for s in SUFFIXES if path.name.lower().endswith(s)), key=len)
    return path.name[: -len(suffix)]
