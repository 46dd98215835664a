"""The folder of one run, laid out like a bundle so that it can be evaluated, used and promoted as it is.

- ``RUN/configs/{train,evaluate,inference}.yaml``: self-contained, this run's settings filled in; ``metadata.json``
- ``RUN/models/model.pt``: best weights, a plain state_dict
- ``RUN/checkpoints/{best,last}.ckpt``: to resume from
- ``RUN/train.log``, ``per_image.csv``, ``metrics.json``, ``overlays/``
- ``RUN/evaluation/PART/``: the same tables and overlays of other parts of the data list
- ``RUN/status.json``: whether it finished
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from medseg.bundles.configs import Config, lay_over, read_config
from medseg.bundles.macros import resolve_macros
from medseg.io.files import write_atomically

#: What may differ when a run is resumed: how far, where and with what it runs, not what is trained.
MAY_CHANGE = {
    "bundle_root",
    "cache_rate",
    "datalist",
    "dataset_dir",
    "device",
    "devices",
    "max_epochs",
    "num_nodes",
    "num_workers",
    "output_dir",
    "precision",
    "resume",
    "run_name",
    "score",
    "strategy",
    "tags",
    "tracking_uri",
}

LOCK = "running.pid"

__all__ = [
    "check_resumed_config",
    "claim_run_folder",
    "living_holder",
    "read_status",
    "run_lock",
    "write_config",
    "write_run_configs",
    "write_status",
]


def claim_run_folder(folder: Path, resume: bool) -> Path | None:
    """Make a run's folder, or find the checkpoint to go on from.

    Args:
        folder: where the run writes.
        resume: whether to continue the run that is there.

    Returns:
        The last checkpoint if ``resume``, else ``None``.

    Raises:
        FileExistsError: if another run's results are there and ``resume`` is false.
        FileNotFoundError: if there is nothing to resume.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if resume:
        if not last.is_file():
            raise FileNotFoundError(
                f"nothing to resume: {last} does not exist; --output_dir must be the folder of an interrupted run "
                "(or run its own configs/train.yaml with --resume True)"
            )
        return last
    if last.exists() or (folder / "models" / "model.pt").exists():
        raise FileExistsError(
            f"{folder} holds a run already; pass --resume True to continue it, or another --output_dir"
        )
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return None


def write_run_configs(folder: Path, config: Config, bundle_root: Path) -> list[Path]:
    """Write the run's configs: what it was trained with, and how to evaluate and use its weights.

    ``inference.yaml`` and ``evaluate.yaml`` come from the bundle, with everything that they share with the training
    config taken from this run, so that network, scale and intensities cannot differ between training and use.

    Args:
        folder: the run's folder.
        config: from :func:`medseg.bundles.running.merged_config`.
        bundle_root: the bundle's folder.

    Returns:
        The files written.
    """
    folder = folder.resolve()  # the configs work from any folder
    source, target = bundle_root / "configs", folder / "configs"
    configs: dict[str, Config] = {"train": {**config, "output_dir": str(folder), "resume": False}}
    if (source / "evaluate.yaml").is_file():
        merged, _ = lay_over(config, read_config(source / "evaluate.yaml"))
        merged |= {"bundle_root": str(folder), "output_dir": str(folder / "evaluation")}
        configs["evaluate"] = resolve_macros(merged, Path.cwd())
    if (source / "inference.yaml").is_file():
        raw = read_config(source / "inference.yaml")
        shared = f"%{(source / 'train.yaml').as_posix()}::"
        for key, value in raw.items():
            if isinstance(value, str) and value.startswith(shared):
                raw[key] = resolve_macros(f"%{value[len(shared) :]}", Path.cwd(), local=config)
        raw |= {"bundle_root": str(folder), "output_dir": str(folder / "predictions")}
        configs["inference"] = resolve_macros(raw, Path.cwd())
    written = []
    for name, content in configs.items():
        written.append(target / f"{name}.yaml")
        write_config(written[-1], content)
    for name in ("metadata.json", "logging.conf"):
        if (source / name).is_file():
            written.append(target / name)
            write_atomically(written[-1], (source / name).read_bytes())
    return written


def write_config(path: Path, content: Config) -> None:
    """Write one config as YAML, keys in their order.

    Args:
        path: file to write.
        content: plain dictionaries, lists, strings and numbers.
    """
    write_atomically(path, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120).encode())


def check_resumed_config(folder: Path, config: Config) -> None:
    """Refuse to continue a run with other settings; those of the machine and the number of epochs may change.

    Args:
        folder: the run's folder.
        config: what the resumed run was called with.

    Raises:
        ValueError: naming every changed setting.
    """
    file = folder / "configs" / "train.yaml"
    if not file.is_file():
        return
    before = read_config(file)
    changed = [k for k in {**before, **config} if k not in MAY_CHANGE and before.get(k) != config.get(k)]
    if changed:
        raise ValueError(
            f"a resumed run keeps its settings, but these differ from {file}: {', '.join(sorted(changed))}; leave them "
            "out, or start a new run in another --output_dir"
        )
    if before.get("max_epochs") != config.get("max_epochs"):
        write_config(file, {**before, "max_epochs": config.get("max_epochs")})


def write_status(folder: Path, status: str) -> None:
    """Say in ``status.json`` how a run stands: ``RUNNING``, ``FINISHED``, ``FAILED`` or ``KILLED`` (as in MLflow)."""
    write_atomically(folder / "status.json", (json.dumps({"status": status}) + "\n").encode())


def read_status(folder: Path) -> str | None:
    """What :func:`write_status` left, or ``None`` if the run never started."""
    file = folder / "status.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["status"]) if file.is_file() else None


def living_holder(folder: Path) -> str | None:
    """The process that is writing into a run's folder, or ``None`` if there is none (any more).

    A number alone would not do: it may belong to another process by now, or to another machine of a shared folder, of
    which nothing is known from here.
    """
    import psutil

    try:
        words = (folder / LOCK).read_text().split()
    except FileNotFoundError:
        return None
    if len(words) != 3:
        return None
    number, started, host = words
    if host != platform.node():
        return f"process {number} on {host}"
    try:
        alive = abs(psutil.Process(int(number)).create_time() - float(started)) < 1
    except psutil.NoSuchProcess:
        return None
    return f"process {number}" if alive else None


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep a run's folder to one process: two would overwrite each other's checkpoints.

    Args:
        folder: the run's folder; made if needed.

    Raises:
        FileExistsError: if a living process holds it. A lock that a dead one left behind is taken over.
    """
    import psutil

    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    holder = living_holder(folder)
    if lock.exists() and holder is None and lock.read_text().strip():
        lock.unlink(missing_ok=True)
    try:
        with lock.open("x") as file:
            file.write(f"{os.getpid()} {psutil.Process().create_time()} {platform.node()}")
    except FileExistsError as error:
        raise FileExistsError(
            f"{folder} is in use by {holder or 'a process that is just starting'}; give every run an --output_dir of "
            f"its own (if no such run exists, delete {lock})"
        ) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
