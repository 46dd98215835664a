"""Configs as text: read safely, laid over each other as MONAI does it, and walked by id. No torch, no MONAI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

SEPARATOR = "::"

#: Endings of config files.
SUFFIXES = (".json", ".yaml", ".yml")

#: A config that unfolds to more values than this is no config. The largest of the model zoo has some thousand.
MAX_VALUES = 200_000

#: Brackets in brackets; a real config has about ten levels.
MAX_DEPTH = 100

Config = dict[str, Any]

__all__ = ["MAX_VALUES", "SEPARATOR", "SUFFIXES", "Config", "get", "lay_over", "parse_config", "read_config", "walk"]


class _Loader(yaml.CSafeLoader):
    """Plain data only; two equal keys in one mapping are an error, as one of them would be lost silently."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise ValueError(f"line {key.start_mark.line + 1}: a key is a word, this is a list or a mapping")
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: key {key.value} is there twice; remove one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> Config:
    """Read one ``.yaml``, ``.yml`` or ``.json`` config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: as in :func:`parse_config`.
    """
    return parse_config(path.read_text(encoding="utf-8"), str(path))


def parse_config(text: str, name: str) -> Config:
    """A config from its text, without building anything that is no plain data.

    Args:
        text: YAML or JSON.
        name: file name, for the suffix and for messages.

    Raises:
        ValueError: if it is no mapping of plain data, has a key twice, is nested deeper than 100 levels or unfolds
            (by YAML's aliases) to more than 200,000 values. The message names the file.
    """
    try:
        if name.lower().endswith(".json"):
            content = json.loads(text, object_pairs_hook=_unique)
        else:
            _check_depth(text)
            content = yaml.load(text, Loader=_Loader)
        _size(content, {}, 0)
    except RecursionError as error:
        raise ValueError(f"{name}: nested deeper than {MAX_DEPTH} levels") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())[:300]}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{name}: a config is a mapping of keys to values, this is a {type(content).__name__}")
    return {str(k): v for k, v in content.items()}


def lay_over(base: Config, overlay: Config) -> tuple[Config, list[tuple[str, str]]]:
    """Lay one config over another: ``a::b: v`` sets a nested key, ``+a: v`` extends, anything else replaces.

    Args:
        base: left unchanged.
        overlay: the later config.

    Returns:
        The merged config, and for each key of the overlay that found no place the key and the reason.
    """
    merged, lost = dict(base), []
    for key, value in overlay.items():
        *parents, name = key.removeprefix("+").replace("#", SEPARATOR).split(SEPARATOR)
        where: Any = merged
        for parent in parents:
            child = get(where, [parent])
            if not isinstance(child, (dict, list)):
                lost.append((key, f"{parent} is not there to be changed"))
                break
            copied = dict(child) if isinstance(child, dict) else list(child)
            where[int(parent) if isinstance(where, list) else parent] = copied
            where = copied
        else:
            place: Any = name
            if isinstance(where, list):
                place = int(name) if name.isdigit() else -1
                if not 0 <= place < len(where):
                    lost.append((key, "the list has no such place"))
                    continue
            if key.startswith("+"):
                before = get(where, [name])
                if isinstance(before, dict) and isinstance(value, dict):
                    value = {**before, **value}
                elif isinstance(before, list) and isinstance(value, list):
                    value = [*before, *value]
                elif before is not None:
                    lost.append((key, "+ adds a mapping to a mapping or a list to a list"))
                    continue
            where[place] = value
    return merged, lost


def get(config: Any, path: list[str]) -> Any:
    """The value at a path of keys and list positions; ``None`` if it is not there."""
    for key in path:
        if isinstance(config, dict) and key in config:
            config = config[key]
        elif isinstance(config, list) and key.isdigit() and int(key) < len(config):
            config = config[int(key)]
        else:
            return None
    return config


def walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in a config with its id, e.g. ``train::trainer::max_epochs``; parents before children."""
    todo = [(key, value)]
    while todo:
        key, value = todo.pop()
        if key:
            yield key, value
        above = f"{key}{SEPARATOR}" if key else ""
        if isinstance(value, dict):
            todo += [(f"{above}{name}", child) for name, child in reversed(value.items())]
        elif isinstance(value, list):
            todo += [(f"{above}{i}", value[i]) for i in range(len(value) - 1, -1, -1)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"key {key[:100]} is there twice; remove one")
        content[key] = value
    return content


def _check_depth(text: str) -> None:
    """Before the tree is built: building recurses in C, where too deep a nesting ends the process."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _size(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values a walk would meet. Aliases share objects, so each is counted once and remembered."""
    if not isinstance(value, (dict, list)):
        return 1
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    size = known.get(id(value))
    if size is None:
        known[id(value)] = 0  # a structure that holds itself would go on for ever; its depth stops it
        children = list(value.values()) if isinstance(value, dict) else value
        if any(child is value for child in children):
            raise ValueError("a value holds itself")
        size = known[id(value)] = 1 + sum(_size(child, known, depth + 1) for child in children)
    if size > MAX_VALUES:
        raise ValueError(f"unfolds to more than {MAX_VALUES} values")
    return size
