"""What is wrong with one config: its references, expressions, components and keys. Text only, nothing is built."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundles.configs import SEPARATOR, Config, get, lay_over, walk
from medseg.bundles.expressions import (
    absolute,
    free_names,
    imported_name,
    is_expression,
    parse_expression,
    references,
)
from medseg.bundles.macros import resolve_macros, split_macro
from medseg.bundles.targets import Signature, Target, find_target, index_monai

#: Keys that MONAI itself adds to a config or takes from the command line.
MONAI_KEYS = {"_meta_", "initialize", "run", "finalize", "tracking", "save_execute_config"}

#: Names that MONAI and its tools read from a config (monai/bundle/properties.py and section 1.3 of its specification);
#: the first ones are required.
PROPERTIES = {
    "train": (
        ["bundle_root", "device", "dataset_dir", "train::trainer", "train::dataset", "train::inferer"],
        [
            "train::trainer::max_epochs", "network_def", "network", "train::dataset::data", "train::handlers",
            "train::preprocessing", "train::postprocessing", "train::key_metric", "validate::evaluator",
            "val_interval", "validate::handlers", "validate::dataset", "validate::inferer",
            "validate::preprocessing", "validate::postprocessing", "validate::key_metric",
        ],
    ),
    "infer": (
        ["bundle_root", "device", "dataset_dir", "dataset", "evaluator", "network_def", "inferer"],
        ["network", "dataset::data", "handlers", "preprocessing", "postprocessing", "key_metric", "output_dir"],
    ),
}  # fmt: skip

#: Keys of a component that are no arguments.
NO_ARGUMENTS = {"_target_", "_disabled_", "_requires_", "_desc_", "_mode_"}

UNUSED = "nothing uses this key"

#: Id of a value, what is wrong with it, and what to do.
Found = tuple[str, str, str]

__all__ = [
    "MONAI_KEYS",
    "UNUSED",
    "Problem",
    "config_problems",
    "cycles",
    "missing_references",
    "override_problems",
    "unused_keys",
]


@dataclass(frozen=True)
class Problem:
    """Something wrong in a bundle: where, what, and what to do."""

    file: str
    key: str
    message: str
    fix: str = ""

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        return f"{place}: {self.message}" + (f"\n    fix: {self.fix}" if self.fix else "")


def config_problems(
    files: Mapping[str, Config],
    root: Path,
    metadata: Mapping[str, Any],
    used: Iterable[str] = (),
    macro_files: dict[str, Config] | None = None,
) -> tuple[Config, list[Problem]]:
    """Check the config that several files make when they are laid over each other.

    Args:
        files: configs by file name, in their order.
        root: folder that macro paths start from.
        metadata: content of ``metadata.json``.
        used: ids that other configs take by macro.
        macro_files: files that macros named before, by name.

    Returns:
        The merged config with its macros resolved, and the problems.
    """
    problems: list[Problem] = []
    merged: Config = {}
    origin: dict[str, str] = {}
    for name, content in files.items():
        merged, lost = lay_over(merged, content)
        problems += [Problem(name, key, why, "correct the key, or set what is above it first") for key, why in lost]
        origin |= {key.removeprefix("+").replace("#", SEPARATOR): name for key in content}

    last = list(files)[-1]

    def place(key: str) -> str:
        while key and key not in origin:
            key = key.rpartition(SEPARATOR)[0]
        return origin.get(key, last)

    def macro_problem(key: str, macro: str, error: Exception) -> None:
        message = str(error.args[0]) if isinstance(error, KeyError) else str(error)
        problems.append(Problem(place(key), key, message, "correct the path or the key of the macro"))

    used_here = set(used) | {SEPARATOR.join(split_macro(v)[1]) for _, v in walk(merged) if _is_local_macro(v)}
    try:
        config = resolve_macros(merged, root, on_problem=macro_problem, files=macro_files)
    except ValueError as error:
        return merged, [*problems, Problem(last, "", str(error), "break the circle")]
    config["_meta_"] = dict(metadata)
    found = [
        *text_problems(config),
        *_target_problems(config),
        *cycles(config),
        # a key of the base that an overlay makes useless is not misspelt
        *(p for p in unused_keys(config, used_here) if place(p[0]) == last),
        *_missing_properties(config),
    ]
    return config, problems + [Problem(place(key), key, message, fix) for key, message, fix in found]


def override_problems(
    overrides: Iterable[str], files: Mapping[str, Config], others: Mapping[str, Config], root: Path
) -> list[str]:
    """What is wrong with the keys of a ``python -m monai.bundle run`` line.

    Args:
        overrides: keys as given, e.g. ``train::trainer::max_epochs``.
        files: the configs of the run, by name.
        others: the bundle's other configs.
        root: folder that macro paths start from.

    Returns:
        A message for each key that no config has and no component takes.
    """
    merged: Config = {}
    for content in files.values():
        merged, _ = lay_over(merged, content)
    config = resolve_macros(merged, root, on_problem=lambda *_: None)
    messages = []
    for given in overrides:
        path = given.removeprefix("+").replace("#", SEPARATOR).split(SEPARATOR)
        if path[0] in MONAI_KEYS:
            continue
        depth = next((i for i in range(len(path)) if not _has(config, path[: i + 1])), len(path))
        if depth == len(path):
            continue
        parent = get(config, path[:depth]) if depth else config
        known, free = _children(config, path[:depth], parent)
        if depth == len(path) - 1 and (free or path[depth] in known):
            continue
        if depth == 0:
            elsewhere = [name for name, content in others.items() if path[0] in content]
            if elsewhere:
                messages.append(f"--{given} belongs to {elsewhere[0]}, which is not among the configs of this run")
                continue
        close = difflib.get_close_matches(path[depth], known, n=1)
        suggestion = SEPARATOR.join([*path[:depth], *close, *path[depth + 1 :]])
        messages.append(f"--{given}" + (f" (did you mean --{suggestion}?)" if close else ""))
    return messages


def _has(config: Config, path: list[str]) -> bool:
    parent = get(config, path[:-1]) if len(path) > 1 else config
    if isinstance(parent, list):
        return path[-1].isdigit() and int(path[-1]) < len(parent)
    return isinstance(parent, dict) and path[-1] in parent


def _children(config: Config, path: list[str], parent: Any) -> tuple[list[str], bool]:
    """Names that a key below ``path`` may have, and whether any other may be added as well."""
    if not isinstance(parent, dict):
        return [], False
    if "_target_" not in parent:
        # a mapping that is handed on as a whole (`tags: '@tags'`, an argument) takes any key; a section does not
        inside = any("_target_" in (get(config, path[:i]) or {}) for i in range(1, len(path)))
        whole = SEPARATOR.join(path)
        return list(parent), inside or (
            bool(path) and any(whole in references(v) for _, v in walk(config) if isinstance(v, str))
        )
    signature = _signature_of(parent)
    if signature is None:
        return list(parent), True
    return [*signature.required, *signature.optional], signature.takes_any


def _signature_of(component: Config) -> Signature | None:
    name = component["_target_"]
    try:
        target = find_target(name if "." in name else index_monai([name]).get(name, name))
    except ModuleNotFoundError:
        return None
    return target.signature if target else None


def _is_local_macro(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("%") and not split_macro(value)[0]


def missing_references(config: Config, everything: Config) -> Iterator[Found]:
    """References to what neither this config nor another one of the bundle has (it may be an overlay)."""
    ids = {key for key, _ in walk(everything)} | {key for key, _ in walk(config)}
    for key, value in walk(config):
        if isinstance(value, str) and not value.startswith("%"):
            for reference in _safe_references(value, key):
                if reference and reference not in ids and not reference.startswith("_meta_"):
                    yield key, f"@{reference} is not there", "define it"


def text_problems(config: Config) -> Iterator[Found]:
    """References that lead nowhere, and expressions that are no Python or use what nothing defines."""
    ids = {key for key, _ in walk(config)}
    imported = set()
    wanted = []
    for key, value in walk(config):
        if not isinstance(value, str) or value.startswith("%") or key.startswith("_meta_"):
            continue
        try:
            text = absolute(value, key)
            for reference in references(text):
                if reference not in ids:
                    close = difflib.get_close_matches(reference, ids, n=1)
                    yield key, f"@{reference} is not there", f"did you mean @{close[0]}?" if close else "define it"
            if is_expression(value):
                if text.startswith(("$import", "$from")):
                    statement = parse_expression(text)
                    if not isinstance(statement, ast.Expression):
                        imported.add(imported_name(statement)[0])
                wanted.append((key, free_names(text)))
        except ValueError as error:
            yield key, str(error), "mend the expression"
    for key, names in wanted:
        for name in sorted(names - imported):
            yield key, f"nothing defines {name}", f"add '$import {name}' to imports"


def _target_problems(config: Config) -> Iterator[Found]:
    components = [(k, v) for k, v in walk(config) if isinstance(v, dict) and "_target_" in v]
    names = [v["_target_"] for _, v in components if isinstance(v["_target_"], str)]
    try:
        short = index_monai([n for n in names if n.isidentifier()])
    except ModuleNotFoundError:
        short = {}
    for key, component in components:
        name = component["_target_"]
        where = f"{key}{SEPARATOR}_target_"
        if not isinstance(name, str) or name[:1] in ("$", "@", "%"):
            continue
        if "." not in name and name not in short:
            yield where, f"MONAI has no {name}", "give the full name: package.module.Class"
            continue
        try:
            target = find_target(short.get(name, name))
        except ModuleNotFoundError as error:
            yield where, f"{name} cannot be looked up: {error}", f"pip install {error.name}"
            continue
        if target is None:
            yield where, f"{name} does not exist in the installed package", "correct the name"
        else:
            yield from _argument_problems(key, component, target)


def _argument_problems(key: str, component: Config, target: Target) -> Iterator[Found]:
    signature = target.signature
    if signature is None:
        return
    name = target.name.rpartition(".")[2]
    given = [k for k in component if k not in NO_ARGUMENTS]
    known = [*signature.required, *signature.optional]
    for argument in given:
        if argument not in known and not signature.takes_any:
            close = difflib.get_close_matches(argument, known, n=1)
            fix = f"did you mean {close[0]}?" if close else f"it takes {', '.join(known)}"
            yield f"{key}{SEPARATOR}{argument}", f"{name} takes no argument {argument}", fix
    missing = [a for a in signature.required if a not in given]
    if missing and component.get("_mode_") != "callable":
        yield key, f"{name} needs {', '.join(missing)}", "add it"


def cycles(config: Config) -> Iterator[Found]:
    """References that lead back to themselves. An item needs all that is inside it, and all that those refer to."""
    needs: dict[str, list[str]] = {}
    for key, value in walk(config):
        if isinstance(value, str) and not key.startswith("_meta_"):
            try:
                needs[key] = references(absolute(value, key))
            except ValueError:
                continue
        elif isinstance(value, dict):
            needs[key] = [f"{key}{SEPARATOR}{k}" for k in value]
        elif isinstance(value, list):
            needs[key] = [f"{key}{SEPARATOR}{i}" for i in range(len(value))]
    done: set[str] = set()
    for start in needs:
        path: list[str] = []
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:  # no recursion: a stranger's config may have a chain of any length
            key, leaving = stack.pop()
            if leaving:
                path.pop()
                done.add(key)
            elif key in path:
                yield (
                    path[-1],
                    f"goes in a circle: {' -> '.join([*path[path.index(key) :], key])[:300]}",
                    "break the circle",
                )
                return
            elif key not in done:
                path.append(key)
                stack.append((key, True))
                stack += [(n, False) for n in needs.get(key, [])]


def unused_keys(config: Config, used: set[str] | frozenset[str] = frozenset()) -> Iterator[Found]:
    """Keys that nothing reads: most are misspelt.

    Args:
        config: with its macros resolved.
        used: ids that are read by other ways than references.
    """
    kind = _workflow(config)
    if kind is None:
        return
    roots = {*MONAI_KEYS, "imports", "displayable_configs", *(p for part in PROPERTIES[kind] for p in part)}
    targets = {r for key, value in walk(config) if isinstance(value, str) for r in _safe_references(value, key)} | used

    read: set[str] = set()  # every id that is read, and everything above it
    for target in (*targets, *roots):
        parts = target.split(SEPARATOR)
        read |= {SEPARATOR.join(parts[: i + 1]) for i in range(len(parts))}

    def is_used(key: str) -> bool:
        return key in read or key.rpartition(SEPARATOR)[0] in targets

    for key, value in config.items():
        if not is_used(key):
            close = difflib.get_close_matches(key, [t for t in targets if SEPARATOR not in t], n=1)
            yield key, UNUSED, f"did you mean {close[0]}?" if close else "remove it, or refer to it"
        elif isinstance(value, dict) and "_target_" not in value and key in ("train", "validate", "test"):
            for child in value:
                if not is_used(f"{key}{SEPARATOR}{child}"):
                    yield f"{key}{SEPARATOR}{child}", UNUSED, "remove it, or refer to it"


def _safe_references(value: str, key: str) -> list[str]:
    try:
        return references(absolute(value, key))
    except ValueError:
        return []


def _workflow(config: Config) -> str | None:
    """``train`` or ``infer``, by what is there."""
    return "train" if "train" in config else "infer" if "evaluator" in config or "run" in config else None


def _missing_properties(config: Config) -> Iterator[Found]:
    kind = _workflow(config)
    if kind is None or "run" not in config:
        return
    for name in PROPERTIES[kind][0]:
        if not _has(config, name.split(SEPARATOR)):
            yield name, f"MONAI's tools need {name} in a config for {kind}", "add it (docs/bundles.md)"
