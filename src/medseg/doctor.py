"""What this machine has, and what is missing for which task."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from medseg.bundles.catalog import list_bundles, repository_root
from medseg.tracking.store import local_path, tracking_uri, without_credentials

#: What training needs beyond what each bundle's metadata names for inference.
TRAINING = ("pytorch-lightning", "mlflow", "safetensors", "scipy", "psutil")

__all__ = ["examine", "report"]


def examine() -> dict[str, Any]:
    """Look at versions, device, MLflow store and the tasks' needs.

    Returns:
        ``versions``, ``device``, ``mlflow``, ``tasks`` (by name, what is missing or too old) and ``problems`` (all
        that stands in the way).
    """
    from medseg.tracking.provenance import package_versions

    problems: list[str] = []
    try:
        root: Path | None = repository_root()
    except FileNotFoundError as error:
        root = None
        problems.append(str(error))
    device = _device(problems)
    tasks = {}
    for bundle in list_bundles(root) if root else []:
        missing = _missing(bundle.metadata)
        models = sorted(p.name for p in (bundle.path / "models").glob("model.*"))
        tasks[bundle.name] = {"missing": missing, "weights": models}
        problems += [f"{bundle.name}: {m}" for m in missing]
    return {
        "versions": package_versions(),
        "device": device,
        "mlflow": _mlflow(root, problems),
        "checkout": str(root) if root else None,
        "tasks": tasks,
        "problems": problems,
    }


def report(findings: dict[str, Any]) -> str:
    """What :func:`examine` found, for people."""
    lines = ["versions"]
    lines += [f"  {name:<28} {version}" for name, version in findings["versions"].items()]
    lines += ["device", f"  {findings['device']}", "MLflow", f"  {findings['mlflow']}"]
    lines += ["checkout", f"  {findings['checkout']}", "tasks"]
    for name, task in findings["tasks"].items():
        weights = ", ".join(task["weights"]) or "no weights in models/ (train first, or pass --ckpt_path)"
        lines += [f"  {name}: {'; '.join(task['missing']) or 'everything it needs is installed'}; {weights}"]
    lines += [f"problem: {p}" for p in findings["problems"]]
    return "\n".join(lines)


def _device(problems: list[str]) -> str:
    threads = os.cpu_count()
    cpu = f"CPU, {threads} cores, {platform.machine()}"
    try:
        import torch
    except (ImportError, OSError) as error:
        problems.append(f"torch cannot be imported: {error}; reinstall with pip install -e .")
        return cpu
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"torchvision does not fit torch {torch.__version__} ({error}); install both from one index")
    if not torch.cuda.is_available():
        return f"{cpu} (no CUDA device: training and inference run on the CPU)"
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"{torch.cuda.device_count()} x {name}, {memory:.0f} GiB, CUDA {torch.version.cuda}; {cpu}"


def _mlflow(root: Path | None, problems: list[str]) -> str:
    uri = tracking_uri()
    database = local_path(uri)
    if database is None:
        return f"{without_credentials(uri)} (a server; from MLFLOW_TRACKING_URI)"
    if not os.environ.get("MLFLOW_TRACKING_URI") and root:
        database = root / database.name  # bundles are run from the checkout
    if not database.parent.is_dir():
        problems.append(f"MLflow cannot write {database}: make its folder or set MLFLOW_TRACKING_URI")
        return str(database)
    if not os.access(database.parent, os.W_OK):
        problems.append(f"MLflow cannot write {database}: make its folder writable or set MLFLOW_TRACKING_URI")
    free = shutil.disk_usage(database.parent).free / 2**30
    return f"{database} ({'exists' if database.exists() else 'made by the first run'}; {free:.0f} GiB free)"


def _missing(description: dict[str, Any]) -> list[str]:
    from packaging.requirements import Requirement

    # The bundle's metadata says which packages; the versions in it are what it was made with, not the least that will
    # do. Those are medseg's own requirements.
    bounds = {r.name: r.specifier for r in map(Requirement, metadata.requires("medseg") or []) if not r.marker}
    found = []
    for name in ("monai", "torch", "numpy", *description.get("required_packages_version", {}), *TRAINING):
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            found.append(f"{name} is not installed (pip install {name})")
            continue
        if name in bounds and not bounds[name].contains(have, prereleases=True):
            found.append(f"{name} {have} does not fit {name}{bounds[name]} (pip install '{name}{bounds[name]}')")
    return found
