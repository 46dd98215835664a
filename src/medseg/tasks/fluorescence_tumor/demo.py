"""The demo: simulate, train UNet++ small, score held-out images, segment a folder, show it."""

from __future__ import annotations

import shutil
from pathlib import Path

from medseg.demo import Demo
from medseg.io.files import read_csv
from medseg.metrics import summarise

METRICS = ("dice", "hausdorff_distance", "fpsr", "fnsr")
TRAINED, UNSEEN = ("abfm", "dthp"), "dthl"
COUNT, SIZE, SEGMENTED = 60, 256, 4

__all__ = ["demo"]


def demo(out: Path, seed: int = 0) -> dict[str, float]:
    """Run the whole task small, on simulated images.

    Args:
        out: folder to write to; replaced if an earlier demo wrote it.
        seed: seed of the images and the training.

    Returns:
        Mean of each metric over the held-out images of the trained styles, then per style, the last of which was
        never trained on. What ``metrics.json`` holds.
    """
    run = Demo(out.resolve())
    run.prepare()
    configs = "bundles/fluorescence_tumor/configs"
    data, trained = run.out / "data", run.out / "run"
    styles = [word for style in (*TRAINED, UNSEEN) for word in ("--style", style)]
    simulate = ["simulate", "fluorescence_tumor", "--out", str(data), "--count", str(COUNT), "--seed", str(seed)]
    simulate += ["--size", str(SIZE), *styles]
    run.medseg("simulate", *simulate)
    run.bundle(
        "train", [f"{configs}/train.yaml", f"{configs}/demo.yaml"],
        dataset_dir=data, output_dir=trained, seed=seed, run_name="demo-unetpp",
    )  # fmt: skip
    run.bundle("evaluate", str(trained / "configs" / "evaluate.yaml"))
    rows = read_csv(trained / "evaluation" / "test" / "per_image.csv")
    run.bundle(
        "inference", str(trained / "configs" / "inference.yaml"),
        dataset_dir=_folder_to_segment(run.out / "new_images", rows),
        label_dir=data / "masks", output_dir=run.out / "predictions",
    )  # fmt: skip

    metrics = _means([r for r in rows if r["style"] in TRAINED], "")
    for style in (*TRAINED, UNSEEN):
        metrics |= _means([r for r in rows if r["style"] == style], f"_{style}")
    run.finish(
        metrics,
        [
            f"overlays (truth green, prediction yellow): {run.out / 'predictions' / 'overlays'}",
            f"overlays of all {len(rows)} held-out images: {trained / 'evaluation' / 'test' / 'overlays'}",
            f"masks and predictions.csv: {run.out / 'predictions'}",
            f"the run, a bundle of its own: {trained}",
            run.mlflow_page(),
            f"Means over the held-out simulated images of {' and '.join(TRAINED)}; {UNSEEN} was never trained on.",
        ],
    )
    return metrics


def _folder_to_segment(folder: Path, rows: list[dict[str, str]]) -> Path:
    """A few held-out images of each style, as a user's own folder would hold them."""
    folder.mkdir()
    for style in (*TRAINED, UNSEEN):
        for row in [r for r in rows if r["style"] == style][:SEGMENTED]:
            shutil.copy(row["image"], folder)
    return folder


def _means(rows: list[dict[str, str]], suffix: str) -> dict[str, float]:
    return {f"{name}{suffix}": summarise(float(r[name]) for r in rows)["mean"] for name in METRICS}
