"""The folder of one run, laid out like a bundle so that it can be evaluated, used and promoted as it is.

- ``RUN/configs/{train,evaluate,inference}.yaml``: self-contained, this run's settings filled in; ``metadata.json``
- ``RUN/models/model.pt``: best weights, a plain state_dict
- ``RUN/checkpoints/{best,last}.ckpt``: to resume from
- ``RUN/train.log``, ``per_image.csv``, ``metrics.json``, ``overlays/``
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from medseg.bundles.running import Config, resolve_macros
from medseg.io.files import write_atomically

__all__ = ["claim_run_folder", "write_run_configs"]


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
    source, target = bundle_root / "configs", folder / "configs"
    configs: dict[str, Config] = {"train": {**config, "output_dir": str(folder), "resume": False}}
    if (source / "evaluate.yaml").is_file():
        merged = dict(config)
        for key, value in _read(source / "evaluate.yaml").items():
            _set(merged, key, value)
        merged |= {"bundle_root": str(folder), "output_dir": str(folder / "evaluation")}
        configs["evaluate"] = resolve_macros(merged, Path.cwd())
    if (source / "inference.yaml").is_file():
        raw = _read(source / "inference.yaml")
        shared = f"%{(source / 'train.yaml').as_posix()}::"
        for key, value in raw.items():
            if isinstance(value, str) and value.startswith(shared):
                raw[key] = resolve_macros(f"%{value[len(shared) :]}", Path.cwd(), local=config)
        raw |= {"bundle_root": str(folder), "output_dir": str(folder / "predictions")}
        configs["inference"] = resolve_macros(raw, Path.cwd())
    written = []
    for name, content in configs.items():
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)
        written.append(target / f"{name}.yaml")
        write_atomically(written[-1], text.encode())
    for name in ("metadata.json", "logging.conf"):
        if (source / name).is_file():
            written.append(target / name)
            write_atomically(written[-1], (source / name).read_bytes())
    return written


def _read(path: Path) -> Config:
    content: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _set(config: Config, key: str, value: Any) -> None:
    """``a::b: v`` in an overlay sets a nested key, as in MONAI."""
    *parents, last = key.split("::")
    for parent in parents:
        config[parent] = dict(config[parent])  # the training config keeps its own
        config = config[parent]
    config[last] = value
