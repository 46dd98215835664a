"""Where a run comes from: code, packages, machine, command line."""

from __future__ import annotations

import getpass
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from medseg.tracking.store import without_credentials

PACKAGES = (
    "medseg", "monai", "torch", "torchvision", "pytorch-lightning", "pytorch-ignite", "segmentation-models-pytorch",
    "mlflow", "numpy", "scipy", "itk", "nibabel", "pydicom", "einops",
)  # fmt: skip

__all__ = ["git_commit", "package_versions", "provenance_tags"]


def git_commit(folder: Path | None = None) -> str | None:
    """The commit of the checkout, with ``-dirty`` if tracked files differ from it; ``None`` outside of one."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if dirty else commit


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def provenance_tags() -> dict[str, str]:
    """MLflow tags of the code, the packages, the machine and the command line."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.name": without_credentials(" ".join(sys.argv))[:5000],
        "mlflow.source.type": "LOCAL",
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}",
        **{f"version.{k}": v for k, v in package_versions().items()},
    }
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    return tags


def _git(folder: Path | None, *args: str) -> str:
    # fsmonitor is a program that a repository's own config names; the working folder may be somebody else's bundle
    command = ["git", "-c", "core.fsmonitor=false", *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
