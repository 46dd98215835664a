"""Fitting the CRF of a trained run on its validation cases: ``medseg fit-crf cryoet_one_shot RUN``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medseg.bundles.configs import read_config
from medseg.crf.fit import Case, CRFFit, dice, fit_crf
from medseg.io.files import write_atomically
from medseg.progress import track
from medseg.tasks.cryoet_one_shot.refine import grey_levels
from medseg.training.module import plain_tensor
from medseg.training.run_folder import run_lock, write_config

CONFIGS = ("train", "evaluate", "inference")

__all__ = ["fit"]


def fit(run: Path, steps: int = 60, cases: int = 48, learning_rate: float = 0.05, seed: int = 0) -> str:
    """Fit the five parameters and store them in the run's configs, unless they lower the Dice.

    Half of the chosen validation cases fit, the other half judges: the new parameters are stored only if their mean
    Dice on the judging half is not below that of the old parameters, nor below that of the network alone.

    Args:
        run: folder of a finished run with a decoder.
        steps: of gradient descent, a few cases each.
        cases: validation cases to take, evenly spread over the list.
        learning_rate: relative change of a parameter per step.
        seed: of the order of the cases.

    Returns:
        What was found, for people. It is also written to ``RUN/crf_fit.json``.

    Raises:
        FileNotFoundError: if this is no finished run.
        ValueError: if the run has no decoder, or too few validation cases.
    """
    run = run.resolve()
    files = {name: run / "configs" / f"{name}.yaml" for name in CONFIGS}
    missing = [str(f) for f in (*files.values(), run / "models" / "model.pt") if not f.is_file()]
    if missing:
        raise FileNotFoundError(f"{run} is no finished run: {', '.join(missing)} missing")
    with run_lock(run), _threads(1):  # small volumes: several threads would only wait for each other
        crf, chosen = _network_masks(files["evaluate"], run, cases)
        fitting, judging = chosen[::2], chosen[1::2]
        network = float(np.mean([dice(p[:, 1:] > 0.5, label) for p, _, label in judging]))
        judged = {"network": network, "before": _mean_dice(crf, judging)}
        found = fit_crf(crf, fitting, steps, learning_rate, seed=seed)
        judged["after"] = _mean_dice(crf, judging)
        stored = found.step > 0 and judged["after"] == max(judged.values())
        if stored:
            _store(files, found.after)
    record = {"fitting_cases": len(fitting), "judging_cases": len(judging), "judging_dice": judged, "stored": stored}
    record |= {"before": found.before, "after": found.after, "step": found.step}
    record |= {"fitting_dice": {k: getattr(found, f"dice_{k}") for k in ("network", "before", "after")}}
    write_atomically(run / "crf_fit.json", (json.dumps(record, indent=1) + "\n").encode())
    return _table(found, judged, len(fitting), len(judging), stored, run)


def _network_masks(config: Path, run: Path, count: int) -> tuple[Any, list[Case]]:
    """The run's CRF, and what it would get for some validation cases."""
    from monai.bundle import ConfigParser

    text = {k: v for k, v in read_config(config).items() if k not in ("initialize", "run", "finalize")}
    parser = ConfigParser({**text, "part": "validation", "ckpt_path": str(run / "models" / "model.pt")})
    network = parser.get_parsed_content("prepared").eval()
    if network.decoder is None:
        raise ValueError(f"{run} was trained without a decoder: there are no masks for a CRF to refine")
    data = parser.get_parsed_content("validate::dataset")
    indices = np.unique(np.linspace(0, len(data) - 1, min(count, len(data))).astype(int))
    if len(indices) < 2:
        raise ValueError(f"{run} has {len(data)} validation case(s); at least 2 are needed, to fit on and to judge by")
    device = next(network.parameters()).device
    chosen: list[Case] = []
    with torch.no_grad():
        for i in track([int(i) for i in indices], "segment"):
            item = data[i]
            image, label = (plain_tensor(item[k])[None].to(device) for k in ("image", "label"))
            probability = network(image).sigmoid()
            chosen.append((torch.cat([1 - probability, probability], dim=1), grey_levels(image), label))
    return parser.get_parsed_content("crf_def").to(device), chosen


def _mean_dice(crf: Any, cases: Sequence[Case]) -> float:
    with torch.no_grad():
        return float(np.mean([dice(crf(p, image)[:, 1:] > 0.5, label) for p, image, label in cases]))


def _store(files: dict[str, Path], values: dict[str, float]) -> None:
    for file in files.values():
        config = read_config(file)
        config["crf"] = {**config["crf"], **{k: float(f"{v:.6g}") for k, v in values.items()}}
        write_config(file, config)


def _table(found: CRFFit, judged: dict[str, float], fitting: int, judging: int, stored: bool, run: Path) -> str:
    lines = [f"{'parameter':<20} {'before':>10} {'after':>10}"]
    lines += [f"{k:<20} {v:>10.4f} {found.after[k]:>10.4f}" for k, v in found.before.items()]
    lines += ["", f"{'mean Dice':<20} {'no CRF':>10} {'before':>10} {'after':>10}"]
    fit_dice = [found.dice_network, found.dice_before, found.dice_after]
    for name, values in ((f"{fitting} cases fitted", fit_dice), (f"{judging} cases judged", list(judged.values()))):
        lines.append(f"{name:<20} " + " ".join(f"{v:>10.4f}" for v in values))
    lines.append("")
    if stored:
        lines.append(f"stored in {run / 'configs'}")
    elif judged["network"] > max(judged["before"], judged["after"]):
        lines.append(
            "not stored: on the judging cases the network is best without a CRF; leave it out with --use_crf False"
        )
    else:
        lines.append("not stored: nothing better was found for the judging cases; the configs keep their parameters")
    return "\n".join(lines)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
