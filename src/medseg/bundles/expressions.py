"""References (``@key``) and expressions (``$...``) of MONAI's config language, read as MONAI does and never run."""

from __future__ import annotations

import ast
import builtins
import functools
import re
from collections.abc import Iterator

from medseg.bundles.configs import SEPARATOR

_ID = re.compile(r"@(?:\w*)(?:::\w*)*")
_RELATIVE = re.compile(r"[@%](?:::)+")

#: What MONAI puts into every expression.
GIVEN = {"monai": "monai", "torch": "torch", "np": "numpy", "numpy": "numpy"}

#: The name that references become while an expression is looked at.
REFERENCES = "__local_refs"

__all__ = [
    "GIVEN",
    "REFERENCES",
    "absolute",
    "dotted_names",
    "free_names",
    "imported_name",
    "is_expression",
    "own_names",
    "parse_expression",
    "references",
]


def is_expression(value: object) -> bool:
    """Whether MONAI would evaluate a value."""
    return isinstance(value, str) and value.startswith("$")


def absolute(value: str, key: str) -> str:
    """A text with its relative ids (``@::a`` beside it, ``@::::a`` one level up) made absolute.

    Args:
        value: of the config item ``key``.
        key: the item's id.

    Raises:
        ValueError: if an id leads out of the config.
    """
    value = value.replace("#", SEPARATOR)
    if "@::" not in value and "%::" not in value:
        return value
    path = key.split(SEPARATOR)
    for prefix in sorted(set(_RELATIVE.findall(value)), reverse=True):
        up = prefix[1:].count(SEPARATOR)
        if up > len(path):
            raise ValueError(f"{value} leads out of the config")
        value = value.replace(prefix, prefix[0] + "".join(f"{p}{SEPARATOR}" for p in path[:-up]))
    return value


def references(value: str) -> list[str]:
    """Ids that a text refers to: the whole text, or anywhere in an expression (also inside its strings)."""
    if "@" not in value:
        return []
    value = value.replace("#", SEPARATOR)
    found = dict.fromkeys(_ID.findall(value))
    return [item[1:] for item in found if is_expression(value) or item == value]


def parse_expression(value: str) -> ast.Import | ast.ImportFrom | ast.Expression:
    """The syntax tree of ``$...``, exactly of the text that MONAI would evaluate.

    Args:
        value: the text with its ``$`` and absolute ids.

    Returns:
        An import statement, or an expression in which ``@key`` is ``__local_refs['key']``.

    Raises:
        ValueError: if it is no valid Python expression, or nested too deep to be read.
    """
    text = value.replace("#", SEPARATOR)
    for item in sorted(set(_ID.findall(text)), key=len, reverse=True):
        text = text.replace(item, f"{REFERENCES}['{item[1:]}']")
    try:
        # MONAI looks for an import in the text as written, and evaluates the one with its references replaced.
        first = next(iter(ast.parse(value[1:]).body), None) if "import" in value and "@" not in value else None
        if isinstance(first, (ast.Import, ast.ImportFrom)):
            return first
        return ast.parse(text[1:], mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{value[:200]} is no Python expression: {error.msg}") from error
    except (RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{value[:80]}... cannot be read: {error}") from error


def imported_name(statement: ast.Import | ast.ImportFrom) -> tuple[str, str]:
    """The name that an import statement of a config defines, and what it stands for, in full.

    MONAI takes the first name of a statement only, and ``$import a.b`` defines the unusable name ``a.b``.
    """
    alias = statement.names[0]
    module = f"{statement.module}." if isinstance(statement, ast.ImportFrom) else ""
    return alias.asname or alias.name, f"{module}{alias.name}"


def dotted_names(tree: ast.AST) -> Iterator[tuple[ast.expr, str, bool]]:
    """Every name in an expression with the attributes after it, as long as it goes: ``os.path.join``.

    Yields:
        The node, its dotted text and whether the first name is the expression's own (an argument of a lambda, a
        variable of a comprehension). An attribute of anything but a name is given as ``.attribute``.
    """
    own = own_names(tree)
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):  # parents first
        if node in inner:
            continue
        if isinstance(node, ast.Attribute):
            attributes, start = [node.attr], node.value
            while isinstance(start, ast.Attribute):
                inner.add(start)
                attributes.append(start.attr)
                start = start.value
            if isinstance(start, ast.Name):
                inner.add(start)
                yield node, ".".join([start.id, *reversed(attributes)]), start.id in own
            else:
                for attribute in attributes:
                    yield node, f".{attribute}", False
        elif isinstance(node, ast.Name):
            yield node, node.id, node.id in own


@functools.cache
def free_names(value: str) -> frozenset[str]:
    """Names in an expression that something else has to define: an import, Python or MONAI.

    Args:
        value: the text with its ``$`` and absolute ids. The configs of a bundle share most of their texts.

    Raises:
        ValueError: as in :func:`parse_expression`.
    """
    tree = parse_expression(value)
    if not isinstance(tree, ast.Expression):
        return frozenset()
    names = {text.split(".")[0] for _, text, own in dotted_names(tree) if text[0] != "." and not own}
    return frozenset(names - {REFERENCES, *GIVEN, *dir(builtins)})


def own_names(tree: ast.AST) -> set[str]:
    """Names that an expression defines for itself: arguments of lambdas, variables of comprehensions."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            arguments = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            own |= {a.arg for a in arguments} | {a.arg for a in (node.vararg, node.kwarg) if a}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return own
