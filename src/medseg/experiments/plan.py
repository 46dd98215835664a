"""What a cross-validation consists of: its children and their commands. Text only, nothing runs here."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medseg.bundles.catalog import Bundle
from medseg.bundles.configs import read_config
from medseg.bundles.macros import resolve_macros
from medseg.experiments.folds import assign_folds, fold_datalist, group_ids
from medseg.io.datalist import GROUP_FIELDS, Item, load_datalist
from medseg.tracking.store import without_credentials

#: Keys that a cross-validation gives every child itself.
RESERVED = {
    "fold", "mode", "network_name", "output_dir", "part", "resume", "run_name", "score", "seed", "tags",
}  # fmt: skip

#: Keys that are the same for all children.
SHARED = {"dataset_dir", "datalist", "experiment_name", "tracking_uri"}

#: ``--set [NETWORK or MODE:]key=value``; a nested key has ``::`` in it.
SETTING = re.compile(r"(?:(?P<scope>[\w.-]+):(?!:))?(?P<key>[\w.]+(?:::[\w.]+)*)=(?P<value>.*)", re.DOTALL)

__all__ = ["Child", "Plan", "Setting", "datalist_text", "describe", "make_plan", "parse_setting"]


@dataclass(frozen=True)
class Setting:
    """One ``--set``: an argument of the bundle for all children, or for those of one network or mode."""

    key: str
    value: str
    scope: str | None = None

    def __str__(self) -> str:
        return (f"{self.scope}:" if self.scope else "") + f"{self.key}={self.value}"


@dataclass(frozen=True)
class Child:
    """One training (or one run of a baseline) of a cross-validation.

    Attributes:
        network: name of a network or a baseline of the bundle.
        mode: training mode, ``None`` where there is none to choose.
        repeat: number of the repetition, from 0.
        fold: the fold that validates.
        configs: config files in their order.
        arguments: further arguments of ``monai.bundle run``, without what ties it to its MLflow parent.
        folder: where it writes.
    """

    network: str
    mode: str | None
    repeat: int
    fold: int
    configs: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    folder: Path

    @property
    def configuration(self) -> str:
        """Network and mode: what is compared."""
        return f"{self.network}-{self.mode}" if self.mode else self.network

    @property
    def name(self) -> str:
        """Configuration, repeat and fold."""
        return f"{self.configuration} repeat{self.repeat}-fold{self.fold}"

    def command(self, parent: str, resume: bool = False) -> list[str]:
        """``python -m monai.bundle run ...`` as words.

        Args:
            parent: MLflow id of the cross-validation's run.
            resume: continue from the child's last checkpoint.
        """
        words = [sys.executable, "-m", "monai.bundle", "run", "--config_file"]
        if resume:
            words += [str(self.folder / "configs" / "train.yaml"), "--resume", "True"]
        else:
            files = self.configs[0] if len(self.configs) == 1 else "[" + ",".join(f"'{c}'" for c in self.configs) + "]"
            words += [files, *(word for key, value in self.arguments for word in (f"--{key}", value))]
        tags = {"mlflow.parentRunId": parent, "configuration": self.configuration, "repeat": str(self.repeat)}
        return words + [word for key, value in tags.items() for word in (f"--tags::{key}", value)]


@dataclass(frozen=True)
class Plan:
    """A cross-validation before it runs.

    Attributes:
        task: the bundle's name.
        root: the checkout that bundles are run from.
        out: folder of the cross-validation.
        experiment: MLflow experiment.
        tracking_uri: MLflow store, where the configs or ``--set`` name one.
        children: in the order in which they start.
        datalists: content of the data list of each (repeat, fold), by its file.
        identity: what must be the same when it is taken up again.
    """

    task: str
    root: Path
    out: Path
    experiment: str
    tracking_uri: str | None
    children: tuple[Child, ...]
    datalists: Mapping[Path, Mapping[str, Any]]
    identity: Mapping[str, Any]


def parse_setting(text: str) -> Setting:
    """Read ``key=value`` or ``NETWORK:key=value`` or ``MODE:key=value``.

    Raises:
        ValueError: if it is none of them, or names a key that the cross-validation sets itself.
    """
    found = SETTING.fullmatch(text)
    if not found:
        raise ValueError(f"--set {text!r} is no key=value; for example --set max_epochs=50")
    if found["key"].split("::")[0] in RESERVED:
        raise ValueError(f"--set {text}: {found['key']} is set for every child by the cross-validation itself")
    if found["scope"] and found["key"] in SHARED:
        raise ValueError(f"--set {text}: all children have one {found['key']}; leave {found['scope']}: away")
    return Setting(found["key"], found["value"], found["scope"])


def make_plan(
    bundle: Bundle,
    root: Path,
    out: Path,
    folds: int | None = None,
    networks: Sequence[str] = (),
    modes: Sequence[str] = (),
    repeats: int = 1,
    seed: int = 0,
    settings: Sequence[Setting] = (),
    overlays: Sequence[str] = (),
    stratify: str | None = None,
    held_out: bool = False,
) -> Plan:
    """Plan a cross-validation.

    Args:
        bundle: the task.
        root: the checkout that bundles are run from.
        out: folder to write to.
        folds: deal the training items to so many folds; ``None`` takes the folds of the data list (5 if it has none,
            is repeated, or divides what the bundle's ``group`` says must stay on one side).
        networks: names from the bundle's ``networks`` and ``baselines``; all networks by default.
        modes: names from the bundle's ``modes``; the first one by default. A baseline has none.
        repeats: how often to deal and cross-validate; repetition r has the seed ``seed + r``.
        seed: seed of the dealing and of every training.
        settings: from :func:`parse_setting`. In a value ``{network}``, ``{mode}``, ``{fold}`` and ``{repeat}`` stand
            for the child's.
        overlays: config files laid over the bundle's ``train.yaml``.
        stratify: field of the data list to keep even over the folds; the bundle's ``stratify`` by default.
        held_out: let every child score the data list's own ``test`` part as well, which no fold contains.

    Raises:
        ValueError: on a name that the bundle does not have, numbers out of range, or a data list that cannot be split.
        FileNotFoundError: if the data list or an overlay is missing.
    """
    networks, modes = _names(bundle, networks, modes, settings)
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}; it must be at least 1")
    config = _merged(root, [f"{_configs(bundle)}/train.yaml", *overlays], settings)
    dataset_dir, path = _data_paths(config, root)
    data = load_datalist(path, dataset_dir, with_folds=False)
    own = folds is None and repeats == 1 and all(isinstance(item.get("fold"), int) for item in data["training"])
    if own:
        load_datalist(path, dataset_dir)  # nothing may leak between folds that stay as they are
    items, tests = ([_relative(item, dataset_dir) for item in data[s]] for s in ("training", "test"))
    if held_out and not tests:
        raise ValueError(f"{path} has no test items to hold out; leave --held-out away")
    stratify = stratify or _present(items, bundle.metadata.get("stratify"))
    group = bundle.metadata.get("group")
    group_fields = (*GROUP_FIELDS, group) if group else GROUP_FIELDS
    if own and group and _splits_groups(items, group_fields):
        own = False  # folds that a training is free to have, e.g. other volumes of the same classes
    datalists: dict[Path, Any] = {}
    parts: list[tuple[int, int, Path]] = []
    for repeat in range(repeats):
        assigned = (
            _own_folds(items, path) if own else assign_folds(items, folds or 5, seed + repeat, stratify, group_fields)
        )
        for fold in range(max(assigned) + 1):
            file = out / "folds" / f"repeat{repeat}-fold{fold}.json"
            held = tests if held_out else ()
            datalists[file] = fold_datalist(items, assigned, fold, seed + repeat, stratify, held, group_fields)
            parts.append((repeat, fold, file))
    named = [s.value for s in settings if s.key == "experiment_name" and s.scope is None]
    experiment = named[-1] if named else f"{bundle.name}-{out.name}"
    score = "[test,held_out]" if held_out else "[test]"
    children = tuple(
        _child(bundle, network, mode, repeat, fold, file, out, experiment, dataset_dir, seed, score, settings, overlays)
        for repeat, fold, file in parts
        for network, mode in _configurations(bundle, networks, modes)
    )
    identity = {
        "task": bundle.name,
        "folds": len(parts) // repeats,
        "seed": seed,
        "stratify": stratify,
        "held_out": held_out,
        "set": [without_credentials(str(s)) for s in settings],
        "overlays": list(overlays),
        "dataset_dir": str(dataset_dir),
        "recipe": _digest(config, root),
    }
    given = str(config.get("tracking_uri", "$"))
    uri = None if given.startswith(("$", "@")) else given
    return Plan(bundle.name, root, out, experiment, uri, children, datalists, identity)


def _configs(bundle: Bundle) -> str:
    return f"bundles/{bundle.name}/configs"


def _names(
    bundle: Bundle, networks: Sequence[str], modes: Sequence[str], settings: Sequence[Setting]
) -> tuple[list[str], list[str]]:
    known = [*bundle.metadata.get("networks", []), *bundle.metadata.get("baselines", [])]
    known_modes = list(bundle.metadata.get("modes", []))
    chosen = list(networks) or list(bundle.metadata.get("networks", []))
    chosen_modes = list(modes) or known_modes[:1]
    for what, names, choices in (("network", chosen, known), ("mode", chosen_modes, known_modes)):
        unknown = [n for n in names if n not in choices]
        if unknown:
            raise ValueError(f"{bundle.name} has no {what} {', '.join(unknown)}; choose from {', '.join(choices)}")
        if len(set(names)) != len(names):
            raise ValueError(f"a {what} is named twice: {', '.join(names)}")
    for setting in settings:
        if setting.scope and setting.scope not in (*known, *known_modes):
            raise ValueError(
                f"--set {setting}: {setting.scope} is neither a network nor a mode of {bundle.name} "
                f"({', '.join([*known, *known_modes])})"
            )
    return chosen, chosen_modes


def _configurations(bundle: Bundle, networks: Sequence[str], modes: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    for network in networks:
        has_modes = modes and network not in bundle.metadata.get("baselines", [])
        yield from ((network, mode) for mode in (modes if has_modes else (None,)))


def _child(
    bundle: Bundle,
    network: str,
    mode: str | None,
    repeat: int,
    fold: int,
    datalist: Path,
    out: Path,
    experiment: str,
    dataset_dir: Path,
    seed: int,
    score: str,
    settings: Sequence[Setting],
    overlays: Sequence[str],
) -> Child:
    is_baseline = network in bundle.metadata.get("baselines", [])
    configuration = f"{network}-{mode}" if mode else network
    folder = out / configuration / f"repeat{repeat}-fold{fold}"
    arguments = {
        **({} if is_baseline else {"network_name": network}),
        **({"mode": mode} if mode else {}),
        "dataset_dir": str(dataset_dir),
        "datalist": str(datalist),
        "fold": str(fold),
        "seed": str(seed + repeat),
        "part" if is_baseline else "score": score,
        "output_dir": str(folder),
        "experiment_name": experiment,
        "run_name": f"{configuration}-repeat{repeat}-fold{fold}",
    }
    places = {"network": network, "mode": mode or "", "fold": fold, "repeat": repeat}
    for setting in settings:
        if setting.scope in (None, network, mode) and setting.key not in ("dataset_dir", "datalist", "experiment_name"):
            value = setting.value
            for name, own in places.items():  # not str.format: a value may hold a dictionary
                value = value.replace("{" + name + "}", str(own))
            arguments[setting.key] = value
    configs = [f"{_configs(bundle)}/train.yaml", *overlays]
    if is_baseline:
        configs += [f"{_configs(bundle)}/evaluate.yaml", f"{_configs(bundle)}/{network}.yaml"]
    return Child(network, mode, repeat, fold, tuple(configs), tuple(arguments.items()), folder)


def _merged(root: Path, files: Sequence[str], settings: Sequence[Setting]) -> dict[str, Any]:
    """Top-level keys of the configs and of the settings for all children, as text."""
    config: dict[str, Any] = {}
    for file in files:
        if not (root / file).is_file():
            raise FileNotFoundError(f"no config {root / file}")
        config |= read_config(root / file)
    return config | {s.key: s.value for s in settings if s.scope is None}


def _digest(config: Mapping[str, Any], root: Path) -> str:
    """What is trained, from the text of the configs with their macros: an edited config is another recipe."""
    text = json.dumps(resolve_macros(dict(config), root), sort_keys=True, default=str)
    return hashlib.sha256(without_credentials(text).encode()).hexdigest()[:16]


def _data_paths(config: Mapping[str, Any], root: Path) -> tuple[Path, Path]:
    """The folder of the data and its list; relative ones start from the checkout, as in a bundle."""
    dataset_dir = root / str(config["dataset_dir"])
    given = str(config.get("datalist", "$"))
    path = dataset_dir / "datalist.json" if given.startswith(("$", "@")) else root / given
    if not path.is_file():
        raise FileNotFoundError(
            f"no data list at {path}; pass --set dataset_dir=FOLDER (or --set datalist=FILE as well)"
        )
    return dataset_dir.resolve(), path


def _relative(item: Item, dataset_dir: Path) -> Item:
    """Paths from the data's folder: the list of a fold then holds on every machine that mounts it somewhere."""
    paths = {k: Path(item[k]) for k in ("image", "label")}
    inside = {k: p.relative_to(dataset_dir).as_posix() for k, p in paths.items() if p.is_relative_to(dataset_dir)}
    return {**{k: v for k, v in item.items() if v != ""}, **inside}


def _present(items: Sequence[Item], field: str | None) -> str | None:
    return field if field and any(field in item for item in items) else None


def _splits_groups(items: Sequence[Item], group_fields: Sequence[str]) -> bool:
    """Whether the items' own folds put one group on several sides."""
    sides = set(zip(group_ids(items, group_fields), (item["fold"] for item in items), strict=True))
    return len(sides) > len({group for group, _ in sides})


def _own_folds(items: Sequence[Item], path: Path) -> list[int]:
    numbers = sorted({item["fold"] for item in items})
    if len(numbers) < 2:
        raise ValueError(f"{path} has a single fold; pass --folds 5 to deal its items anew")
    return [numbers.index(item["fold"]) for item in items]


def describe(plan: Plan) -> str:
    """The plan for people: sizes of the parts and the number of children."""
    lines = [f"{plan.task}: {len(plan.children)} children, MLflow experiment {plan.experiment}, folder {plan.out}"]
    for file, content in plan.datalists.items():
        fold = int(file.stem.rpartition("fold")[2])
        validation = sum(item["fold"] == fold for item in content["training"])
        sizes = {"train": len(content["training"]) - validation, "validate": validation, "test": len(content["test"])}
        sizes |= {"held out": len(content["held_out"])} if content["held_out"] else {}
        lines.append(f"  {file.stem}: {', '.join(f'{size} {what}' for what, size in sizes.items())}")
    lines.append("  " + ", ".join(dict.fromkeys(c.configuration for c in plan.children)))
    return "\n".join(lines)


def datalist_text(content: Mapping[str, Any]) -> str:
    """The JSON of one fold's data list."""
    return json.dumps(content, indent=1) + "\n"
