"""What medseg adds to a bundle's plain inference: overlays and a table of the predictions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.files import write_csv
from medseg.io.images import read_grey, write_png
from medseg.io.overlay import overlay
from medseg.progress import track

log = logging.getLogger(__name__)

COLUMNS = ("file", "lesion_count", "area_pixels", "confidence", "overlay")

__all__ = ["PredictionReport", "check_inputs", "measure"]


class PredictionReport:
    """Ignite handler: one overlay per image in ``overlays/`` and one row per image in ``predictions.csv``.

    The table is written when the run ends, also when it ends with an error, with the images done so far.

    Args:
        output_dir: the inference run's output folder.
        images: the files that will be segmented; each must be one 2D image.
        dataset_dir: the folder they come from; its subfolders are kept in ``overlays/``.
        label_dir: folder of masks with the images' names, drawn in green; ``None`` for none.
    """

    def __init__(self, output_dir: str, images: Sequence[str], dataset_dir: str, label_dir: str | None = None) -> None:
        self.folder, self.images, self.root = Path(output_dir), list(images), Path(dataset_dir)
        self.label_dir = Path(label_dir) if label_dir else None
        self.rows: list[dict[str, Any]] = []

    def attach(self, engine: Any) -> None:
        """Join an Ignite engine whose output items hold ``image``, ``pred`` and ``probability``."""
        from ignite.engine import Events

        bar = track(self.images, "segment")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report)
        engine.add_event_handler(Events.ITERATION_STARTED, lambda: next(bar, None))
        engine.add_event_handler(Events.COMPLETED, self._write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _report(self, engine: Any) -> None:
        for item in engine.state.output:
            file = str(item["image"].meta["filename_or_obj"])
            pred = np.asarray(item["pred"].cpu())[0].T > 0.5
            probability = np.asarray(item["probability"].cpu())[0].T
            if not np.isfinite(probability).all():
                raise ValueError("the network's output is not finite; does the image hold NaN?")
            row = {"file": file, **measure(pred, probability)}
            # The suffix stays in the name: a.png and a.tif may lie side by side.
            name = Path(file).relative_to(self.root)
            picture = self.folder / "overlays" / name.with_name(f"{name.name}.png")
            write_png(picture, overlay(read_grey(file), pred, self._truth(name)))
            self.rows.append({**row, "overlay": str(picture)})

    def _truth(self, name: Path) -> npt.NDArray[np.bool_] | None:
        mask = self.label_dir / name if self.label_dir else None
        return read_grey(mask) > 0 if mask and mask.is_file() else None

    def _write(self, _: Any) -> None:
        write_csv(self.folder / "predictions.csv", self.rows, COLUMNS)
        done = f"{len(self.rows)} of {len(self.images)} images"
        log.info("%s: masks, overlays/ and predictions.csv in %s", done, self.folder)

    def _fail(self, engine: Any, error: BaseException) -> None:
        self._write(engine)
        if not isinstance(error, Exception):  # Ctrl-C is nobody's fault
            raise error
        # One image per batch, in order: the first that is missing is the one that broke.
        broken = self.images[min(len(self.rows), len(self.images) - 1)]
        raise ValueError(f"{broken} could not be segmented: {_deepest(error)}") from error


def _deepest(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def check_inputs(images: Sequence[str], ckpt_path: str, dataset_dir: str, output_dir: str) -> None:
    """Stop before the work if there is nothing to do or nothing to do it with; MONAI skips an empty run with a note.

    Args:
        images: files to segment.
        ckpt_path: weights that will be loaded.
        dataset_dir: the folder the images come from.
        output_dir: where masks go. Among the images they could overwrite a file, and a second run would segment them.

    Raises:
        ValueError: if there are no images, or the output folder is one that images are taken from.
        FileNotFoundError: if there are no weights.
    """
    if not images:
        raise ValueError("no images to segment: check --dataset_dir, --pattern and --suffixes")
    output = Path(output_dir).resolve()
    if output == Path(dataset_dir).resolve() or any(output in Path(i).resolve().parents for i in images):
        raise ValueError(f"--output_dir {output_dir} is a folder that images are taken from; choose another")
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(
            f"no weights at {ckpt_path}: train first and use the run's own configs/inference.yaml, or pass --ckpt_path "
            "with the --network_name and the other arguments that they belong to"
        )


def measure(pred: npt.NDArray[np.bool_], probability: npt.NDArray[Any]) -> dict[str, Any]:
    """Count and size of the predicted lesions.

    Args:
        pred: mask (H, W).
        probability: foreground probability (H, W).

    Returns:
        ``lesion_count`` (8-connected components), ``area_pixels`` and ``confidence``: the mean probability inside the
        mask, which is not calibrated; empty for an empty mask.
    """
    from scipy import ndimage

    _, count = ndimage.label(pred, structure=np.ones((3, 3)))
    confidence = round(float(probability[pred].mean()), 4) if count else ""
    return {"lesion_count": int(count), "area_pixels": int(pred.sum()), "confidence": confidence}
