"""The bundles of a checkout, read from their ``metadata.json`` as text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Bundle", "find_bundle", "find_importer", "list_bundles", "repository_root"]


@dataclass(frozen=True)
class Bundle:
    """One bundle: its folder and its metadata.

    Attributes:
        name: folder name, which is the task's name everywhere.
        path: the bundle's folder.
        metadata: content of ``configs/metadata.json``.
    """

    name: str
    path: Path
    metadata: dict[str, Any]

    def summary(self) -> dict[str, Any]:
        """What ``medseg list`` shows: name, task, modality, networks, paper and version."""
        image = self.metadata.get("network_data_format", {}).get("inputs", {}).get("image", {})
        return {
            "name": self.name,
            "task": self.metadata.get("task", ""),
            "modality": image.get("modality", ""),
            "networks": list(self.metadata.get("networks", [])),
            "paper": next(iter(self.metadata.get("references", [])), ""),
            "version": self.metadata.get("version", ""),
        }


def repository_root(start: Path | None = None) -> Path:
    """The folder that holds ``bundles/`` and ``transforms/``, where bundles are run from.

    Args:
        start: folder to look in first, with its parents; the working directory by default. After that the checkout
            that this package was installed from.

    Raises:
        FileNotFoundError: if there is no such folder; the message says what to do.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, *Path(__file__).resolve().parents):
        if (folder / "bundles").is_dir() and (folder / "transforms").is_dir():
            return folder
    raise FileNotFoundError(
        f"no medseg checkout (a folder with bundles/ and transforms/) in {start} or above; cd into your clone of medseg"
    )


def list_bundles(root: Path | None = None) -> list[Bundle]:
    """All bundles of a checkout, by name.

    Args:
        root: from :func:`repository_root` by default.

    Raises:
        ValueError: if a ``metadata.json`` is not valid JSON; the message names the file.
    """
    root = root or repository_root()
    found = []
    for file in sorted(root.glob("bundles/*/configs/metadata.json")):
        try:
            metadata = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is not valid JSON: {error}") from error
        found.append(Bundle(file.parents[1].name, file.parents[1], metadata))
    return found


def find_bundle(name: str, root: Path | None = None) -> Bundle:
    """The bundle of one task.

    Args:
        name: task name, e.g. ``fluorescence_tumor``.
        root: as in :func:`list_bundles`.

    Raises:
        ValueError: if there is none of that name; the message lists those there are.
    """
    bundles = list_bundles(root)
    for bundle in bundles:
        if bundle.name == name:
            return bundle
    raise ValueError(f"no task {name!r}; there are: {', '.join(b.name for b in bundles) or '(none)'}")


def find_importer(layout: str) -> str:
    """The module that reads a public data set's own layout: ``medseg/tasks/<task>/import_<layout>.py``.

    Args:
        layout: e.g. ``cos-net``.

    Raises:
        ValueError: if there is none; the message lists those there are.
    """
    tasks = Path(__file__).resolve().parents[1] / "tasks"
    known = {f.stem.removeprefix("import_").replace("_", "-"): f for f in sorted(tasks.glob("*/import_*.py"))}
    if layout not in known:
        raise ValueError(f"no layout {layout!r} is known; there are: {', '.join(known)}")
    return f"medseg.tasks.{known[layout].parent.name}.{known[layout].stem}"
