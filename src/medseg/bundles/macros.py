"""Macros of MONAI's config language (``%file::key``, ``%key``), resolved as text."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

SEPARATOR = "::"

Config = dict[str, Any]

__all__ = ["SEPARATOR", "Config", "resolve_macros"]


def resolve_macros(value: Any, root: Path, local: Config | None = None) -> Any:
    """Replace every macro (``%file::key`` or ``%key``) by a copy of what it names, however deep.

    Args:
        value: config text.
        root: folder that macro paths start from (MONAI: the working directory).
        local: what ``%key`` without a file refers to; ``value`` itself by default.

    Raises:
        FileNotFoundError: if a macro names a missing file.
        KeyError: if a macro names a missing key.
        ValueError: if macros refer to each other in a circle.
    """
    return _resolve(value, root, value if local is None else local, ())


def _resolve(value: Any, root: Path, local: Config, seen: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {k: _resolve(v, root, local, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_resolve(v, root, local, seen) for v in value]
    if not (isinstance(value, str) and value.startswith("%")):
        return value
    if value in seen:
        raise ValueError(f"macros go in a circle: {' -> '.join((*seen, value))}")
    file, _, keys = value[1:].rpartition(".yaml" + SEPARATOR)
    if file:
        path = root / f"{file}.yaml"
        if not path.is_file():
            raise FileNotFoundError(f"macro {value} names {path}, which does not exist")
        source = yaml.safe_load(path.read_text(encoding="utf-8"))
    else:
        source = local
    found = source
    for key in keys.replace("#", SEPARATOR).split(SEPARATOR):
        if isinstance(found, str) and found.startswith("%"):
            found = _resolve(found, root, source, (*seen, value))
        try:
            found = found[int(key)] if isinstance(found, list) else found[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise KeyError(f"macro {value} names a key that is not there: {key}") from error
    return _resolve(deepcopy(found), root, source, (*seen, value))
