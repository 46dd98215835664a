"""The runs of a cross-validation as one predictor, in a folder that is laid out like a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from medseg.bundles.configs import read_config
from medseg.io.datalist import Item
from medseg.io.files import write_atomically
from medseg.training.run_folder import write_config

#: What the inference configs of the runs may differ in.
OWN = {"bundle_root", "output_dir", "dataset_dir", "ckpt_path"}

__all__ = ["write_ensemble"]


def write_ensemble(runs: Sequence[Path], out: Path, activation: str = "sigmoid") -> Path:
    """Put the best weights of several runs together into one network.

    Args:
        runs: run folders of one configuration, e.g. the folds of a cross-validation.
        out: folder to write; ``configs/inference.yaml`` and ``configs/evaluate.yaml`` there are used like those of a
            run. What any of the runs has seen is never scored: the ``held_out`` part of its ``datalist.json`` is what
            they all held out.
        activation: ``sigmoid`` or ``softmax``, as the bundle's post-processing does it.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: if a folder is no finished run.
        FileExistsError: if ``out`` holds something already.
        ValueError: for fewer than two runs, or runs of different networks or scales.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run(s) given; an ensemble takes the folders of at least two")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another --out")
    folders = [run.resolve() for run in runs]
    configs = [_read(folder, "inference") for folder in folders]
    for folder, config in zip(folders, configs, strict=True):
        differing = [k for k in {**configs[0], **config} if k not in OWN and config.get(k) != configs[0].get(k)]
        if differing:
            raise ValueError(f"{folder} and {folders[0]} differ in {', '.join(sorted(differing))}: no common network")
    from medseg.training.checkpoint import read_state_dict, save_state_dict

    states = [read_state_dict(folder / "models" / "model.pt") for folder in folders]
    weights = {f"networks.{i}.{k}": v for i, state in enumerate(states) for k, v in state.items()}
    out = out.resolve()
    write_atomically(out / "datalist.json", (json.dumps(_datalist(folders), indent=1) + "\n").encode())
    for name in ("inference", "evaluate"):
        config = _read(folders[0], name)
        config |= {"bundle_root": str(out), "network_def": _network(config["network_def"], len(runs), activation)}
        config["output_dir"] = str(out / ("predictions" if name == "inference" else "evaluation"))
        if name == "evaluate":
            tags = {k: v for k, v in config["tags"].items() if k not in ("mlflow.parentRunId", "repeat")}
            configuration = f"{tags.get('configuration', config['run_name'])}-ensemble"
            config["tags"] = tags | {"fold": "all", "configuration": configuration, "members": len(runs)}
            config |= {"datalist": str(out / "datalist.json"), "run_name": configuration, "part": "held_out"}
        write_config(out / "configs" / f"{name}.yaml", config)
    for name in ("metadata.json", "logging.conf"):
        if (folders[0] / "configs" / name).is_file():
            write_atomically(out / "configs" / name, (folders[0] / "configs" / name).read_bytes())
    save_state_dict(weights, out / "models" / "model.pt")
    return out


def _read(folder: Path, name: str) -> dict[str, Any]:
    file = folder / "configs" / f"{name}.yaml"
    if not file.is_file() or not (folder / "models" / "model.pt").is_file():
        raise FileNotFoundError(f"{folder} is no finished run: it lacks configs/{name}.yaml or models/model.pt")
    return read_config(file)


def _network(definition: Any, count: int, activation: str) -> dict[str, Any]:
    """``network_def`` of the ensemble, from that of its members."""
    networks: Any = [deepcopy(definition) for _ in range(count)]
    if isinstance(definition, str):  # an expression that builds a new network each time
        networks = f"$[{definition.removeprefix('$')} for _ in range({count})]"
    return {"_target_": "medseg.training.ensemble.Ensemble", "networks": networks, "activation": activation}


def _datalist(folders: Sequence[Path]) -> dict[str, list[Item]]:
    """Everything that a member saw or was tested on is training data of the ensemble."""
    seen: dict[str, Item] = {}
    held_out: dict[str, Item] = {}
    for folder in folders:
        config = _read(folder, "evaluate")
        path = str(config["datalist"])
        root = Path(config["dataset_dir"])
        file = root / "datalist.json" if path.startswith("$") else Path(path)
        content: Mapping[str, list[Item]] = json.loads(file.read_text(encoding="utf-8"))
        for section, items in content.items():
            if section not in ("training", "test", "held_out"):
                continue
            for item in items:
                absolute = {k: str((root / item[k]).resolve()) for k in ("image", "label")}
                target = held_out if section == "held_out" else seen
                target[absolute["image"]] = {**item, **absolute, **({} if section == "held_out" else {"fold": 0})}
    return {"training": list(seen.values()), "held_out": [i for k, i in held_out.items() if k not in seen]}
