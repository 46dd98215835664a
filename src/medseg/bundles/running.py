"""What the bundle that is running right now was configured with.

MONAI builds a bundle's objects from a parser that those objects cannot ask for, so neither the resolved configuration
nor a mistyped argument is visible to them. Every object is built below a call of that parser, though, so it is found
on the call stack. That works the same under ``monai.bundle run``, ``create_workflow`` and MONAI Label.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from medseg.bundles.config_check import override_problems
from medseg.bundles.configs import SEPARATOR, SUFFIXES, Config, read_config
from medseg.bundles.macros import resolve_macros

#: What `monai.bundle run` and `create_workflow` take besides keys of the config.
WORKFLOW_ARGUMENTS = {
    "run_id", "init_id", "final_id", "meta_file", "logging_file", "tracking", "workflow_type", "workflow",
    "properties_path",
}  # fmt: skip

#: How the messages begin in which MONAI wraps what went wrong inside a config.
WRAPPERS = ("Failed to evaluate", "Failed to instantiate", "applying transform")

__all__ = [
    "check_arguments",
    "merged_config",
    "readable_output",
    "running_parser",
    "scalar_settings",
]


def running_parser() -> Any | None:
    """The ``monai.bundle.ConfigParser`` that is building the caller, or ``None`` if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if type(owner).__name__ == "ConfigParser" and hasattr(owner, "ref_resolver"):
            return owner
        frame = frame.f_back
    return None


def merged_config(parser: Any) -> Config:
    """The config as one text: files and arguments merged, macros resolved, references and expressions kept.

    Args:
        parser: from :func:`running_parser`.

    Returns:
        Plain dictionaries, lists, strings and numbers, ready for YAML.
    """
    config = {k: v for k, v in parser.get().items() if k != "_meta_"}
    plain: Config = _plain(resolve_macros(config, Path.cwd()))
    return plain


def readable_output() -> None:
    """Let the last line of a failed run be its cause, and drop a note that says nothing.

    MONAI wraps what goes wrong inside a config once per level, so that the line which names the file and the fix is
    in the middle of a long traceback. The traceback stays; its root cause is repeated below it. The note is the one
    about an optional DICOM decoder, which MONAI gives whenever it makes an image loader.
    """
    warnings.filterwarnings("ignore", message=".*nvImageCodec decoder plugin.*")

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        sys.__excepthook__(kind, error, trace)
        cause = error
        while cause.__cause__ is not None and str(cause).startswith(WRAPPERS):
            cause = cause.__cause__
        if cause is not error:
            lines = str(cause).splitlines()[:30] or [type(cause).__name__]
            print("\nerror: " + "\n".join(line[:600] for line in lines), file=sys.stderr)

    sys.excepthook = hook


def check_arguments(bundle_root: str | Path) -> None:
    """Stop on an argument that no config of the run and no component takes (MONAI accepts it and ignores it).

    Args:
        bundle_root: the bundle's folder; its other configs are where a key may belong.

    Raises:
        ValueError: naming every unknown key and the known one closest to it, or the networks to choose from.
    """
    parser = running_parser()
    if parser is None:
        return
    config = parser.get()
    name, networks = config.get("network_name"), config.get("networks")
    if isinstance(networks, dict) and "@networks" in str(config.get("network_def")) and name not in networks:
        raise ValueError(f"unknown --network_name {name}; choose from {', '.join(networks)}")
    folder = Path(bundle_root, "configs")
    beside = {f: read_config(f) for f in sorted(folder.glob("*.*")) if f.suffix in SUFFIXES and f.stem != "metadata"}
    files, overrides = _command_line()
    own = {str(f): read_config(Path(f)) for f in files} if files else {str(f): c for f, c in beside.items()}
    if not own:  # run away from its files: nothing to compare with
        return
    if not files:
        overrides = [k for k in config if not any(k in content for content in own.values())]
    if "network_name" in overrides and networks is None:  # packed: it would change the name and not the network
        raise ValueError(f"--network_name {name}: this bundle holds one network with its weights; there is no choice")
    here = {Path(f).resolve() for f in own}
    others = {f.name: c for f, c in beside.items() if f.resolve() not in here}
    unknown = override_problems(overrides, own, others, Path.cwd())
    if unknown:
        raise ValueError(f"unknown argument {', '.join(unknown)}; the arguments are the keys of {', '.join(own)}")


def _command_line() -> tuple[list[str], list[str]]:
    """Config files and overriding keys of the ``monai.bundle run`` that is going on; empty if it is something else."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "create_workflow" and frame.f_globals.get("__name__") == "monai.bundle.scripts":
            files, arguments = frame.f_locals.get("config_file"), frame.f_locals.get("_args", {})
            listed = [files] if isinstance(files, (str, Path)) else list(files or ())
            return [str(f) for f in listed], [str(k) for k in arguments if k not in WORKFLOW_ARGUMENTS]
        frame = frame.f_back
    return [], []


def scalar_settings(parser: Any) -> dict[str, str]:
    """Every scalar of the resolved config by its id, e.g. ``train.trainer.max_epochs``.

    A reference or an expression that was already resolved to a scalar gives the result, any other its text. Nothing
    is built for the sake of being recorded.

    Args:
        parser: from :func:`running_parser`.
    """
    resolved = parser.ref_resolver.resolved_content
    settings: dict[str, str] = {}

    def visit(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, child in value.items():
                visit(child, f"{key}{SEPARATOR}{name}" if key else str(name))
        elif isinstance(value, (list, tuple)):
            for i, child in enumerate(value):
                visit(child, f"{key}{SEPARATOR}{i}")
        else:
            known = value[1:].replace("#", SEPARATOR) if isinstance(value, str) and value[:1] == "@" else key
            result = resolved.get(known, value) if isinstance(value, str) and value[:1] in ("@", "$") else value
            is_scalar = isinstance(result, (str, int, float, bool)) or result is None
            settings[key.replace(SEPARATOR, ".")] = str(result if is_scalar else value)

    visit({k: v for k, v in parser.get().items() if k not in ("_meta_", "imports")}, "")
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
