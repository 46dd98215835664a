"""``medseg check``: everything that can be known to be wrong with a bundle before it runs, from its text alone."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medseg.bundles.archive import SUMS, copy_texts, open_bundle
from medseg.bundles.config_check import UNUSED, Problem, config_problems
from medseg.bundles.configs import SEPARATOR, SUFFIXES, Config, get, read_config, walk
from medseg.bundles.macros import resolve_macros, split_macro
from medseg.bundles.targets import index_monai

#: What train and inference configs rightly differ in: where data come from and go to, and how they are walked through.
MAY_DIFFER = {
    "_meta_", "bundle_root", "ckpt_path", "dataloader", "dataset", "dataset_dir", "device", "evaluator", "finalize",
    "handlers", "imports", "initialize", "invertible", "keep_errors", "keys", "network", "output_dir", "pred_key",
    "preprocessing", "postprocessing", "run",
}  # fmt: skip

#: A text of a packed bundle that is larger is none to be checked.
MAX_TEXT = 10 * 2**20

__all__ = ["Problem", "check_bundle", "check_path", "report", "schema_problems"]


def report(problems: Sequence[Problem], as_json: bool = False) -> str:
    """All problems as text or JSON."""
    if as_json:
        return json.dumps([asdict(p) for p in problems], indent=1)
    return "\n".join(str(p) for p in problems)


def check_path(name: str) -> list[Problem]:
    """Check a task of this checkout, a bundle's folder, a packed bundle or one config file.

    Args:
        name: what the command line gives.

    Returns:
        All problems found.

    Raises:
        FileNotFoundError: if there is no bundle or config of that name.
        ValueError: if it is a zip that must not be opened.
    """
    path = Path(name)
    if path.suffix == ".zip":
        return _check_zip(path)
    from medseg.bundles.catalog import find_bundle, repository_root

    if not path.exists() and name.isidentifier():
        root = repository_root()
        return check_bundle(find_bundle(name, root).path, root)
    inside = (path / "configs" / "metadata.json").is_file() and path.resolve().parent.name == "bundles"
    return check_bundle(path, path.resolve().parents[1] if inside else None)


def _check_zip(path: Path) -> list[Problem]:
    """The texts of a packed bundle are unpacked to be checked, nothing else of it."""
    with open_bundle(path) as bundle, tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, bundle.name)
        wanted = ("LICENSE", "docs/README.md", SUMS)
        names = [n for n in bundle.names() if n.startswith("configs/") or n in wanted]
        copy_texts(bundle, names, folder, MAX_TEXT)
        version = re.fullmatch(rf"{re.escape(bundle.name)}(?:_v(.+))?", path.stem)
        problems = check_bundle(folder, folder)
        if version is None:
            problems.append(Problem(path.name, "", f"holds {bundle.name}", f"call it {bundle.name}_vVERSION.zip"))
        return problems


def check_bundle(path: Path, root: Path | None = None) -> list[Problem]:
    """Check a bundle's folder or one of its configs.

    Args:
        path: folder of a bundle (in source form, packed, or a run's), or one config file.
        root: folder that macro paths start from; the working directory by default.

    Returns:
        All problems found, in the order of the files.

    Raises:
        FileNotFoundError: if there is no bundle or config at ``path``.
    """
    root = root or Path.cwd()
    folder = path if path.is_dir() else path.parent
    configs = folder / "configs" if path.is_dir() else folder
    files = [path] if path.is_file() else sorted(f for f in configs.glob("*.*") if f.suffix in SUFFIXES)
    files = [f for f in files if f.name != "metadata.json"]
    if not path.exists() or not files:
        raise FileNotFoundError(f"no config at {path}: pass a task, a bundle's folder (with configs/) or a config file")
    problems: list[Problem] = []
    metadata = _metadata(configs / "metadata.json", problems) if (configs / "metadata.json").is_file() else {}
    raw: dict[str, Config] = {}
    for file in _with_base(files, configs):
        try:
            raw[file.stem] = read_config(file)
        except (ValueError, OSError) as error:
            problems.append(Problem(file.name, "", str(error).removeprefix(f"{file}: "), "mend the text"))
    names = {f.stem: f.name for f in _with_base(files, configs)}
    used = _used_from_outside(raw.values())
    macro_files: dict[str, Config] = {}
    _find_short_names(raw.values(), root, macro_files)
    resolved: dict[str, Config] = {}
    for parts in _compositions(raw, metadata, {f.stem for f in files}):
        config, found = config_problems({names[p]: raw[p] for p in parts}, root, metadata, used, macro_files)
        # what a run wrote has every key of its source, also those that an overlay made useless
        problems += [p for p in found if p.message != UNUSED or not (folder / "status.json").is_file()]
        resolved[parts[-1]] = config
    problems += _agreement(resolved, names, metadata)
    if path.is_dir():
        problems += _zoo_layout(path, metadata, raw)
    return list(dict.fromkeys(problems))


def _metadata(file: Path, problems: list[Problem]) -> Config:
    try:
        metadata = read_config(file)
    except ValueError as error:
        problems.append(Problem(file.name, "", str(error).removeprefix(f"{file}: "), "mend the text"))
        return {}
    problems += [Problem(file.name, key, message, "see docs/bundles.md") for key, message in schema_problems(metadata)]
    if metadata.get("version") not in metadata.get("changelog", {}):
        problems.append(
            Problem(file.name, "changelog", f"says nothing about version {metadata.get('version')}", "add it")
        )
    return metadata


def schema_problems(metadata: Config, part: str = "medseg") -> list[tuple[str, str]]:
    """Where metadata break the schema.

    Args:
        metadata: content of ``metadata.json``.
        part: ``monai`` for what MONAI requires of any bundle, ``medseg`` for what medseg adds as well.

    Returns:
        Key and message of every violation.
    """
    from jsonschema import Draft202012Validator

    schema = json.loads(Path(__file__).with_name("metadata_schema.json").read_text(encoding="utf-8"))
    if part == "monai":
        schema = {"$defs": schema["$defs"], "$ref": "#/$defs/monai"}
    found = Draft202012Validator(schema).iter_errors(metadata)
    return sorted((SEPARATOR.join(map(str, e.absolute_path)), e.message[:200]) for e in found)


def _with_base(files: Sequence[Path], configs: Path) -> list[Path]:
    """An overlay that is checked alone still lies on what it was written for."""
    beside = [f for f in configs.glob("*.*") if f.stem in ("train", "evaluate") and f.suffix in SUFFIXES]
    return sorted({*files, *beside}) if any(f.stem not in ("train", "inference") for f in files) else list(files)


def _compositions(raw: Mapping[str, Config], metadata: Mapping[str, Any], wanted: set[str]) -> Iterator[list[str]]:
    """Which configs are run together: overlays on train, those of baselines on train and evaluate."""
    for name, content in raw.items():
        if name not in wanted:
            continue
        if "run" in content and ("network_def" in content or "network" in content):
            yield [name]
        elif name in metadata.get("baselines", []):
            yield [n for n in ("train", "evaluate") if n in raw] + [name]
        else:
            yield (["train"] if "train" in raw and name != "train" else []) + [name]


def _used_from_outside(configs: Iterable[Config]) -> set[str]:
    """Ids that some config takes from another file by macro."""
    values = (v for config in configs for _, v in walk(config) if isinstance(v, str) and v.startswith("%"))
    return {SEPARATOR.join(split_macro(v)[1]) for v in values}


def _find_short_names(configs: Iterable[Config], root: Path, files: dict[str, Config]) -> None:
    """Look for all of MONAI's short names in one pass over its sources; config by config would take one each."""
    resolved = (resolve_macros(c, root, on_problem=lambda *_: None, files=files) for c in configs)
    targets = {v.get("_target_") for c in resolved for _, v in walk(c) if isinstance(v, dict)}
    with suppress(ModuleNotFoundError):
        index_monai([t for t in targets if isinstance(t, str) and t.isidentifier()])


def _agreement(
    configs: Mapping[str, Config], names: Mapping[str, str], metadata: Mapping[str, Any]
) -> Iterator[Problem]:
    """Whether the network is used as it was trained, and as the metadata say."""
    train, inference = configs.get("train"), configs.get("inference")
    if train and inference:
        pairs = [(k, train[k], inference[k]) for k in train if k in inference and k not in MAY_DIFFER]
        pairs.append(("inferer", get(train, ["validate", "inferer"]), inference.get("inferer")))
        for key, trained, used in pairs:
            if trained is not None and used is not None and trained != used:
                message = f"{str(used)[:80]} here, but {str(trained)[:80]} in training"
                yield Problem(names["inference"], key, message, f"take it from {names['train']} by macro")
    data = metadata.get("network_data_format", {})
    image, pred = get(data, ["inputs", "image"]) or {}, get(data, ["outputs", "pred"]) or {}
    expected = {
        "in_channels": (image.get("num_channels"), "num_channels of the input image"),
        "out_channels": (pred.get("num_channels"), "num_channels of the output pred"),
        "classes": (pred.get("num_channels"), "num_channels of the output pred"),
        "num_classes": (pred.get("num_channels"), "num_channels of the output pred"),
        "spatial_dims": (len(image.get("spatial_shape", [])) or None, "number of axes of the input's spatial_shape"),
    }
    for name in ("train", "inference"):
        config = configs.get(name) or {}
        networks = {k: config[k] for k in ("network_def", "networks") if isinstance(config.get(k), dict)}
        for key, value in walk(networks):
            argument = key.rpartition(SEPARATOR)[2]
            wanted, what = expected.get(argument, (None, ""))
            value = get(config, value[1:].split(SEPARATOR)) if isinstance(value, str) and value[:1] == "@" else value
            if wanted is not None and isinstance(value, int) and value != wanted:
                message = f"{value}, but metadata.json says {wanted} ({what})"
                yield Problem(names[name], key, message, "let network and metadata agree")


def _zoo_layout(folder: Path, metadata: Mapping[str, Any], configs: Mapping[str, Config]) -> Iterator[Problem]:
    """Names and files that the model zoo asks for. A run's folder is no bundle to share: it has no licence."""
    if (folder / "status.json").is_file():
        return
    if not re.fullmatch(r"[a-z0-9]+(_[a-z0-9]+)*", folder.name):
        yield Problem(folder.name, "", "is no bundle name", "lower-case words with underscores, e.g. spleen_ct")
    for file in ("LICENSE", "configs/metadata.json", "docs/README.md"):
        if not (folder / file).is_file():
            yield Problem(file, "", "is missing", "every bundle has it")
    is_packed = (folder / SUMS).is_file()  # that of an ensemble cannot be trained further
    for name in ("inference",) if is_packed else ("train", "inference"):
        if not any((folder / "configs" / f"{name}{suffix}").is_file() for suffix in SUFFIXES):
            yield Problem(f"configs/{name}.yaml", "", "is missing", "every bundle has it, as .yaml or .json")
    listed, networks = metadata.get("networks"), configs.get("train", {}).get("networks")
    if listed and isinstance(networks, dict) and list(networks) != list(listed):
        message = f"{listed}, but the training config has {list(networks)}"
        yield Problem("metadata.json", "networks", message, "list the same networks")
