"""What belongs to a set of weights: the configs they were trained with, their scores, and where they come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.bundles.catalog import Bundle
from medseg.bundles.configs import SUFFIXES, Config, lay_over, read_config
from medseg.bundles.macros import resolve_macros

#: Where things lie, what a machine has and how a run was called. A release takes these from the bundle's source: the
#: run's own values mean nothing elsewhere, and may hold paths, names or passwords.
OF_THE_MACHINE = {
    "bundle_root", "cache_rate", "ckpt_path", "dataset_dir", "datalist", "device", "devices", "experiment_name",
    "label_dir", "num_nodes", "num_workers", "output_dir", "part", "pattern", "precision", "resume", "run_name",
    "score", "strategy", "suffixes", "tags", "tracking_uri",
}  # fmt: skip

#: Pictures of a run that show its worst, its median and its best case.
OVERLAYS = "overlays"

CONFIGS = ("train", "evaluate", "inference")

__all__ = [
    "CONFIGS",
    "OVERLAYS",
    "Release",
    "config_sha256",
    "describe_data",
    "portable_configs",
    "read_release",
    "source_configs",
]


@dataclass
class Release:
    """Weights and what belongs to them.

    Attributes:
        weights: the weight file.
        configs: ``train``, ``evaluate`` and ``inference``, free of macros and of what belongs to one machine.
        provenance: run id, hashes, versions and the like; empty if no run is known.
        metrics: mean, standard deviation and number of cases by part of the data list and metric.
        overlays: pictures of scored cases.
    """

    weights: Path
    configs: dict[str, Config]
    provenance: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    overlays: list[Path] = field(default_factory=list)


def source_configs(bundle: Bundle, root: Path) -> dict[str, Config]:
    """The bundle's own ``train``, ``evaluate`` and ``inference``, each complete and without macros."""
    raw = {}
    for name in CONFIGS:
        file = next((f for s in SUFFIXES if (f := bundle.path / "configs" / f"{name}{s}").is_file()), None)
        if file is not None:
            raw[name] = read_config(file)
    if "evaluate" in raw and "network_def" not in raw["evaluate"]:
        raw["evaluate"], _ = lay_over(raw["train"], raw["evaluate"])
    return {name: resolve_macros(config, root) for name, config in raw.items()}


def portable_configs(run: Mapping[str, Config], source: Mapping[str, Config], bundle_root: str) -> dict[str, Config]:
    """A run's configs with everything that belongs to its machine replaced by the bundle's own.

    Args:
        run: configs of a run, complete.
        source: from :func:`source_configs`.
        bundle_root: the bundle's folder, as the configs will see it.
    """
    configs = {}
    for name, config in run.items():
        own = source.get(name, {})
        kept = {k: v for k, v in config.items() if k not in OF_THE_MACHINE and not _is_absolute_path(v)}
        ordered = {k: kept.get(k, v) for k, v in own.items() if k in config or k in OF_THE_MACHINE}
        configs[name] = {**ordered, **kept, "bundle_root": bundle_root}
    return configs


def _is_absolute_path(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_absolute()


def read_release(weights: Path, bundle: Bundle, root: Path, bundle_root: str) -> Release:
    """Find what belongs to a weight file.

    Args:
        weights: ``models/model.pt`` of a bundle or of a run's folder, or any weight file. Of the last nothing is known
            but that it must fit the bundle's own config.
        bundle: the bundle it is for.
        root: the checkout.
        bundle_root: as in :func:`portable_configs`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the run it comes from is of another task, or did not finish.
    """
    if not weights.is_file():
        raise FileNotFoundError(
            f"no weights at {weights}: pass --weights RUN/models/model.pt, or `medseg promote RUN` first"
        )
    source = source_configs(bundle, root)
    folder = weights.parent
    if (folder / "provenance.json").is_file():  # promoted
        configs = {n: read_config(f) for n in CONFIGS if (f := folder / f"{n}.yaml").is_file()}
        known = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
        metrics, overlays = known.pop("metrics"), folder / OVERLAYS
        release = Release(weights, configs, known, metrics, sorted(overlays.glob("*.png")))
    elif (folder.parent / "configs" / "inference.yaml").is_file() and folder.name == "models":
        release = _of_run(weights, folder.parent, bundle)
    else:
        release = Release(weights, dict(source))
    release.configs = portable_configs(release.configs, source, bundle_root)
    return release


def config_sha256(config: Config) -> str:
    """Hash of a config's content, whatever its formatting."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


def describe_data(provenance: dict[str, Any]) -> str:
    """What a run was trained on, in a sentence."""
    data = provenance.get("data", {})
    sizes = ", ".join(f"{data[k]} {k.removesuffix('_items')}" for k in data if k.endswith("_items") and data[k] != "0")
    kinds = "; ".join(f"{k.removeprefix('data.')}: {v}" for k, v in data.items() if k.startswith("data."))
    words = [data.get("name", ""), data.get("description", ""), f"items: {sizes}" if sizes else "", kinds]
    hashed = provenance.get("datalist_sha256")
    return ". ".join([*filter(None, words), *([f"SHA-256 of the data list {hashed}"] if hashed else [])])


def _of_run(weights: Path, run: Path, bundle: Bundle) -> Release:
    status = run / "status.json"
    if status.is_file() and json.loads(status.read_text())["status"] != "FINISHED":
        raise ValueError(
            f"{run} did not finish: {json.loads(status.read_text())['status']}; continue it with --resume True"
        )
    configs = {n: read_config(f) for n in CONFIGS if (f := run / "configs" / f"{n}.yaml").is_file()}
    metadata = run / "configs" / "metadata.json"
    task = json.loads(metadata.read_text(encoding="utf-8"))["name"] if metadata.is_file() else None
    if task != bundle.metadata["name"]:
        raise ValueError(f"{run} is a run of {task}, not of {bundle.metadata['name']}; pass --bundle")
    files = {
        "best_val": run / "metrics.json",
        **{f.parent.name: f for f in sorted(run.glob("evaluation/*/metrics.json"))},
    }
    metrics = {part: _scores(file) for part, file in files.items() if file.is_file()}
    tested = [p for p in ("test", "held_out") if (run / "evaluation" / p / OVERLAYS).is_dir()]
    overlays = run / "evaluation" / tested[0] / OVERLAYS if tested else run / OVERLAYS
    return Release(weights, configs, _provenance(run, configs), metrics, _typical(sorted(overlays.glob("*.png")), run))


def _typical(pictures: list[Path], run: Path) -> list[Path]:
    """At most three: the run's own worst, median and best, or the first, the middle and the last."""
    if (run / OVERLAYS / "median.png").is_file():
        found = {f.read_bytes(): f for n in ("worst", "median", "best") if (f := run / OVERLAYS / f"{n}.png").is_file()}
        return list(found.values())[::-1]  # of very few cases, one may be two of them
    return pictures if len(pictures) < 4 else [pictures[0], pictures[len(pictures) // 2], pictures[-1]]


def _scores(file: Path) -> dict[str, Any]:
    summary = json.loads(file.read_text(encoding="utf-8"))
    scores: dict[str, Any] = dict(summary["metrics"])
    if "calibration" in summary:
        scores["ece"] = {"mean": summary["calibration"]["ece"], "n": summary["cases"]}
    return scores


def _provenance(run: Path, configs: Mapping[str, Config]) -> dict[str, Any]:
    """What MLflow knows of a run, without paths and names of persons and machines."""
    file = run / "mlflow_run.json"
    if not file.is_file():  # an ensemble
        return {}
    from medseg.tracking.store import connect

    recorded = json.loads(file.read_text(encoding="utf-8"))
    try:
        found = connect(recorded["tracking_uri"]).get_run(recorded["run_id"])
    except Exception as error:  # ConnectionError, or MLflow's own for a run that was deleted
        raise ValueError(
            f"MLflow's run {recorded['run_id']} of {run} cannot be read in {recorded['tracking_uri']}: {error}; it "
            "says which code, packages and data made the weights"
        ) from error
    tags = found.data.tags
    train = configs.get("train", {})
    return {
        "run_id": recorded["run_id"],
        "experiment": recorded["experiment"],
        "run_name": found.info.run_name,
        "tags": {k: tags[k] for k in ("network", "mode", "fold", "repeat", "configuration") if k in tags},
        "seed": train.get("seed"),
        "config_sha256": config_sha256({k: v for k, v in train.items() if k not in OF_THE_MACHINE}),
        "datalist_sha256": tags.get("datalist.sha256"),
        "data": {k: tags[k] for k in tags if k.startswith("data.") or k.endswith("_items")} | _description(train),
        "git_commit": tags.get("mlflow.source.git.commit"),
        "packages": {k.removeprefix("version."): v for k, v in sorted(tags.items()) if k.startswith("version.")},
        "device": tags.get("machine", "").rpartition(", ")[2],
    }


def _description(train: Config) -> dict[str, str]:
    """What the data list says of itself, if it is still there."""
    root, path = train.get("dataset_dir"), str(train.get("datalist", ""))
    file = Path(root or ".", "datalist.json") if path.startswith("$") else Path(path)
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: str(header[k]) for k in ("name", "description", "licence", "reference") if header.get(k)}
