"""``medseg promote``: put a run's best weights into its bundle. Nothing else ever writes into ``models/``."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from medseg.bundles.catalog import Bundle, list_bundles, repository_root
from medseg.bundles.check import schema_problems
from medseg.bundles.release import OVERLAYS, Release, describe_data, read_release
from medseg.io.files import write_atomically

__all__ = ["Promotion", "promote"]


@dataclass(frozen=True)
class Promotion:
    """What was done: the bundle, its new version and the line of the changelog."""

    bundle: Bundle
    version: str
    change: str


def promote(run: Path, task: str | None = None, version: str | None = None, note: str = "") -> Promotion:
    """Put a finished run's best weights into its bundle's ``models/`` and say so in the metadata.

    ``models/`` then holds ``model.pt``, the three configs with the run's settings (machine and paths left out),
    ``provenance.json`` with the scores, and three overlays. In ``metadata.json`` the version is raised, the changelog
    has a line more, and ``eval_metrics`` and ``data_source`` are those of the run.

    Args:
        run: folder of a finished run.
        task: the bundle; found by the run's own metadata by default.
        version: new version; by default the last part of the old one is raised.
        note: words for the changelog, after the run and its score.

    Raises:
        FileNotFoundError: if there is no finished run.
        ValueError: if the run is of another task, did not finish, its MLflow run cannot be read, or the version is not
            above the present one. Nothing has been changed then.
    """
    root = repository_root()
    bundle = _bundle_of(run, task, root)
    release = read_release(run / "models" / "model.pt", bundle, root, f"bundles/{bundle.name}")
    if not release.provenance:
        raise ValueError(
            f"{run} has no mlflow_run.json: only a training's run can be promoted (an ensemble can be packed)"
        )
    version = _next_version(bundle.metadata["version"], version)
    change = ". ".join(filter(None, [_change(release), note]))
    metadata = {
        **bundle.metadata,
        "version": version,
        "changelog": {version: change, **bundle.metadata["changelog"]},
        "eval_metrics": release.metrics,
        "data_source": describe_data(release.provenance),
    }
    problems = schema_problems(metadata)
    if problems:
        raise ValueError(
            f"{bundle.name}: {'; '.join(': '.join(p) for p in problems)}; run `medseg check {bundle.name}`"
        )
    _write(bundle, release, {**release.provenance, "metrics": release.metrics, "bundle_version": version})
    text = json.dumps(metadata, indent=4, ensure_ascii=False) + "\n"
    write_atomically(bundle.path / "configs" / "metadata.json", text.encode())
    return Promotion(Bundle(bundle.name, bundle.path, metadata), version, change)


def _bundle_of(run: Path, task: str | None, root: Path) -> Bundle:
    file = run / "configs" / "metadata.json"
    if not file.is_file():
        raise FileNotFoundError(f"{run} is no run's folder: it has no configs/metadata.json")
    name = json.loads(file.read_text(encoding="utf-8")).get("name")
    found = [b for b in list_bundles(root) if (b.name == task if task else b.metadata.get("name") == name)]
    if not found:
        names = ", ".join(b.name for b in list_bundles(root))
        raise ValueError(f"no bundle {task or name!r}; pass --bundle with one of {names}")
    return found[0]


def _next_version(present: str, wanted: str | None) -> str:
    numbers = [int(n) for n in present.split(".")]
    if wanted is None:
        return ".".join(map(str, [*numbers[:-1], numbers[-1] + 1]))
    if not re.fullmatch(r"\d+\.\d+\.\d+", wanted) or [int(n) for n in wanted.split(".")] <= numbers:
        raise ValueError(f"version {wanted} must be three numbers and above the present {present}")
    return wanted


def _change(release: Release) -> str:
    part = next((p for p in ("test", "held_out", "best_val") if p in release.metrics), None)
    name, value = next(iter(release.metrics[part].items())) if part else ("", {})
    score = f", {name} {value['mean']:.4f} on {value['n']} cases of the part {part}" if part else ""
    return f"weights of run {release.provenance['run_id']} ({release.provenance['run_name']}){score}"


def _write(bundle: Bundle, release: Release, provenance: dict[str, Any]) -> None:
    """Everything beside first, then one exchange of folders: ``models/`` is never half old and half new."""
    models = bundle.path / "models"
    with _staged(models) as fresh:
        shutil.copyfile(release.weights, fresh / "model.pt")
        for name, config in release.configs.items():
            text = f"# Written by `medseg promote`: {name} with the settings that models/model.pt was trained with.\n"
            text += yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=120)
            (fresh / f"{name}.yaml").write_text(text, encoding="utf-8")
        (fresh / OVERLAYS).mkdir()
        for picture in release.overlays:
            shutil.copyfile(picture, fresh / OVERLAYS / picture.name)
        (fresh / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        if (models / "README.md").is_file():
            shutil.copyfile(models / "README.md", fresh / "README.md")


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    fresh, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    finally:
        if not target.exists() and old.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
