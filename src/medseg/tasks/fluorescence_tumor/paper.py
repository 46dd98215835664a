"""The paper's table on simulated images: nine methods, two training styles, an organ that none was trained on.

Source: W. Hou et al., Surgical Innovation 2024, Tables 2, 3 and 5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from medseg.bundles.catalog import find_bundle, repository_root
from medseg.experiments.compare import compare
from medseg.experiments.crossval import cross_validate, print_outcome, print_summary
from medseg.experiments.plan import Setting, make_plan, parse_setting
from medseg.experiments.report import write_comparison
from medseg.experiments.runs import read_runs
from medseg.io.datalist import write_datalist
from medseg.io.files import write_atomically, write_csv
from medseg.tasks.fluorescence_tumor.simulate import simulate

TRAINED, UNSEEN = ("abfm", "dthp"), "dthl"
METRICS = ("dice", "hausdorff_distance", "fpsr", "fnsr")
NAMES = {"unet": "UNet", "deeplabv3plus": "DeepLabv3+", "unetpp": "UNet++", "swin_unetr": "Swin UNETR"}
DEMO = "bundles/fluorescence_tumor/configs/demo.yaml"

#: Dice %, HD in pixels, FPSR %, FNSR % by tested style and configuration, as the paper prints them.
PUBLISHED: dict[str, dict[str, tuple[float | None, ...]]] = {
    "abfm": {
        "drlse": (34.06, None, None, None),
        "unet-end_to_end": (80.41, 35.83, 3.97, 15.61),
        "deeplabv3plus-end_to_end": (69.40, 60.20, 5.89, 24.71),
        "unetpp-end_to_end": (80.71, 33.34, 5.08, 14.20),
        "swin_unetr-end_to_end": (74.42, 48.95, 5.69, 19.89),
        "unet-transfer": (80.76, 34.76, 3.88, 15.36),
        "deeplabv3plus-transfer": (71.71, 58.94, 7.14, 21.15),
        "unetpp-transfer": (82.17, 37.49, 4.04, 13.79),
        "swin_unetr-transfer": (75.21, 39.27, 5.27, 19.52),
    },
    "dthp": {
        "drlse": (54.12, None, None, None),
        "unet-end_to_end": (94.25, 32.96, 2.77, 2.98),
        "deeplabv3plus-end_to_end": (96.35, 20.03, 1.83, 1.82),
        "unetpp-end_to_end": (94.90, 29.16, 2.61, 2.49),
        "swin_unetr-end_to_end": (90.03, 101.32, 4.19, 5.78),
        "unet-transfer": (94.33, 32.11, 2.84, 2.82),
        "deeplabv3plus-transfer": (96.48, 20.25, 1.70, 1.82),
        "unetpp-transfer": (95.61, 25.77, 2.03, 2.37),
        "swin_unetr-transfer": (91.82, 82.14, 3.27, 4.91),
    },
    "dthl": {
        "drlse": (64.26, None, None, None),
        "unet-end_to_end": (81.48, 303.21, 5.63, 12.89),
        "deeplabv3plus-end_to_end": (80.97, 381.06, 8.87, 10.16),
        "unetpp-end_to_end": (83.68, 335.40, 5.03, 11.29),
        "swin_unetr-end_to_end": (75.59, 505.02, 8.84, 15.57),
        "unet-transfer": (83.59, 342.25, 10.73, 5.67),
        "deeplabv3plus-transfer": (82.76, 321.95, 8.29, 8.95),
        "unetpp-transfer": (85.49, 293.47, 12.49, 2.02),
        "swin_unetr-transfer": (77.66, 495.03, 6.81, 15.53),
    },
}

__all__ = ["paper"]


def paper(
    out: Path,
    folds: int = 5,
    count: int = 60,
    seed: int = 0,
    settings: Sequence[str] = (),
    jobs: int | None = None,
    full: bool = False,
) -> str:
    """Simulate, cross-validate every method on abfm and on dthp, score all of them on dthl, and print the table.

    Args:
        out: folder for data, runs and ``paper_table.{csv,md}``. Called again it runs only what is missing.
        folds: of each cross-validation.
        count: images per style.
        seed: of images, folds and trainings.
        settings: further ``--set`` of :func:`medseg.experiments.plan.parse_setting`. Without a
            ``transfer:encoder_weights=...`` the frozen encoders come from the end-to-end training on the other style,
            because ImageNet weights need a download and do not exist for the 2D Swin UNETR.
        jobs: trainings at a time.
        full: images of 1024 x 1024 and the bundle's own recipe, for a GPU, instead of 256 x 256 and the demo's.

    Returns:
        The table as Markdown.
    """
    out = out.resolve()
    lists = _data(out / "data", count, seed, 1024 if full else 256)
    chosen = [parse_setting(s) for s in settings]
    for modes in (["end_to_end"], ["end_to_end", "transfer"]):
        for style in TRAINED:
            own = [Setting("dataset_dir", str(out / "data")), Setting("datalist", str(lists[style]))]
            if not any(s.scope == "transfer" and s.key == "encoder_weights" for s in chosen):
                other = out / TRAINED[1 - TRAINED.index(style)] / "{network}-end_to_end" / "repeat0-fold0"
                own.append(Setting("encoder_weights", str(other / "models" / "model.pt"), "transfer"))
            plan = make_plan(
                find_bundle("fluorescence_tumor"), repository_root(), out / style, folds=folds, seed=seed,
                networks=["drlse", *NAMES], modes=modes, settings=[*own, _experiment(style, out), *chosen],
                overlays=[] if full else [DEMO], held_out=True,
            )  # fmt: skip
            print(f"\ntrained on {style}, {' and '.join(modes)}", flush=True)
            print_summary(cross_validate(plan, jobs=jobs, report=print_outcome), plan)
    return _write_table(out, count, folds, full)


def _experiment(style: str, out: Path) -> Setting:
    return Setting("experiment_name", f"fluorescence_tumor-{out.name}-{style}")


def _data(folder: Path, count: int, seed: int, size: int) -> dict[str, Path]:
    """Images of the three styles, and a data list for each style that is trained on, with dthl as its test part."""
    lists = {style: folder / f"trained_on_{style}.json" for style in TRAINED}
    if all(path.is_file() for path in lists.values()):
        return lists
    items: dict[str, list[dict[str, Any]]] = {}
    for style in (*TRAINED, UNSEEN):
        path = simulate(folder / style, count, seed, [style], size, test_fraction=float(style == UNSEEN))
        content = json.loads(path.read_text(encoding="utf-8"))
        items[style] = [
            {**item, "image": f"{style}/{item['image']}", "label": f"{style}/{item['label']}"}
            for item in content["training"] + content["test"]
        ]
    for style, path in lists.items():
        write_datalist(path, items[style], items[UNSEEN], name="fluorescence_tumor (simulated)")
    return lists


def _rows(out: Path) -> Iterator[dict[str, Any]]:
    """Trained style, tested style, configuration, metric, mean, sd and number of cases; and the paper's number."""
    for trained, tested, part in [(s, s, "test") for s in TRAINED] + [(s, UNSEEN, "held_out") for s in TRAINED]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            chosen = _own_runs(out / trained)
            runs = read_runs(_experiment(trained, out).value, part=part, filter_string=chosen, root=repository_root())
            baseline = "unet-end_to_end" if "unet-end_to_end" in runs.configurations else None
            comparison = compare(runs, METRICS, baseline, common=True)
        except ValueError as error:  # everything of that style failed
            print(f"trained on {trained}, tested on {tested}: {error}")
        else:
            for note in comparison.notes:
                print(f"trained on {trained}, tested on {tested}: {note}")
            write_comparison(comparison, out / "comparison" / f"{trained}-{tested}")
            found = {(r["configuration"], r["metric"]): r for r in comparison.table.to_dict("records")}
        for configuration, published in PUBLISHED[tested].items():
            for metric, value in zip(METRICS, published, strict=True):
                row = found.get((configuration, metric), {})
                yield {
                    "trained_on": trained, "tested_on": tested, "configuration": configuration, "metric": metric,
                    **{k: row.get(k, "") for k in ("n", "mean", "sd")}, "paper": "" if value is None else value,
                }  # fmt: skip


def _own_runs(out: Path) -> str:
    """Filter for the runs of one cross-validation: an earlier one of the same name may be in the store."""
    record = out / "crossval.json"
    parent = json.loads(record.read_text(encoding="utf-8"))["parent_run_id"] if record.is_file() else None
    return f"tags.`mlflow.parentRunId` = '{parent}'" if parent else ""


def _write_table(out: Path, count: int, folds: int, full: bool) -> str:
    rows = list(_rows(out))
    write_csv(out / "paper_table.csv", rows)
    recipe = "1024 x 1024 images, the bundle's recipe" if full else "256 x 256 images, the demo's small recipe"
    blocks = [
        f"Simulated data ({count} images a style, {recipe}, {folds} folds): mean (sd) over the tested cases. "
        "*Paper*: the published numbers on its own images of 1024 x 1024, not measured here."
    ]
    for trained, tested in [(s, s) for s in TRAINED] + [(s, UNSEEN) for s in TRAINED]:
        part = [r for r in rows if (r["trained_on"], r["tested_on"]) == (trained, tested)]
        blocks.append(f"**Trained on {trained}, tested on {tested}**\n\n{_markdown(part)}")
    table = "\n\n".join(blocks) + "\n"
    write_atomically(out / "paper_table.md", table.encode())
    print(f"\n{table}\nwrote {out / 'paper_table.csv'} and {out / 'paper_table.md'}")
    return table


def _markdown(rows: list[dict[str, Any]]) -> str:
    by_configuration: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        by_configuration.setdefault(row["configuration"], {})[row["metric"]] = row
    titles = {"dice": "Dice %", "hausdorff_distance": "HD px", "fpsr": "FPSR %", "fnsr": "FNSR %"}
    lines = ["| | " + " | ".join(f"{t} | *paper*" for t in titles.values()) + " |", "|---|" + "---:|" * 8]
    for configuration, metrics in by_configuration.items():
        network, _, mode = configuration.partition("-")
        name = f"{NAMES[network]}, {mode.replace('_', ' ')}" if mode else "DRLSE"
        cells = [cell for metric in titles for cell in _cells(metrics[metric])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> tuple[str, str]:
    scale, digits = (1, 1) if row["metric"] == "hausdorff_distance" else (100, 2)
    measured = "failed"
    if row["n"] != "":  # without a defined value (HD of empty predictions) the mean is nan
        measured = f"{row['mean'] * scale:.{digits}f} ({row['sd'] * scale:.{digits}f})".replace("nan", "–")
    return measured, f"*{row['paper']:.2f}*" if row["paper"] != "" else "–"
