"""The demo: simulate breasts, train the reduced 3D Mask R-CNN, evaluate, and find masses in a folder of DICOM files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from medseg.demo import Demo
from medseg.io.files import read_csv

METRICS = (
    "sensitivity_iou30", "sensitivity_centre", "sensitivity", "froc_area_iou30", "froc_area_centre", "froc_area",
    "froc_area_lesion", "dice", "precision", "fnr",
)  # fmt: skip
COUNT, SHOWN, EPOCHS = 140, 6, 5

__all__ = ["demo"]


def demo(out: Path, seed: int = 0) -> dict[str, float]:
    """Run the whole task small, on simulated breasts.

    Args:
        out: folder to write to; replaced if an earlier demo wrote it.
        seed: seed of the data and the training.

    Returns:
        Mean of each metric over the test views. What ``metrics.json`` holds.
    """
    run = Demo(out.resolve())
    run.prepare()
    configs = "bundles/dbt_mass/configs"
    data, trained, found = run.out / "data", run.out / "run", run.out / "predictions"
    run.medseg("simulate", "simulate", "dbt_mass", "--out", str(data), "--count", str(COUNT), "--seed", str(seed))
    run.bundle(
        "train", [f"{configs}/train.yaml", f"{configs}/demo.yaml"],
        dataset_dir=data, output_dir=trained, seed=seed, run_name="demo-mask_rcnn_3d", max_epochs=EPOCHS,
        val_interval=EPOCHS,
    )  # fmt: skip
    run.bundle("evaluate", str(trained / "configs" / "evaluate.yaml"))
    tested = trained / "evaluation" / "test"
    run.medseg("FROC", "froc", f"demo={tested}", "--out", str(run.out / "froc"))
    studies = run.out / "studies"
    studies.mkdir()
    for row in read_csv(tested / "per_image.csv")[:SHOWN]:
        shutil.copy(row["image"], studies)
    run.bundle("detect", str(trained / "configs" / "inference.yaml"), dataset_dir=studies, output_dir=found)

    summary = json.loads((tested / "metrics.json").read_text(encoding="utf-8"))
    metrics = {name: float("nan" if (m := summary["metrics"][name]["mean"]) is None else m) for name in METRICS}
    breasts = len({row["breast"] for row in read_csv(tested / "per_image.csv")})
    run.finish(
        metrics,
        [
            f"FROC curves and tables: {run.out / 'froc'}",
            f"slices through masses and detections of all {summary['cases']} test views: {tested / 'overlays'}",
            f"boxes, masks, DICOM segmentations, montages and films: {found}",
            f"the run, a bundle of its own: {trained}",
            run.mlflow_page(),
            f"Simulated views of {breasts} unseen breasts, one mass each, 1.12 to 1.30 times as dense as glandular "
            "tissue. sensitivity: per breast at 1 false positive per breast, IoU > 0.5 unless its name says otherwise.",
        ],
    )
    return metrics
