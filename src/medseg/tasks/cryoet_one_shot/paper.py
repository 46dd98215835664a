"""The paper's tables on simulated subtomograms: accuracy by network and SNR, and Dice by class.

Source: B. Zhou et al., Frontiers in Molecular Biosciences 7, 2020, Tables 1 to 3.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundles.catalog import find_bundle, repository_root
from medseg.experiments.crossval import cross_validate, print_outcome, print_summary
from medseg.experiments.plan import Child, Plan, Setting, make_plan, parse_setting
from medseg.io.files import read_csv, write_atomically, write_csv
from medseg.tasks.cryoet_one_shot.fit_crf import fit
from medseg.tasks.cryoet_one_shot.simulate import simulate

DEMO = "bundles/cryoet_one_shot/configs/demo.yaml"
SNRS = ("inf", "1000", "0.5")
WAYS = (2, 4, 6, 8)
NAMES = {"scnn": "SCNN", "duse_scnn": "DuSE-SCNN"}
MODES = {"without_decoder": "without decoder", "with_decoder": "with decoder"}

#: Table 1: accuracy at 2, 4, 6 and 8 ways by SNR and configuration.
ACCURACY: dict[str, dict[tuple[str, str], tuple[float, ...]]] = {
    "inf": {
        ("scnn", "without_decoder"): (0.931, 0.763, 0.613, 0.595),
        ("scnn", "with_decoder"): (0.945, 0.798, 0.663, 0.636),
        ("duse_scnn", "without_decoder"): (0.934, 0.772, 0.618, 0.603),
        ("duse_scnn", "with_decoder"): (0.957, 0.831, 0.672, 0.646),
    },
    "1000": {
        ("scnn", "without_decoder"): (0.923, 0.698, 0.493, 0.473),
        ("scnn", "with_decoder"): (0.935, 0.706, 0.493, 0.473),
        ("duse_scnn", "without_decoder"): (0.928, 0.701, 0.504, 0.479),
        ("duse_scnn", "with_decoder"): (0.939, 0.718, 0.534, 0.513),
    },
    "0.5": {
        ("scnn", "without_decoder"): (0.812, 0.599, 0.501, 0.387),
        ("scnn", "with_decoder"): (0.824, 0.616, 0.502, 0.399),
        ("duse_scnn", "without_decoder"): (0.821, 0.614, 0.510, 0.391),
        ("duse_scnn", "with_decoder"): (0.829, 0.628, 0.513, 0.403),
    },
}

#: Tables 2 and 3, rows "2way-1shot": Dice after the CRF of the eight test classes, which are not ours.
PDB = ("1A1S", "1BXR", "1EQR", "1F1B", "1FNT", "1GYT", "1KPB", "1LB3")
DICE: dict[str, dict[str, tuple[float, ...]]] = {
    "inf": {
        "scnn": (0.92, 0.94, 0.98, 0.97, 0.97, 0.95, 0.96, 0.97),
        "duse_scnn": (0.92, 0.94, 0.98, 0.97, 0.97, 0.95, 0.96, 0.97),
    },
    "1000": {
        "scnn": (0.84, 0.85, 0.86, 0.87, 0.89, 0.84, 0.88, 0.83),
        "duse_scnn": (0.85, 0.85, 0.86, 0.87, 0.90, 0.85, 0.88, 0.85),
    },
}

Row = dict[str, Any]

__all__ = ["paper"]


def paper(
    out: Path,
    repeats: int = 1,
    count: int | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    jobs: int | None = None,
    full: bool = False,
) -> str:
    """Simulate at three SNRs, train the four networks at each, fit their CRFs, and print accuracy and Dice.

    Args:
        out: folder for data, runs, ``cases.csv`` and ``paper_tables.md``. Called again it runs only what is missing.
        repeats: trainings of each network, with the seeds ``seed``, ``seed + 1``, ... An ablation that differs by 0.01
            needs several.
        count: subtomograms per SNR; 880, or the paper's 5,835 if ``full``.
        seed: of data and training.
        settings: further ``--set`` of :func:`medseg.experiments.plan.parse_setting`.
        jobs: trainings at a time.
        full: the bundle's own recipe, for a GPU, instead of the demo's.

    Returns:
        The tables as Markdown.
    """
    out = out.resolve()
    count = count or (5835 if full else 880)
    rows: list[Row] = []
    for snr in SNRS:
        data = out / "data" / f"snr-{snr}"
        if not (data / "datalist.json").is_file():
            simulate(data, count, seed, [snr])
        plan = _plan(out, snr, data, repeats, seed, [parse_setting(s) for s in settings], full)
        print(f"\nSNR {snr}", flush=True)
        print_summary(cross_validate(plan, jobs=jobs, report=print_outcome), plan)
        for child in plan.children:
            _fit_crf(child)
        rows += [row for child in plan.children for row in _scores(child, snr)]
    if not rows:
        raise ValueError(f"no training of {out} has finished; look into the output above")
    recipe = "the bundle's recipe" if full else "the demo's small recipe (16 channels, work grid of 16^3)"
    title = (
        f"Simulated by medseg ({count} subtomograms an SNR, tilt series, 22 synthetic complexes, 14 trained and 8 "
        f"tested; {recipe}; {repeats} training(s) each; CRF fitted on validation volumes). *Paper*: the published "
        "numbers on its own simulated data of other complexes, not measured here."
    )
    text = "\n\n".join([title, "**One-shot accuracy**", _accuracy(rows), "**Dice by class**", _dice(rows)]) + "\n"
    write_csv(out / "cases.csv", rows)
    write_atomically(out / "paper_tables.md", text.encode())
    print(f"\n{text}\nwrote {out / 'paper_tables.md'} and {out / 'cases.csv'}")
    return text


def _plan(out: Path, snr: str, data: Path, repeats: int, seed: int, settings: Sequence[Setting], full: bool) -> Plan:
    """The four networks on the data list's own split, whose test part are the unseen classes."""
    own = [Setting("dataset_dir", str(data)), Setting("experiment_name", f"cryoet_one_shot-{out.name}-snr-{snr}")]
    plan = make_plan(
        find_bundle("cryoet_one_shot"), repository_root(), out / f"snr-{snr}", networks=list(NAMES), modes=list(MODES),
        repeats=repeats, seed=seed, settings=[*own, *settings], overlays=[] if full else [DEMO],
    )  # fmt: skip
    content = json.loads((data / "datalist.json").read_text(encoding="utf-8"))
    lists = {"training": content["training"], "test": content["test"], "held_out": []}
    files = [file for file in plan.datalists if file.stem.endswith("-fold0")]
    children = tuple(child for child in plan.children if child.fold == 0)
    return replace(plan, children=children, datalists=dict.fromkeys(files, lists))


def _fit_crf(child: Child) -> None:
    """Fit the CRF of a finished training on its validation cases, and score the test part again if that helped."""
    if child.mode != "with_decoder" or not (child.folder / "models" / "model.pt").is_file():
        return
    record = child.folder / "crf_fit.json"
    if not record.is_file():
        print(f"\n{child.name}: fit the CRF\n{fit(child.folder)}", flush=True)
    scores = child.folder / "evaluation" / "test" / "per_image.csv"
    scored = scores.is_file() and scores.stat().st_mtime >= record.stat().st_mtime
    if json.loads(record.read_text(encoding="utf-8"))["stored"] and not scored:
        line = ["-m", "monai.bundle", "run", "--config_file", str(child.folder / "configs" / "evaluate.yaml")]
        subprocess.run([sys.executable, *line], cwd=repository_root(), check=True, stdout=subprocess.DEVNULL)


def _scores(child: Child, snr: str) -> list[Row]:
    """The tested cases of one training; none if it failed."""
    file = child.folder / "evaluation" / "test" / "per_image.csv"
    if not file.is_file():
        print(f"{child.name}: failed, left out of the tables")
        return []
    own = {"snr": snr, "network": child.network, "mode": child.mode, "repeat": child.repeat}
    return [own | row for row in read_csv(file)]


def _mean(rows: Sequence[Row], metric: str) -> tuple[float, float]:
    """Mean over cases, and the standard deviation of the repeats' means, or of the cases if there is one repeat."""
    values = np.array([float(r[metric] or "nan") for r in rows])
    repeats = np.array([r["repeat"] for r in rows])
    means = [float(np.mean(values[repeats == r])) for r in np.unique(repeats)]
    return float(np.mean(values)), float(np.std(means if len(means) > 1 else values, ddof=1))


def _accuracy(rows: Sequence[Row]) -> str:
    ways = " | ".join(f"{way}-way | *paper*" for way in WAYS)
    lines = [f"| SNR | network | {ways} |", "|---|---|" + "---:|" * 2 * len(WAYS)]
    for snr, published in ACCURACY.items():
        for (network, mode), numbers in published.items():
            own = [r for r in rows if (r["snr"], r["network"], r["mode"]) == (snr, network, mode)]
            cells = []
            for way, number in zip(WAYS, numbers, strict=True):
                cells += [f"{_mean(own, f'accuracy_{way}way')[0]:.3f}" if own else "failed", f"*{number:.3f}*"]
            lines.append(f"| {snr} | {NAMES[network]}, {MODES[mode]} | " + " | ".join(cells) + " |")
        own = [r for r in rows if (r["snr"], r["network"], r["mode"]) == (snr, "duse_scnn", "with_decoder")]
        for kind, what in (("true", "true masks"), ("found", "masks found")) if own else ():
            size = _mean(own, f"accuracy_2way_{kind}_size")[0]
            lines.append(f"| {snr} | size of the {what} alone | {size:.3f} |" + " |" * (2 * len(WAYS) - 1))
    return "\n".join(lines)


def _dice(rows: Sequence[Row]) -> str:
    """Mean (sd) by test class, before and after the CRF, and what the paper has on its own classes."""
    masked = [r for r in rows if r["mode"] == "with_decoder"]
    classes = sorted(
        {r["class"] for r in masked}, key=lambda c: float(next(r["mass_kda"] for r in masked if r["class"] == c))
    )
    lines = [f"| SNR | network | CRF | {' | '.join(classes)} | mean |", "|---|---|---|" + "---:|" * (len(classes) + 1)]
    for snr in SNRS:
        for network, title in NAMES.items():
            own = [r for r in masked if (r["snr"], r["network"]) == (snr, network)]
            for metric, crf in (("dice_without_crf", "without"), ("dice", "with")) if own else ():
                cells = [_mean([r for r in own if r["class"] == c], metric) for c in classes]
                texts = [f"{mean:.3f} ({sd:.3f})" for mean, sd in cells] + [f"{_mean(own, metric)[0]:.3f}"]
                lines.append(f"| {snr} | {title} | {crf} | " + " | ".join(texts) + " |")
    for snr, published in DICE.items():
        for network, numbers in published.items():
            named = ", ".join(f"{pdb} {number:.2f}" for pdb, number in zip(PDB, numbers, strict=True))
            lines.append(f"\n*Paper, SNR {snr}, {NAMES[network]}, with CRF: {named}; mean {np.mean(numbers):.3f}*")
    return "\n".join(lines)
