"""Macros of MONAI's config language (``%file::key``, ``%key``), resolved as text."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from medseg.bundles.configs import MAX_VALUES, SEPARATOR, Config, get, read_config

_FILE = re.compile(r"(.*\.(?:json|ya?ml))(?:::(.*))?$", re.IGNORECASE)

#: Called with a value's id, its macro and what is wrong with it.
OnProblem = Callable[[str, str, Exception], None]

__all__ = ["resolve_macros", "split_macro"]


def resolve_macros(
    value: Any,
    root: Path,
    local: Config | None = None,
    *,
    inside: Path | None = None,
    on_problem: OnProblem | None = None,
    files: dict[str, Config] | None = None,
) -> Any:
    """Replace every macro (``%file::key`` or ``%key``) by a copy of what it names, however deep.

    Args:
        value: config text.
        root: folder that macro paths start from (MONAI: the working directory).
        local: what ``%key`` without a file refers to; ``value`` itself by default.
        inside: folder that no macro may leave, for a config that is not trusted; none by default.
        on_problem: called for each macro that cannot be resolved, which then stays; by default it is an error.
        files: files that were read already, for several calls of the same ``root``.

    Raises:
        FileNotFoundError: if a macro names a missing file.
        KeyError: if a macro names a missing key.
        ValueError: if macros refer to each other in a circle, leave ``inside``, or unfold without end.
    """
    return _Resolver(root, inside, on_problem, {} if files is None else files).resolve(
        value, value if local is None else local, (), ""
    )


def split_macro(macro: str) -> tuple[str, list[str]]:
    """File (empty for the own config) and path of keys that a macro names."""
    text = macro.removeprefix("%").replace("#", SEPARATOR)
    found = _FILE.match(text)
    file, keys = (found[1], found[2] or "") if found else ("", text)
    return file, keys.split(SEPARATOR) if keys else []


class _Resolver:
    def __init__(self, root: Path, inside: Path | None, on_problem: OnProblem | None, files: dict[str, Config]) -> None:
        self.root, self.inside, self.on_problem = root, inside, on_problem
        self.files = files  # a bundle names its train.yaml twenty times
        self.count = 0

    def resolve(self, value: Any, local: Config, seen: tuple[str, ...], key: str) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ValueError(f"macros unfold to more than {MAX_VALUES} values")
        if isinstance(value, dict):
            return {
                k: self.resolve(v, local, seen, f"{key}{SEPARATOR}{k}" if key else str(k)) for k, v in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.resolve(v, local, seen, f"{key}{SEPARATOR}{i}") for i, v in enumerate(value)]
        if not (isinstance(value, str) and value.startswith("%")):
            return value
        try:
            found, source = self.look_up(value, local, seen)
        except (OSError, KeyError, ValueError) as error:
            if self.on_problem is None:
                raise
            self.on_problem(key, value, error)
            return value
        return self.resolve(found, source, (*seen, value), key)

    def look_up(self, macro: str, local: Config, seen: tuple[str, ...]) -> tuple[Any, Config]:
        """What a macro names, and the config that its own macros refer to."""
        if macro in seen:
            raise ValueError(f"macros go in a circle: {' -> '.join((*seen, macro))}")
        file, path = split_macro(macro)
        source = self.read(macro, file) if file else local
        found: Any = source
        for key in path:
            if isinstance(found, str) and found.startswith("%"):
                found, source = self.look_up(found, source, (*seen, macro))
            # a key may be there and hold nothing
            if not (isinstance(found, dict) and key in found):
                if get(found, [key]) is None:
                    raise KeyError(f"macro {macro} names a key that is not there: {key}")
                found = get(found, [key])
            else:
                found = found[key]
        return deepcopy(found), source

    def read(self, macro: str, file: str) -> Config:
        if file not in self.files:
            path = self.root / file
            if self.inside is not None and not path.resolve().is_relative_to(self.inside.resolve()):
                raise ValueError(f"macro {macro} names a file outside of {self.inside.name}")
            if not path.is_file():
                raise FileNotFoundError(f"macro {macro} names {path}, which does not exist")
            self.files[file] = read_config(path)
        return self.files[file]
