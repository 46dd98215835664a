"""The demo: simulate 22 complexes, train COS-Net small on 14 of them, find the 8 it never saw."""

from __future__ import annotations

import shutil
from pathlib import Path

from medseg.demo import Demo
from medseg.io.files import read_csv
from medseg.metrics import summarise

METRICS = (
    "dice", "dice_without_crf", "accuracy_2way", "accuracy_4way", "accuracy_6way", "accuracy_8way",
    "accuracy_2way_true_size", "accuracy_2way_found_size",
)  # fmt: skip
COUNT, SEARCHED = 660, 6

__all__ = ["demo"]


def demo(out: Path, seed: int = 0) -> dict[str, float]:
    """Run the whole task small, on simulated subtomograms without noise.

    Args:
        out: folder to write to; replaced if an earlier demo wrote it.
        seed: seed of the data and the training.

    Returns:
        Mean of each metric over the subtomograms of the unseen classes, and the accuracy of the 8-way search. What
        ``metrics.json`` holds.
    """
    run = Demo(out.resolve())
    run.prepare()
    configs = "bundles/cryoet_one_shot/configs"
    data, trained = run.out / "data", run.out / "run"
    simulate = ["simulate", "cryoet_one_shot", "--out", str(data), "--count", str(COUNT), "--seed", str(seed)]
    simulate += ["--set", "method=analytic"]
    run.medseg("simulate", *simulate)
    run.bundle(
        "train", [f"{configs}/train.yaml", f"{configs}/demo.yaml"],
        dataset_dir=data, output_dir=trained, seed=seed, run_name="demo-duse_scnn",
    )  # fmt: skip
    run.medseg("fit the CRF", "fit-crf", "cryoet_one_shot", str(trained))
    run.bundle("evaluate", str(trained / "configs" / "evaluate.yaml"))
    rows = read_csv(trained / "evaluation" / "test" / "per_image.csv")
    targets = run.out / "targets"
    truth = _search_set(targets, rows)
    run.bundle(
        "search", str(trained / "configs" / "inference.yaml"), dataset_dir=targets, output_dir=run.out / "predictions"
    )
    found = read_csv(run.out / "predictions" / "predictions.csv")
    right = [float(truth[Path(row["file"]).name] == row["structure"]) for row in found]

    metrics = {name: summarise(float(r[name]) for r in rows)["mean"] for name in METRICS}
    metrics["search_accuracy"] = sum(right) / len(right)
    masses = sorted({float(r["mass_kda"]) for r in rows})
    run.finish(
        metrics,
        [
            f"slices before and after the CRF, match matrix: {run.out / 'predictions' / 'overlays'}",
            f"slices of all {len(rows)} subtomograms of unseen classes: {trained / 'evaluation' / 'test' / 'overlays'}",
            f"masks and predictions.csv: {run.out / 'predictions'}",
            f"the run, a bundle of its own: {trained}",
            run.mlflow_page(),
            f"Simulated subtomograms (SNR infinity) of 8 classes that were never trained on, {masses[0]:g} to "
            f"{masses[-1]:g} kDa; search_accuracy: {len(found)} of them against one subtomogram of each class.",
        ],
    )
    return metrics


def _search_set(folder: Path, rows: list[dict[str, str]]) -> dict[str, str]:
    """A support set of one subtomogram of each class, and some targets; the true class by file name."""
    (folder / "support").mkdir(parents=True)
    truth: dict[str, str] = {}
    for name in sorted({row["class"] for row in rows}):
        first, *others = [row["image"] for row in rows if row["class"] == name][: SEARCHED + 1]
        shutil.copy(first, folder / "support" / f"{name}.mrc")
        for image in others:
            shutil.copy(image, folder)
            truth[Path(image).name] = name
    return truth
