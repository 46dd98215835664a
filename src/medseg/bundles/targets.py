"""What a ``_target_`` names, read from the installed packages' sources without importing them.

``import monai`` takes seven seconds; finding a class in its source files takes some milliseconds.
"""

from __future__ import annotations

import ast
import functools
import importlib.machinery
import itertools
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Signature", "Target", "find_target", "index_monai"]


_NEXT_LINE = re.compile(r"\n(?=[^\s#)\]}])")
_NEXT_MEMBER = re.compile(r"\n {0,4}(?=[^\s#)\]}])")
_FROM_IMPORT = re.compile(r"\n[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]*)")


@dataclass(frozen=True)
class Signature:
    """Names of the arguments that a class or function takes."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    takes_any: bool = False


@dataclass(frozen=True)
class Target:
    """A class or function.

    Attributes:
        name: where it is defined, e.g. ``monai.networks.nets.unet.UNet``; as far as it can be read from sources.
        signature: ``None`` if it is not written in Python or built in an unusual way.
        found: whether its definition was seen; ``False`` for a name in a compiled or lazily filled module.
    """

    name: str
    signature: Signature | None = None
    found: bool = True


@dataclass
class _Module:
    """One source file, read once."""

    name: str
    path: Path
    text: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if self.path.suffix == ".py":
            self.text = "\n" + self.path.read_text(encoding="utf-8", errors="replace")

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    def definition(self, name: str) -> ast.ClassDef | ast.FunctionDef | None:
        """The class or function of that name at the top level, of a class only what says how it is made.

        Plain searches: parsing whole files, or compiling a pattern for every name, takes longer than all the rest.
        """
        places = [self.text.rfind(f"\n{word} {name}{end}") for word in ("class", "def") for end in "(:["]
        start = max(places) + 1
        if start == 0:
            return None
        # it ends where the next line without indentation begins; closing brackets still belong to it
        end = _NEXT_LINE.search(self.text, self.text.find("\n", start))
        while end and self.text.count('"""', start, end.start()) % 2:  # it was a line of a docstring
            end = _NEXT_LINE.search(self.text, end.end())
        text = self.text[start : end.start() if end else None]
        if text.startswith("def"):
            return _parse(text)
        header = text[: text.find(":\n") + 1] or text
        if self.text[:start].rstrip().rpartition("\n")[2].startswith("@dataclass"):
            header = "@dataclass\n" + header
        init = text.rfind("\n    def __init__(")
        body = "\n    pass"
        if init >= 0:
            end = _NEXT_MEMBER.search(text, text.find("\n", init + 1))
            body = text[init : end.start() if end else None]
        return _parse(header + body) or _parse(text)

    def bindings(self, name: str) -> list[str]:
        """Full names that ``name`` may stand for by an import or an alias; ``M.*`` for star imports."""
        full = []
        for match in _FROM_IMPORT.finditer(self.text):
            dots, module, names = match.groups()
            if name not in names and "*" not in names:
                continue
            base = self.package.split(".")[: len(self.package.split(".")) - len(dots) + 1] if dots else []
            source = ".".join([*base, *([module] if module else [])])
            for alias in re.sub(r"#[^\n]*|[()\\]", " ", names).split(","):
                words = alias.split()
                if words == ["*"]:
                    full.append(f"{source}.*")
                elif words and words[-1] == name:
                    full.append(f"{source}.{words[0]}")
        if not full or full[0].endswith(".*"):
            full += self._aliases(name)
        return sorted(full, key=lambda f: f.endswith(".*"))

    def _aliases(self, name: str) -> list[str]:
        full = []
        for match in re.finditer(rf"\n[ \t]*import[ \t]+([\w.]+)[ \t]+as[ \t]+{re.escape(name)}\b", self.text):
            full.append(match[1])
        if re.search(rf"\n[ \t]*import[ \t]+(?:[\w.]+,[ \t]*)*{re.escape(name)}\b", self.text):
            full.append(name)
        names = r"(?:\w+[ \t]*=[ \t]*)*"
        alias_of = re.search(rf"\n{names}{re.escape(name)}[ \t]*=[ \t]*{names}(\w+)[ \t]*\n", self.text)
        if alias_of and alias_of[1] != name:
            full.append(f"{self.name}.{alias_of[1]}")
        return full


@functools.cache
def find_target(name: str) -> Target | None:
    """What a dotted name stands for.

    Args:
        name: ``package.module.Class``, wherever the package re-exports it from.

    Returns:
        ``None`` if there is no such thing.

    Raises:
        ModuleNotFoundError: if the top package is not installed.
    """
    return _find(name, ())


def index_monai(names: Iterable[str]) -> dict[str, str]:
    """Full names of MONAI's classes and functions by their short names, as a ``_target_`` may give them.

    Args:
        names: short names to look for.

    Returns:
        For each name that MONAI has, the first place that it is defined in.

    Raises:
        ModuleNotFoundError: if MONAI is not installed.
    """
    # aliases are rare and slow to find: only for what has no definition of its own
    for pattern in (r"(?:class|def)[ \t]+({})\b", r"((?:\w+[ \t]*=[ \t]*)*(?:{})[ \t]*=)"):
        missing = sorted(set(names) - set(_INDEX))
        if missing:
            text = "^" + pattern.format("|".join(map(re.escape, missing)))
            _scan_monai(re.compile(text.encode(), re.MULTILINE), set(missing))
    _INDEX.update(dict.fromkeys(set(names) - set(_INDEX), ""))
    return {n: _INDEX[n] for n in set(names) if _INDEX[n]}


#: Full names found so far by short names; empty for those that MONAI has not.
_INDEX: dict[str, str] = {}


#: Where bundles take their parts from; the other half of MONAI is searched for what is not here.
_LIKELY = ("transforms", "networks", "data", "engines", "handlers", "inferers", "losses", "metrics", "optimizers")


def _scan_monai(pattern: re.Pattern[bytes], wanted: set[str]) -> None:
    top = _top_folder("monai")
    rest = sorted(f.name for f in top.iterdir() if f.is_dir() and f.name not in _LIKELY)
    for folder, subfolders, files in itertools.chain.from_iterable(os.walk(top / f) for f in (*_LIKELY, *rest)):
        if wanted <= set(_INDEX):
            return
        subfolders.sort()
        for file in sorted(files):
            if not file.endswith(".py"):
                continue
            with open(f"{folder}/{file}", "rb") as source:
                found = pattern.findall(source.read())
            for short in sorted(wanted & set(b" ".join(found).decode().replace("=", " ").split())):  # also of A = B = C
                parts = Path(folder, file).relative_to(top.parent).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                _INDEX.setdefault(short, f"{module}.{short}")


def _find(name: str, seen: tuple[str, ...]) -> Target | None:
    if name in seen or len(seen) > 12:
        return None
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return Target(name, None, found=False)
    try:
        module, rest = _descend(tuple(parts))
    except ModuleNotFoundError:
        if seen:  # an optional import of a package that is here
            return None
        raise
    if not rest:
        return Target(name, None)  # a module
    if not module.text:
        return Target(name, None, found=False)  # compiled or built in
    if len(rest) > 1:  # an attribute of something: of a class here, or of what this module imports under that name
        if module.definition(rest[0]) is not None:
            return Target(name, None)
        for full in module.bindings(rest[0]):
            if not full.endswith(".*"):
                return _find(".".join([full, *rest[1:]]), (*seen, name))
        return None
    definition = module.definition(rest[0])
    if definition is not None:
        return Target(f"{module.name}.{rest[0]}", _signature(module, definition, ()))
    for full in module.bindings(rest[0]):
        target = _find(f"{full[:-1]}{rest[0]}" if full.endswith(".*") else full, (*seen, name))
        if target is not None and (target.found or not full.endswith(".*")):
            return target
    if re.search(rf"\b{re.escape(rest[0])}\b|def __getattr__|\bglobals\(\)", module.text):
        return Target(name, None, found=False)
    return None


def _descend(parts: tuple[str, ...]) -> tuple[_Module, list[str]]:
    """The module that the longest possible beginning of a dotted name is, and what is left of the name."""
    try:
        here = _top_folder(parts[0])
    except ModuleNotFoundError:
        spec = importlib.machinery.PathFinder.find_spec(parts[0])
        if spec is None or not spec.origin:
            raise
        return _load(parts[0], Path(spec.origin)), list(parts[1:])
    depth = 1
    while depth < len(parts):
        deeper = here / parts[depth]
        if deeper.is_dir():
            here, depth = deeper, depth + 1
            continue
        source = deeper.with_suffix(".py")
        file = source if source.is_file() else next(here.glob(f"{parts[depth]}.*.so"), None)
        if file is not None:
            return _load(".".join(parts[: depth + 1]), file), list(parts[depth + 1 :])
        break
    return _load(".".join(parts[:depth]), here / "__init__.py"), list(parts[depth:])


@functools.cache
def _load(name: str, path: Path) -> _Module:
    return _Module(name, path if path.is_file() else Path(name))


@functools.cache
def _top_folder(package: str) -> Path:
    spec = importlib.machinery.PathFinder.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    return Path(next(iter(spec.submodule_search_locations)))


def _parse(text: str) -> ast.ClassDef | ast.FunctionDef | None:
    try:
        node = ast.parse(text).body[0]
    except (SyntaxError, ValueError, IndexError):
        return None
    return node if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else None


def _signature(module: _Module, node: ast.ClassDef | ast.FunctionDef, seen: tuple[str, ...]) -> Signature | None:
    if isinstance(node, ast.FunctionDef):
        return _of_arguments(node.args, skip=0)
    own = [b for b in node.body if isinstance(b, ast.FunctionDef) and b.name == "__init__"]
    if not own:
        return _inherited(module, node, seen)
    signature = _of_arguments(own[-1].args, skip=1)
    if signature.takes_any and _hands_on(own[-1]):
        base = _inherited(module, node, seen)
        if base is not None:  # what is handed on to the base class must fit there
            required = (*signature.required,)
            return Signature(required, (*signature.optional, *base.required, *base.optional), base.takes_any)
    return signature


def _inherited(module: _Module, node: ast.ClassDef, seen: tuple[str, ...]) -> Signature | None:
    if node.keywords or any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        return None
    for base in node.bases:
        name = ast.unparse(base).split("[")[0]
        if name in ("object", "ABC", "Generic", "Protocol") or name in seen:
            continue
        definition = module.definition(name)
        if definition is not None:
            found = _signature(module, definition, (*seen, name))
        else:
            try:
                full = next(iter(module.bindings(name.split(".")[0])), None)
                target = _find(".".join([full, *name.split(".")[1:]]), seen) if full else None
            except ModuleNotFoundError:
                return None
            found = target.signature if target else None
            if found is None:
                return None  # a base that cannot be read may take anything
        if found is not None and (found.required or found.optional or found.takes_any):
            return found
    return Signature()


def _hands_on(init: ast.FunctionDef) -> bool:
    """Whether ``super().__init__`` gets the keyword arguments."""
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
            return any(k.arg is None for k in node.keywords)
    return False


def _of_arguments(arguments: ast.arguments, skip: int) -> Signature:
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    count = len(positional) - len(arguments.defaults)
    required = positional[skip : max(count, skip)]
    optional = positional[max(count, skip) :]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        (required if default is None else optional).append(argument.arg)
    return Signature(tuple(required), tuple(optional), arguments.kwarg is not None)
