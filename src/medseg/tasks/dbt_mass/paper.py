"""The paper's Tables 2 to 5 on simulated breasts: three networks, trained for the same time, on the same views.

Source: M. Fan et al., Frontiers in Molecular Biosciences 7, 2020, Tables 2 to 5.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.bundles.catalog import find_bundle, repository_root
from medseg.detection.froc_report import write_froc_report
from medseg.detection.froc_subgroups import FIELDS
from medseg.experiments.crossval import cross_validate, print_outcome, print_summary
from medseg.experiments.plan import Child, Plan, Setting, make_plan, parse_setting
from medseg.experiments.tables import number
from medseg.io.files import read_csv, write_atomically, write_csv
from medseg.tasks.dbt_mass.mask_scores import average_precision, score_masks
from medseg.tasks.dbt_mass.simulate import simulate

DEMO = "bundles/dbt_mass/configs/demo.yaml"

#: The first one is what the others are compared with.
NAMES = {"mask_rcnn_3d": "3D Mask R-CNN", "mask_rcnn_2d": "2D Mask R-CNN", "faster_rcnn_2d": "2D Faster R-CNN"}

#: Of 364 breasts in the paper 163 are tested.
TEST_SHARE = 163 / 364

#: Views that an epoch is timed with, and that the time of a view is measured on where there are no masks to score.
TIMED, MEASURED = 32, 20

#: Rows of Table 4: title, network, source of the masks, and the paper's AP and FNR over all masses.
SEGMENTATION = (
    ("3D Mask R-CNN, mask head", "mask_rcnn_3d", "head", (0.934, 0.053)),
    ("2D Mask R-CNN, mask head", "mask_rcnn_2d", "head", (0.730, 0.260)),
    ("spatial fuzzy C-means in the boxes of 3D Mask R-CNN", "mask_rcnn_3d", "found", (0.674, 0.317)),
    ("spatial fuzzy C-means in the true boxes + 20 % (upper bound)", "mask_rcnn_3d", "true", None),
)

#: Table 5: parameters, MB, ms per image.
PUBLISHED = {
    "mask_rcnn_3d": ("5.27e7", "320", "100"),
    "mask_rcnn_2d": ("4.93e7", "244", "195"),
    "faster_rcnn_2d": ("1.41e8", "533", "210"),
}

TABLE4_NOTE = (
    "Dice, precision and FNR: means over the masses (one per view) whose box is found with IoU > 0.5, on the network's "
    "grid; n is how many. AP50: area under the precision-recall curve over all detections of the test views; a hit has "
    "a mask IoU > 0.5. Fuzzy C-means runs in boxes enlarged by 20 %; the paper does not say in which. The paper does "
    "not define its AP, and its AP + FNR is 0.986 to 0.992 in every row of Table 4, so that it behaves like a recall: "
    "no equality with AP50 is claimed."
)

TABLE5_NOTE = (
    "Time of a view: detection with merging, without reading, median over the test views (at most {measured} of "
    "Faster R-CNN), measured here on {device}. The paper's image is undefined (patch or view) and its times are of a "
    "1080Ti. Its numbers beside ours are of its networks, ours of the {recipe}."
)

Row = dict[str, Any]

__all__ = ["paper"]


def paper(
    out: Path,
    count: int = 364,
    seed: int = 0,
    settings: Sequence[str] = (),
    jobs: int | None = None,
    full: bool = False,
    seconds: float = 420.0,
    rule: str = "iou>0.5",
) -> str:
    """Simulate, train the three networks for the same time, score the test part, and print the tables.

    An epoch of each network is timed first on a few views; the time divided by that, rounded, at least 1, is its
    number of epochs, so that every learning-rate schedule ends. The last weights are scored: no validation chooses.

    Args:
        out: folder for data, runs, ``froc/``, ``tables.md``, ``table4.csv`` and ``table5.csv``. Called again it runs
            only what is missing.
        count: breasts, two views each, 45 % of them to test on; the paper has 364.
        seed: of data and training.
        settings: further ``--set`` of :func:`medseg.experiments.plan.parse_setting`. With ``max_epochs``, for all or
            for a network, nothing is timed there.
        jobs: trainings at a time; with several, times are not those of a quiet machine.
        full: the bundle's own recipe, for a GPU, instead of the demo's.
        seconds: training time of each network.
        rule: hit rule of Tables 2 and 3.

    Returns:
        The tables as Markdown.

    Raises:
        ValueError: if ``seconds`` is not positive, or a training has failed.
    """
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds is {seconds:g}; give a positive training time, e.g. 420")
    out = out.resolve()
    data = out / "data"
    if not (data / "datalist.json").is_file():
        simulate(data, count, seed, test_share=TEST_SHARE)
    chosen = [parse_setting(s) for s in settings]
    epochs = _epochs(out, _plan(out, data, seed, chosen, full), chosen, seconds)
    plan = _plan(out, data, seed, [*_schedule(epochs), *chosen], full)
    print_summary(cross_validate(plan, jobs=jobs, report=print_outcome), plan)
    runs = {child.network: child.folder for child in plan.children}
    tested = {network: folder / "evaluation" / "test" for network, folder in runs.items()}
    failed = [n for n, folder in tested.items() if not (folder / "detections.csv").is_file()]
    if failed:
        raise ValueError(f"{', '.join(failed)} of {out} did not finish; look into the output above, then run it again")
    named = {NAMES[n]: folder for n, folder in tested.items()}
    write_froc_report(named, out / "froc", rule, baseline=NAMES["mask_rcnn_3d"], fields=list(FIELDS))
    text = _tables(out, runs, count, seconds, full)
    print(f"\n{text}\nwrote {out / 'tables.md'}, table4.csv, table5.csv and froc/")
    return text


def _plan(out: Path, data: Path, seed: int, settings: Sequence[Setting], full: bool) -> Plan:
    """The three networks on the data list's own parts; fold 0 is left out of the training, as in every run."""
    own = [Setting("dataset_dir", str(data)), Setting("experiment_name", f"dbt_mass-{out.name}")]
    # slices in reverse order are the same slices: a flip would cost the 2D networks time and give them nothing
    own += [parse_setting(f"{network}:flips=[]") for network in NAMES if network.endswith("_2d")]
    plan = make_plan(
        find_bundle("dbt_mass"), repository_root(), out / "runs", networks=list(NAMES), seed=seed,
        settings=[*own, *settings], overlays=[] if full else [DEMO],
    )  # fmt: skip
    content = json.loads((data / "datalist.json").read_text(encoding="utf-8"))
    lists = {"training": content["training"], "test": content["test"], "held_out": []}
    files = [file for file in plan.datalists if file.stem.endswith("-fold0")]
    children = tuple(child for child in plan.children if child.fold == 0)
    return replace(plan, children=children, datalists=dict.fromkeys(files, lists))


def _epochs(out: Path, plan: Plan, settings: Sequence[Setting], seconds: float) -> dict[str, int]:
    """Epochs of each network that fit into the time; the time of an epoch is measured once, and kept."""
    record = out / "epoch_seconds.json"
    known: dict[str, float] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    epochs = {}
    for child in plan.children:
        if any(s.key == "max_epochs" and s.scope in (None, child.network) for s in settings):
            continue
        if child.network not in known:
            known[child.network] = _epoch_seconds(out, child)
            write_atomically(record, (json.dumps(known, indent=1) + "\n").encode())
        epochs[child.network] = max(1, round(seconds / known[child.network]))
    return epochs


def _schedule(epochs: Mapping[str, int]) -> list[Setting]:
    """Epochs of each network, and a validation after the last one would have come: none during the training."""
    own = [Setting("max_epochs", str(n), network) for network, n in epochs.items()]
    return [*own, *(Setting("val_interval", str(n + 1), network) for network, n in epochs.items())]


def _epoch_seconds(out: Path, child: Child) -> float:
    """Time of an epoch, from the second epoch of a training on a few views."""
    folder = out / "timing" / child.network
    shutil.rmtree(folder, ignore_errors=True)
    dataset_dir = Path(dict(child.arguments)["dataset_dir"])
    content = json.loads((dataset_dir / "datalist.json").read_text(encoding="utf-8"))
    views = len([item for item in content["training"] if item["fold"] != child.fold])
    arguments = {
        **dict(child.arguments), "datalist": str(dataset_dir / "datalist.json"), "output_dir": str(folder),
        "score": "[]", "max_epochs": "2", "val_interval": "3", "experiment_name": f"dbt_mass-{out.name}-timing",
        "train::dataset::data": f"$split(@data, 'train', @fold)[:{TIMED}]",
        "validate::dataset::data": "$split(@data, 'validation', @fold)[:1]",
    }  # fmt: skip
    print(f"\ntime an epoch of {child.network}", flush=True)
    words = replace(child, arguments=tuple(arguments.items()), folder=folder).command("timing")
    if subprocess.run(words, cwd=repository_root(), check=False, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"an epoch of {child.network} cannot be timed; its output is above")
    measured = _log_seconds(folder)[-1]
    return measured * views / min(TIMED, views)


def _log_seconds(run: Path) -> list[float]:
    """Seconds of every epoch of a run."""
    log = (run / "train.log").read_text(encoding="utf-8")
    return [float(value) for value in re.findall(r" seconds=([\d.]+)$", log, re.MULTILINE)]


def _tables(out: Path, runs: Mapping[str, Path], count: int, seconds: float, full: bool) -> str:
    """Score what is not scored yet and write the tables."""
    facts = {network: _scored(out / "masks", network, folder) for network, folder in runs.items()}
    trained = {network: _log_seconds(folder) for network, folder in runs.items()}
    segmentation = [row for row in (_table4_row(out / "masks", facts, *line) for line in SEGMENTATION) if row]
    size = [_table5_row(network, facts[network], trained[network]) for network in runs]
    write_csv(out / "table4.csv", segmentation)
    write_csv(out / "table5.csv", size)
    import torch

    recipe = "the bundle's recipe" if full else "demo's reduced configuration"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} thread(s)"
    spent = ", ".join(f"{NAMES[n]} {len(s)} epochs in {sum(s):.0f} s" for n, s in trained.items())
    title = (
        f"Simulated by medseg ({count} breasts, one mass each, 45 % of them tested; masses of 1.12 to 1.30 times the "
        f"attenuation of glands; {recipe}). Training time asked for: {seconds:g} s each; spent: {spent}. The paper's "
        "numbers are of its own 163 test breasts, not measured here."
    )
    froc = (out / "froc" / "froc_tables.md").read_text(encoding="utf-8").partition("\n")[2].strip()
    note = TABLE5_NOTE.format(measured=MEASURED, device=device, recipe=recipe)
    blocks = ["# Tables of the paper", title, froc, _table4(segmentation), f"Note: {TABLE4_NOTE}"]
    text = "\n\n".join([*blocks, _table5(size), f"Note: {note}"]) + "\n"
    write_atomically(out / "tables.md", text.encode())
    return text


def _scored(out: Path, network: str, run: Path) -> dict[str, float]:
    """Score a run's masks once: ``NETWORK_masses.csv``, ``NETWORK_detections.csv``, ``NETWORK.json``."""
    record = out / f"{network}.json"
    if not record.is_file():
        boxes_only = network == "faster_rcnn_2d"
        print(f"\n{network}: {'time of a view' if boxes_only else 'masks'}", flush=True)
        found = score_masks(
            run, head=not boxes_only, fuzzy=network == "mask_rcnn_3d", limit=MEASURED if boxes_only else None
        )
        columns = {
            "masses": ["source", "view", "mass", "dice", "precision", "fnr"],
            "detections": ["source", "view", "score", "hit"],
        }
        for name, rows in (("masses", found.masses), ("detections", found.detections)):
            write_csv(out / f"{network}_{name}.csv", rows, columns[name])
        write_atomically(record, (json.dumps(found.network, indent=1) + "\n").encode())
    facts: dict[str, float] = json.loads(record.read_text(encoding="utf-8"))
    return facts


def _table4_row(
    out: Path,
    facts: Mapping[str, Mapping[str, float]],
    title: str,
    network: str,
    source: str,
    published: tuple[float, float] | None,
) -> Row:
    """One row of Table 4; empty if the network is not there."""
    if network not in facts:
        return {}
    files = [out / f"{network}_{name}.csv" for name in ("masses", "detections")]
    masses, found = ([row for row in read_csv(file) if row["source"] == source] for file in files)
    total = int(facts[network]["masses"])
    area = math.nan
    if source != "true":
        area = average_precision([float(r["score"]) for r in found], [r["hit"] == "1" for r in found], total)
    means = {k: float(np.mean([float(r[k]) for r in masses])) if masses else math.nan
             for k in ("dice", "precision", "fnr")}  # fmt: skip
    paper_ap, paper_fnr = published or (math.nan, math.nan)
    return {"method": title, "n": len(masses), "of": total, **means, "ap50": area, "paper_ap": paper_ap,
            "paper_fnr": paper_fnr}  # fmt: skip


def _table4(rows: Sequence[Row]) -> str:
    lines = ["**Segmentation (Table 4)**\n"]
    lines += ["| masks | n | Dice | precision | FNR | AP50 | *paper: AP* | *paper: FNR* |", "|---|" + "---:|" * 7]
    for r in rows:
        cells = [f"{r['n']} of {r['of']}", *(number(r[k], 3) for k in ("dice", "precision", "fnr", "ap50"))]
        cells += [f"*{number(r[k], 3)}*" for k in ("paper_ap", "paper_fnr")]
        lines.append(f"| {r['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table5_row(network: str, facts: Mapping[str, float], trained: Sequence[float]) -> Row:
    parameters, megabytes, milliseconds = PUBLISHED[network]
    return {
        "network": network, "parameters": int(facts["parameters"]), "megabytes": round(facts["megabytes"], 2),
        "milliseconds": round(facts["milliseconds"], 1), "views": int(facts["views"]), "epochs": len(trained),
        "training_seconds": round(sum(trained), 1), "paper_parameters": parameters, "paper_megabytes": megabytes,
        "paper_milliseconds": milliseconds,
    }  # fmt: skip


def _table5(rows: Sequence[Row]) -> str:
    names = ("parameters", "MB", "ms per view")
    head = " | ".join(f"{name} | *paper*" for name in names)
    lines = ["**Size and time (Table 5)**\n", f"| network | {head} | training s |", "|---|" + "---:|" * 7]
    for r in rows:
        own = (f"{r['parameters']:,}", f"{r['megabytes']:.1f}", f"{r['milliseconds']:.0f}")
        pairs = zip(own, (r[f"paper_{k}"] for k in ("parameters", "megabytes", "milliseconds")), strict=True)
        cells = " | ".join(f"{value} | *{published}*" for value, published in pairs)
        lines.append(f"| {NAMES[r['network']]} | {cells} | {r['training_seconds']:.0f} |")
    return "\n".join(lines)
