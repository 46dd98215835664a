"""The MONAI decathlon-style ``datalist.json``: read, check, split, fingerprint, write.

    {"training": [{"image": "images/a.png", "label": "masks/a.png", "fold": 0, ...}, ...],
     "test":     [{"image": "images/b.png", "label": "masks/b.png", ...}, ...],
     "held_out": [...]}

Paths are relative to ``dataset_dir`` (or absolute). Items may carry any further field (``video``, ``style``,
``patient``, ...); items of one video or patient must share a fold. ``held_out`` is optional: a second test part, e.g.
another organ or another hospital.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.files import file_sha256, write_atomically
from medseg.io.images import read_grey

Item = dict[str, Any]

#: Fields that tie items together: all items of one such group must be on the same side of a split.
GROUP_FIELDS = ("patient", "video")

#: The lists of a data list; only the first is trained on.
SECTIONS = ("training", "test", "held_out")

__all__ = [
    "DatalistError",
    "check_binary_masks",
    "fingerprint",
    "load_datalist",
    "scored_items",
    "split",
    "stray_values",
    "write_datalist",
]


class DatalistError(ValueError):
    """What is wrong with a data list, all problems at once, each with its item."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        shown = list(problems[:20])
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        super().__init__(f"{path}: {len(problems)} problem(s)\n" + "\n".join(f"  - {p}" for p in shown))
        self.problems = list(problems)


def load_datalist(
    path: str | Path,
    dataset_dir: str | Path,
    check_item: Callable[[Item], str | None] | None = None,
    with_folds: bool = True,
) -> dict[str, list[Item]]:
    """Read and check a data list; every file it names exists afterwards, and nothing leaks between its sides.

    One side is a fold, ``test`` or ``held_out``. A leak is a patient, a video, a file or a file's content on two.

    Args:
        path: the ``datalist.json``.
        dataset_dir: folder that relative paths start from.
        check_item: looks at one item with absolute paths and returns what is wrong with it, or ``None``; for example
            :func:`check_binary_masks`.
        with_folds: every training item must have its ``fold``. ``False`` if the folds are still to be dealt: then no
            content may be there twice at all, because two names of one picture could fall into two folds.

    Returns:
        ``training``, ``test`` and ``held_out``, each a list of items with absolute paths.

    Raises:
        FileNotFoundError: if the list itself is missing.
        DatalistError: if it is no valid list; the message names every broken item.
    """
    path, root = Path(path), Path(dataset_dir)
    if not path.is_file():
        raise FileNotFoundError(f"no data list at {path}; write one, or pass --dataset_dir or --datalist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatalistError(path, [f"not valid JSON: {error}"]) from error
    if not isinstance(content, dict) or not any(content.get(k) for k in ("training", "test")):
        raise DatalistError(path, ['no "training" and no "test" list with items in it'])
    problems: list[str] = []
    lists: dict[str, list[Item]] = {}
    for section in SECTIONS:
        items = content.get(section) or []
        if not isinstance(items, list):
            problems.append(f"{section} is a {type(items).__name__}, not a list of items")
            continue
        lists[section] = [
            item
            for i, raw in enumerate(items)
            if (item := _item(raw, f"{section}[{i}]", with_folds and section == "training", root, problems))
        ]
    if not problems:
        problems += _group_problems(lists, with_folds) + _content_problems(lists, with_folds)
    if not problems and check_item:
        problems += _check_items(lists, check_item)
    if problems:
        raise DatalistError(path, problems)
    _level_fields(lists)
    return lists


def split(datalist: Mapping[str, list[Item]], part: str, fold: int = 0) -> list[Item]:
    """One part of a data list: the training items outside ``fold``, those of ``fold``, or the test items.

    Args:
        datalist: from :func:`load_datalist`.
        part: ``train``, ``validation``, ``test`` or ``held_out``.
        fold: the fold that validates.

    Returns:
        The items, never empty.

    Raises:
        ValueError: if the part is unknown or empty; the message says what the list has instead.
    """
    choose: dict[str, Callable[[], list[Item]]] = {
        "train": lambda: [i for i in datalist["training"] if i["fold"] != fold],
        "validation": lambda: [i for i in datalist["training"] if i["fold"] == fold],
        "test": lambda: list(datalist["test"]),
        "held_out": lambda: list(datalist.get("held_out", [])),
    }
    if part not in choose:
        raise ValueError(f"unknown part {part!r}; choose train, validation, test or held_out")
    items = choose[part]()
    if not items:
        folds = sorted({i["fold"] for i in datalist["training"]})
        raise ValueError(
            f"the data list has nothing for {part} with fold {fold}: {len(datalist['training'])} training items in "
            f"folds {folds}, {len(datalist['test'])} test items, {len(datalist.get('held_out', []))} held out"
        )
    return items


def scored_items(datalist: Mapping[str, list[Item]], parts: str | Sequence[str], fold: int = 0) -> list[Item]:
    """The items of one or several parts, each with the name of its part in the field ``part``.

    Args:
        datalist: from :func:`load_datalist`.
        parts: names as in :func:`split`; none gives no items.
        fold: as in :func:`split`.

    Raises:
        ValueError: as in :func:`split`.
    """
    names = [parts] if isinstance(parts, str) else list(parts)
    return [{**item, "part": name} for name in names for item in split(datalist, name, fold)]


def check_binary_masks(item: Item) -> str | None:
    """Say what is wrong with an item's image and mask: unreadable, of different sizes, or a mask that is not binary.

    Args:
        item: paths under ``image`` and ``label``.

    Returns:
        What is wrong, with the file and the fix, or ``None``.
    """
    try:
        image, label = read_grey(item["image"]), read_grey(item["label"])
    except (OSError, ValueError) as error:
        return str(error)
    if image.shape != label.shape:
        return (
            f"mask {item['label']} is {_size(label)} and its image {_size(image)}; "
            "save the mask in the image's own size"
        )
    if not np.isfinite(image).all():
        return f"image {item['image']} holds NaN or infinite values"
    stray = stray_values(label)
    if stray:
        return f"mask {item['label']} is not binary (values {stray}); use 0 and one other value, and no lossy format"
    return None


def stray_values(mask: npt.NDArray[Any]) -> str | None:
    """The first values of a mask, for a message, if it is not binary: 0 and one other, positive one. Else ``None``."""
    values = np.unique(mask)
    if np.isfinite(values).all() and len(values) <= 2 and values[0] >= 0 and (len(values) == 1 or values[0] == 0):
        return None
    return ", ".join(f"{v:g}" for v in values[:6]) + (", ..." if len(values) > 6 else "")


def fingerprint(items: Iterable[Item]) -> dict[str, Any]:
    """What data this is: a hash over names, fields and file contents, and the sizes.

    Args:
        items: items with absolute paths.

    Returns:
        ``sha256``, ``items``, ``bytes``. Moving the folder does not change the hash, changing one pixel does.
    """
    whole, count, size = hashlib.sha256(), 0, 0
    for item in items:
        count += 1
        for key in sorted(item):
            value = item[key]
            if key in ("image", "label"):
                content = Path(value).read_bytes()
                size += len(content)
                value = f"{Path(value).name}:{hashlib.sha256(content).hexdigest()}"
            whole.update(f"{key}={value}\n".encode())
    return {"sha256": whole.hexdigest(), "items": count, "bytes": size}


def write_datalist(path: Path, training: list[Item], test: list[Item], **header: Any) -> Path:
    """Write a data list.

    Args:
        path: file to write.
        training: items with ``image``, ``label`` and ``fold``.
        test: items with ``image`` and ``label``.
        header: further top-level fields, e.g. ``name`` and ``labels``.

    Returns:
        ``path``.
    """
    content = {**header, "numTraining": len(training), "numTest": len(test), "training": training, "test": test}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def _item(raw: Any, where: str, needs_fold: bool, root: Path, problems: list[str]) -> Item | None:
    if not isinstance(raw, dict):
        problems.append(f"{where} is a {type(raw).__name__}, not an object with image and label")
        return None
    before = len(problems)
    item = dict(raw)
    for key in ("image", "label"):
        value = raw.get(key)
        if not isinstance(value, str) or not value:
            problems.append(f'{where} has no "{key}"; give the path of a file')
            continue
        item[key] = str((root / value).resolve())
        if not Path(item[key]).is_file():
            problems.append(f"{where}: {key} {item[key]} does not exist (paths start from {root.resolve()})")
    if needs_fold and (not isinstance(raw.get("fold"), int) or isinstance(raw.get("fold"), bool)):
        problems.append(f'{where} ({raw.get("image")}) has no integer "fold"; number the folds from 0')
    return item if len(problems) == before else None


def _side(section: str, item: Item, with_folds: bool) -> str:
    return f"fold {item['fold']}" if section == "training" and with_folds else section


def _group_problems(lists: Mapping[str, list[Item]], with_folds: bool) -> list[str]:
    """Leaks between the sides of a split: one file, or one patient or video, in two folds or in fold and test."""
    seen: dict[tuple[str, str], str] = {}
    listed = Counter(str(item["image"]) for items in lists.values() for item in items)
    twice = {image for image, count in listed.items() if count > 1}
    problems: dict[tuple[str, str], str] = {}
    for section, items in lists.items():
        for item in items:
            side = _side(section, item, with_folds)
            for field in ("image", *GROUP_FIELDS):
                if item.get(field) is None:
                    continue
                key = (field, str(item[field]))
                other = seen.setdefault(key, side)
                if other != side:
                    problems[key] = f"{field} {item[field]} is in {other} and in {side}; keep it on one side"
                elif field == "image" and not with_folds and str(item[field]) in twice:
                    problems[key] = f"image {item[field]} is listed twice; keep one"
    return list(problems.values())


def _content_problems(lists: Mapping[str, list[Item]], with_folds: bool) -> list[str]:
    """Files of equal bytes under two names on two sides. Equal bytes have equal length, so few are read."""
    by_size: dict[int, dict[str, str]] = defaultdict(dict)
    for section, items in lists.items():
        for item in items:
            by_size[Path(item["image"]).stat().st_size][item["image"]] = _side(section, item, with_folds)
    twins = [(path, side) for files in by_size.values() if len(files) > 1 for path, side in files.items()]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        hashes = pool.map(lambda twin: file_sha256(Path(twin[0])), twins)
        by_content: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for twin, content in zip(twins, hashes, strict=True):
            by_content[content].append(twin)
    problems = []
    for files in by_content.values():
        (first, side), *others = files
        for path, other in others:
            if other != side:
                problems.append(f"image {path} in {other} is the same picture as {first} in {side}; keep one")
            elif not with_folds:
                problems.append(f"image {path} is the same picture as {first}; it would count twice: keep one")
    return problems


def _level_fields(lists: Mapping[str, list[Item]]) -> None:
    """Give every item the same fields, all text or all numbers: a batch is put together field by field."""
    items = [item for part in lists.values() for item in part]
    for field in dict.fromkeys(k for item in items for k in item if k != "fold"):
        values = [item.get(field) for item in items]
        if all(isinstance(v, (int, float)) for v in values):
            continue
        for item, value in zip(items, values, strict=True):
            item[field] = value if isinstance(value, str) else "" if value is None else json.dumps(value)


def _check_items(lists: Mapping[str, list[Item]], check_item: Callable[[Item], str | None]) -> list[str]:
    named = [(f"{section}[{i}]", item) for section, items in lists.items() for i, item in enumerate(items)]
    with ThreadPoolExecutor() as pool:  # decoding files releases the GIL
        found = list(pool.map(check_item, (item for _, item in named)))
    return [f"{where}: {problem}" for (where, _), problem in zip(named, found, strict=True) if problem]


def _size(image: npt.NDArray[Any]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
