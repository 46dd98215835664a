"""Judging what a config would run, against a list of what is known to be harmless. Nothing is run or imported.

A config is code: ``_target_`` names anything that Python can import and ``$`` is evaluated. Here every name in it is
traced to where the installed packages really define it, and compared with a list. What is not on the list, or
cannot be traced, is not trusted. The list (:mod:`medseg.bundles.harmless`) keeps out running programs and code,
importing by name, the network, reading pickles and writing files other than by writers of images, tables and weights.
"""

from __future__ import annotations

import ast
import builtins
import configparser
import functools
import importlib.machinery
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeGuard

from medseg.bundles.config_check import NO_ARGUMENTS
from medseg.bundles.configs import SEPARATOR, Config, get, walk
from medseg.bundles.expressions import (
    GIVEN,
    REFERENCES,
    absolute,
    dotted_names,
    imported_name,
    is_expression,
    own_names,
    parse_expression,
    references,
)
from medseg.bundles.harmless import (
    ATTRIBUTES,
    CALLED_ONLY,
    COMPONENTS_ONLY,
    DEFINED,
    FETCHED_BY_DEFAULT,
    FETCHING,
    MODULES,
    NAMED,
    READER_CLASSES,
    READERS,
    SPECIAL,
)
from medseg.bundles.targets import Target, find_target, index_monai

_DEFINED = re.compile("|".join(f"(?:{p})" for p in DEFINED))
_NAMED = re.compile("|".join(f"(?:{p})" for p in NAMED))
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*)://", re.IGNORECASE)

#: Longer texts and expressions are no config of a person; some questions asked of them take the square of their length.
MAX_TEXT, MAX_EXPRESSION, MAX_PARTS = 20_000, 4_000, 8

__all__ = ["Use", "judge_configs", "judge_logging", "reason_for"]


@dataclass(frozen=True)
class Use:
    """Something that a config would do.

    Attributes:
        file: the config.
        key: id of the value in it.
        kind: ``target``, ``expression``, ``import`` or ``value``.
        text: what is written there.
        reason: why it is not trusted; empty if it is.
    """

    file: str
    key: str
    kind: str
    text: str
    reason: str = ""


def judge_configs(configs: Mapping[str, Config], metadata: Config) -> list[Use]:
    """Every target, expression and import of a bundle with its verdict, and every other value that is not trusted.

    The configs are judged together, because any of them can be laid over any other on the command line.

    Args:
        configs: content by file name, macros resolved.
        metadata: content of ``metadata.json``, which expressions can refer to.
    """
    return _Judge(configs, metadata).judge()


def judge_logging(text: str, file: str) -> list[Use]:
    """Python's logging evaluates parts of its config file: handlers with other arguments than the console's are code.

    Args:
        text: content of ``logging.conf``.
        file: its name.
    """
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as error:
        return [Use(file, "", "value", "", f"cannot be read: {str(error).splitlines()[0]}")]
    uses = []
    for section in parser.sections():
        for key, value in parser.items(section):
            harmless = {
                "class": r"(logging\.)?(StreamHandler|NullHandler|Formatter)",
                "args": r"\(\s*(sys\.(stdout|stderr)\s*,?\s*)?\)",
                "kwargs": r"\{\s*\}",
            }.get(key)
            if harmless and not re.fullmatch(harmless, value):
                uses.append(Use(file, f"[{section}] {key}", "value", value[:200], "logging evaluates this as Python"))
    return uses


@functools.cache
def reason_for(name: str) -> str:
    """Why a full dotted name is not trusted; empty if it is."""
    if any(part.startswith("_") for part in name.split(".")):
        return f"{name} is private"
    try:
        target = find_target(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed here, so {name} cannot be judged"
    except (OSError, ValueError, RecursionError):
        return f"{name} cannot be traced"
    # a name of this list may be defined anywhere in its own package: numpy.stack is numpy._core.shape_base.stack
    if _NAMED.fullmatch(name) and (target is None or target.name.split(".")[0] == name.split(".")[0]):
        return ""
    if target is None:
        return f"{name} does not exist in the installed packages"
    if target.found and _DEFINED.fullmatch(target.name) and "._" not in target.name:
        return ""
    real = f" (really {target.name})" if target.name != name else ""
    return f"{name}{real} is not on the list of harmless names"


class _Judge:
    """What is known of a bundle while its values are judged."""

    def __init__(self, configs: Mapping[str, Config], metadata: Config) -> None:
        self.configs, self.metadata = configs, metadata
        self.imported = dict(GIVEN)
        self.uses: list[Use] = []
        self.known: dict[str, list[Any]] = {}
        self.without_import: set[str] = set()
        self.expressions: list[tuple[str, str, str, ast.Expression]] = []

    def judge(self) -> list[Use]:
        everything = [*self.configs.values(), self.metadata]
        targets = [v for c in everything for k, v in walk(c) if k.endswith("_target_") and isinstance(v, str)]
        with suppress(ModuleNotFoundError):
            index_monai([t for t in targets if t.isidentifier()])  # in one pass over MONAI's sources
        # metadata are part of the config under this name, and their expressions are evaluated when they are referred to
        for file, config in {**self.configs, "configs/metadata.json": {"_meta_": self.metadata}}.items():
            for key, value in walk(config):
                name = key.replace("#", SEPARATOR).rpartition(SEPARATOR)[2].removeprefix("+")
                self.look_at(file, key, name, value)
        for file, key, value, tree in self.expressions:  # when all imports are known
            reasons = dict.fromkeys([*self.reference_reasons(key, value), *_expression_reasons(tree, self.imported)])
            self.uses.append(Use(file, key, "expression", value[:300], "; ".join(reasons)[:300]))
        return self.uses

    def look_at(self, file: str, key: str, name: str, value: Any) -> None:
        def add(kind: str, reason: str, text: object = value) -> None:
            self.uses.append(Use(file, key, kind, str(text)[:300], reason))

        if key == "_meta_" and file != "configs/metadata.json":
            add("value", "hides the metadata", "_meta_")
        if name == "_target_":
            add("target", _target_reason(value))
        elif name in SPECIAL or (name in FETCHING and key in self.configs.get(file, {}) and key != name):
            reason = self.special_reason(name, value)  # wherever it stands: an argument, or a key `a::b` that makes one
            if reason:
                add("argument", reason, f"{name}: {value}")
        if isinstance(value, dict) and "_target_" in value:
            for argument in sorted(FETCHING & set(value)):
                reason = self.special_reason(argument, value[argument])
                if reason:
                    text = f"{argument}: {value[argument]}"
                    self.uses.append(Use(file, f"{key}::{argument}", "argument", text[:300], reason))
            for reason in self.component_reasons(value):
                add("argument", reason, value["_target_"])
        if isinstance(value, str) and value[:1] == "@" and self.holds_import(value):
            add("argument", "refers to an import, whose use is then not seen")
        if is_expression(value):
            self.look_at_expression(file, key, value)
        elif isinstance(value, str) and name != "_target_" and not key.startswith("_meta_"):
            reason = _text_reason(value, name)
            if reason:
                add("value", reason)

    def look_at_expression(self, file: str, key: str, value: str) -> None:
        if len(value) > MAX_EXPRESSION:
            self.uses.append(Use(file, key, "expression", value[:100], f"is longer than {MAX_EXPRESSION} signs"))
            return
        try:
            tree = parse_expression(absolute(value, key))
        except ValueError as error:
            self.uses.append(Use(file, key, "expression", value[:300], f"cannot be read: {error}"[:300]))
            return
        if isinstance(tree, ast.Expression):
            self.expressions.append((file, key, value, tree))
            return
        name, full = imported_name(tree)
        reason = _import_reason(tree, full)
        if name.startswith("_") or self.imported.setdefault(name, full) != full:
            reason = f"{name} already means {self.imported.get(name, 'something private')}"
        self.uses.append(Use(file, key, "import", value[:300], reason))

    def meanings(self, value: Any) -> list[Any]:
        """What a value may be: of a reference, whatever any config of the bundle has there."""
        if not (isinstance(value, str) and value[:1] == "@"):
            return [value]
        if value not in self.known:
            found, seen, todo = [], set(), [value]
            while todo:
                reference = todo.pop()
                if reference in seen:
                    continue
                seen.add(reference)
                values = self.look_up(reference)
                found += [v for v in values if not (isinstance(v, str) and v[:1] == "@")] or (
                    [] if values else [reference]
                )
                todo += [v for v in values if isinstance(v, str) and v[:1] == "@"]
            self.known[value] = found or [value]
        return self.known[value]

    def look_up(self, reference: str) -> list[Any]:
        path = reference[1:].replace("#", SEPARATOR).split(SEPARATOR)
        found = []
        for config in self.configs.values():
            found.append(get({**config, "_meta_": self.metadata}, path))
            # a key `a::b` that another config would be changed by
            found += [v for k, v in config.items() if k.replace("#", SEPARATOR).split(SEPARATOR) == path]
        return [f for f in found if f is not None]

    def special_reason(self, name: str, value: Any) -> str:
        """Arguments through which a trusted component would do untrusted things."""
        for meaning in self.meanings(value):
            if name in ("reader", "writer"):
                for each in meaning if isinstance(meaning, list) else [meaning]:
                    if not self.is_reader(each):
                        return f"the {name} is imported by its name, and this is none of MONAI's, or computed"
            elif name in FETCHING:
                if meaning not in (None, False, "", "$None", "$False"):
                    return "makes the library download weights"
            elif meaning not in SPECIAL[name][0]:
                return SPECIAL[name][1]
        return ""

    def is_reader(self, value: Any) -> bool:
        if isinstance(value, str) and value[:1] == "@":
            return all(self.is_reader(m) for m in self.meanings(value) if m != value) and self.meanings(value) != [
                value
            ]
        if isinstance(value, dict):
            return READER_CLASSES.fullmatch(str(value.get("_target_"))) is not None
        return value is None or (isinstance(value, str) and READERS.fullmatch(value) is not None)

    def component_reasons(self, component: Config) -> Iterator[str]:
        """What a component does by default that only an argument can stop."""
        name = _full_name(component["_target_"])
        target = find_target(name) if name and not reason_for(name) else None
        if target is None:
            return
        for pattern, argument in FETCHED_BY_DEFAULT.items():
            if re.fullmatch(pattern, target.name) and argument not in component:
                yield f"downloads weights unless {argument} says no"
        is_torchvision = target.name.startswith(("torchvision.models.", "monai.networks.nets.torchvision_fc."))
        if is_torchvision and component.get("weights") is not None:
            yield "downloads weights"
        if any(str(k).startswith("_") and k not in NO_ARGUMENTS for k in component):
            yield "has a private argument"
        if target.name.endswith(".init_process_group") and set(component) - {"_target_", "backend", "timeout"}:
            yield "connects to an address that is not seen"
        if _is_component_only(target) and component.get("_mode_", "default") != "default":
            yield "is prepared for a call whose arguments are not seen"

    def reference_reasons(self, key: str, value: str) -> Iterator[str]:
        """An import that is referred to is a module, and the attributes of modules are not judged."""
        for reference in references(absolute(value, key)):
            if self.holds_import(f"@{reference}"):
                yield f"@{reference} refers to an import"

    def holds_import(self, reference: str) -> bool:
        """Whether a reference leads to an import, through lists, mappings and other references as well."""
        seen: set[str] = set()
        todo = [reference]
        while todo:
            current = todo.pop()
            if current in seen or current in self.without_import:
                continue
            seen.add(current)
            for meaning in self.meanings(current):
                for _, each in walk(meaning, "x"):
                    if isinstance(each, str) and re.match(r"\$\s*(import|from)\b", each):
                        return True
                    if isinstance(each, str) and each[:1] in ("@", "$"):
                        todo += [f"@{inner}" for inner in references(each)]
        self.without_import |= seen
        return False


def _full_name(target: object) -> str:
    """The dotted name of a target; empty if it has none."""
    if not isinstance(target, str):
        return ""
    try:
        name = index_monai([target]).get(target, target) if target.isidentifier() else target
    except ModuleNotFoundError:
        name = target
    return name if _DOTTED.fullmatch(name) else ""


def _is_component_only(target: Target) -> bool:
    signature = target.signature
    arguments = {*signature.required, *signature.optional} if signature else set()
    return COMPONENTS_ONLY.fullmatch(target.name) is not None or bool(arguments & FETCHING)


def _target_reason(target: object) -> str:
    if not isinstance(target, str) or target[:1] in ("$", "@", "%"):
        return "the target is computed, so it cannot be judged"
    name = _full_name(target)
    return reason_for(name) if name else f"MONAI has no {target[:100]}"


def _import_reason(statement: ast.Import | ast.ImportFrom, full: str) -> str:
    if isinstance(statement, ast.ImportFrom) and statement.level:
        return "relative import"
    if isinstance(statement, ast.Import) or full in ("os.path", "torch.nn", "monai.transforms"):
        return "" if re.fullmatch(MODULES, full) else reason_for(full)
    return reason_for(full)  # a name may be anything, and references carry it anywhere


def _expression_reasons(tree: ast.Expression, imported: Mapping[str, str]) -> Iterator[str]:
    own = own_names(tree)
    hidden = sorted(n for n in own if n in imported or hasattr(builtins, n) or n == REFERENCES)
    if hidden:  # the same word would mean two things in one expression
        yield f"gives another meaning to {', '.join(hidden)}"
    harmless = {n.func for n in ast.walk(tree) if _is_switch(n, imported)} | set(_reference_names(tree))
    called = {n.func for n in ast.walk(tree) if isinstance(n, ast.Call)}
    for node, text, is_own in dotted_names(tree):
        if node in harmless:
            continue
        if node not in called and _written_out(node, imported) in CALLED_ONLY:
            yield f"{text} is handed over, and its arguments are then not seen"
        first, *attributes = text.split(".")
        if text[0] == "." or is_own:
            yield from (f".{a} is not on the list of harmless attributes" for a in attributes if a not in ATTRIBUTES)
        else:
            yield from _name_reasons(first, attributes, imported)
    joined = set(_joined(tree))
    for part in ast.walk(tree):
        if isinstance(part, ast.Call):
            yield from _call_reasons(part, imported)
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            reason = _text_reason(part.value, "", joined=part in joined)
            if reason:
                yield f"{part.value[:80]!r} {reason}"


def _reference_names(tree: ast.AST) -> Iterator[ast.expr]:
    """Where the name that references become is used as MONAI writes it: ``__local_refs['key']``."""
    for node in ast.walk(tree):
        looked_up = node.value if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) else None
        if isinstance(looked_up, ast.Name) and looked_up.id == REFERENCES:
            yield looked_up


def _is_switch(node: ast.AST, imported: Mapping[str, str]) -> TypeGuard[ast.Call]:
    """``setattr(torch.backends.cudnn, 'benchmark', True)``, which half of the zoo has and which changes no code."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr"):
        return False
    if len(node.args) != 3 or node.keywords or not all(isinstance(a, ast.Constant) for a in node.args[1:]):
        return False
    return _written_out(node.args[0], imported) == "torch.backends.cudnn"


def _written_out(node: ast.AST, imported: Mapping[str, str]) -> str:
    """The full dotted name of a name with attributes; empty for anything else."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([imported.get(node.id, f"builtins.{node.id}"), *reversed(attributes)])


def _name_reasons(first: str, attributes: list[str], imported: Mapping[str, str]) -> Iterator[str]:
    full = imported.get(first, f"builtins.{first}")
    if len(attributes) > MAX_PARTS:
        yield f"{first}.{'.'.join(attributes)[:60]}... has more parts than any name"
        return
    if full == "torch" and attributes == ["backends", "cudnn"]:
        return  # a module, of use to nothing but the switch
    reason = ""
    # what is trusted may be followed by harmless attributes of its value: torch.float32.itemsize
    for end in range(len(attributes), -1, -1):
        name = ".".join([full, *attributes[:end]])
        why = reason_for(name)
        if not why and all(a in ATTRIBUTES for a in attributes[end:]):
            target = None if name.startswith("builtins.") else find_target(name)
            if target is not None and name not in CALLED_ONLY and _is_component_only(target):
                yield f"{name} is trusted as a component (_target_) only, where its arguments are seen"
            return
        reason = reason or why
    yield reason or f"{'.'.join([full, *attributes])} is not on the list of harmless names"


def _call_reasons(node: ast.Call, imported: Mapping[str, str]) -> Iterator[str]:
    name = _written_out(node.func, imported)
    given: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is not None:
            given[keyword.arg] = _literal(keyword.value)
            continue
        names = [_literal(k) for k in keyword.value.keys] if isinstance(keyword.value, ast.Dict) else [_COMPUTED]
        values = keyword.value.values if isinstance(keyword.value, ast.Dict) else []
        if all(isinstance(name, str) for name in names):
            given |= {str(n): _literal(v) for n, v in zip(names, values, strict=True)}
        else:
            yield "the names of arguments are computed"
    for argument, value in given.items():
        if argument in ("reader", "writer"):
            if not (isinstance(value, str) and READERS.fullmatch(value)):
                yield f"the {argument} is imported by its name, and this is none of MONAI's, or computed"
        elif argument in FETCHING:
            if value not in (None, False):
                yield f"{argument} makes the library download weights"
        elif argument in SPECIAL and value not in SPECIAL[argument][0]:
            yield f"{argument}: {SPECIAL[argument][1]}"
    if name == "torch.load" and len(node.args) > 2:
        yield "torch.load with a pickle module unpickles, and unpickling runs code"
    elif name == "torch.distributed.init_process_group" and (len(node.args) > 1 or set(given) - {"backend", "timeout"}):
        yield "connects to an address that is not seen"
    elif name == "importlib.util.find_spec" and not (
        len(node.args) == 1 and isinstance(_literal(node.args[0]), str) and str(_literal(node.args[0])).isidentifier()
    ):
        yield "find_spec imports what is before a dot"


_COMPUTED = object()


def _literal(node: ast.AST | None) -> object:
    """A constant's value; something unlike any value for what is computed."""
    return node.value if isinstance(node, ast.Constant) else _COMPUTED


def _joined(tree: ast.AST) -> Iterator[ast.AST]:
    """Texts that only continue another: ``@bundle_root + '/models'`` or ``f'{x}/models'``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield node.right
        elif isinstance(node, ast.JoinedStr):
            yield from node.values[1:]


def _text_reason(text: str, name: str, joined: bool = False) -> str:
    """Why a text is not trusted as a path, an address or a name. Where the user's data lie may be anywhere."""
    if len(text) > MAX_TEXT:
        return f"is longer than {MAX_TEXT} signs"
    if "://" in text and any(scheme.lower() != "sqlite" for scheme in _ADDRESS.findall(text)):
        return "is an address outside of this machine"
    if re.match(r"//\w", text):
        return "is part of an address"
    if re.search(r"(^|[\\/])\.\.([\\/]|$)", text):
        return "leads out of the bundle"
    if re.search(r"\.(py|pyc|pyd|so|dll)$|(^|/)\.(?!mrc$)\w+rc$", text, re.IGNORECASE):
        return "names a file of code"
    if _DOTTED.fullmatch(text) and _is_importable(text.split(".")[0]) and reason_for(text):
        return "names something that a component might import and call"
    looks_absolute = re.match(r"(/\w|~|[A-Za-z]:[\\/]|\\\\)", text) is not None
    if looks_absolute and not joined and "data" not in name:
        return "is a path outside of the bundle"
    return ""


@functools.cache
def _is_importable(package: str) -> bool:
    return package in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(package) is not None
