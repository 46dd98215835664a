"""What a search leaves beside the masks: predictions.csv, pictures of slices, and the match matrix."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.files import write_atomically, write_csv
from medseg.io.images import write_png
from medseg.io.mrc import read_mrc
from medseg.progress import track
from medseg.tasks.cryoet_one_shot.support import SupportSet
from medseg.tasks.cryoet_one_shot.volumes import crf_slices, read_subtomogram

log = logging.getLogger(__name__)

#: Targets in the picture of the match matrix; more would not be told apart.
SHOWN = 200

__all__ = ["CheckTargets", "SearchReport", "match_figure"]


class CheckTargets:
    """Stops before the work if a search cannot do it: run as the config's first step.

    Args:
        images: files to search; each is read once here.
        size: side of the volumes.
        ckpt_path: weights.
        dataset_dir: folder of the targets.
        output_dir: where results go.
    """

    def __init__(self, images: Sequence[str], size: int, ckpt_path: str, dataset_dir: str, output_dir: str) -> None:
        from medseg.io.predictions import check_inputs

        check_inputs(images, ckpt_path, dataset_dir, output_dir)
        problems = []
        for path in track(images, "check"):
            try:
                read_subtomogram(path, size)
            except (OSError, ValueError) as error:
                problems.append(str(error))
        if problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            raise ValueError(
                f"{len(problems)} of {len(images)} targets cannot be searched:\n" + "\n".join(problems[:20] + more)
            )


class SearchReport:
    """Ignite handler: one row per target, pictures of the first ones, and the match matrix.

    ``predictions.csv`` is written when the run ends, also when it ends with an error, with the targets done so far.

    Args:
        output_dir: the search's output folder.
        images: the targets.
        support: the structures.
        dataset_dir: folder that the targets come from; its subfolders are kept in ``overlays/``.
        pictures: how many targets to draw.
        threshold: on the probability, for the mask before the CRF.
    """

    def __init__(
        self,
        output_dir: str,
        images: Sequence[str],
        support: SupportSet,
        dataset_dir: str,
        pictures: int = 24,
        threshold: float = 0.5,
    ) -> None:
        self.folder, self.images, self.root = Path(output_dir), list(images), Path(dataset_dir)
        self.names, self.pictures, self.threshold = support.names, pictures, threshold
        self.rows: list[dict[str, Any]] = []
        self.scores: list[npt.NDArray[np.float64]] = []

    def attach(self, engine: Any) -> None:
        """Join an Ignite engine whose output items hold ``image``, ``match`` and, with a decoder, masks."""
        from ignite.engine import Events

        bar = track(self.images, "search")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report, bar)
        engine.add_event_handler(Events.COMPLETED, self._write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _report(self, engine: Any, bar: Any) -> None:
        for item in engine.state.output:
            next(bar, None)
            file = str(item["image"].meta["filename_or_obj"])
            logits = np.asarray(item["match"].cpu(), dtype=np.float64)
            if not np.isfinite(logits).all():
                raise ValueError(f"{file}: the match scores are not finite; do the weights hold NaN?")
            scores = np.exp(logits - logits.max())
            scores /= scores.sum()
            order = np.argsort(-scores)
            row = {
                "file": file,
                "structure": self.names[order[0]],
                "score": round(float(scores[order[0]]), 4),
                "match": round(float(1 / (1 + np.exp(-logits[order[0]]))), 4),
                "nearest": "; ".join(f"{self.names[i]} {scores[i]:.3f}" for i in order[:3]),
            }
            if "mask" in item:
                row |= self._mask(item, file)
            self.rows.append(row | {f"score_{n}": round(float(s), 4) for n, s in zip(self.names, scores, strict=True)})
            self.scores.append(scores)

    def _mask(self, item: Any, file: str) -> dict[str, Any]:
        mask = np.asarray(item["mask"].cpu())[0] > 0.5
        probability = np.asarray(item["probability"].cpu())[0]
        row: dict[str, Any] = {
            "voxels": int(mask.sum()),
            "confidence": round(float(probability[mask].mean()), 4) if mask.any() else "",
            "overlay": "",
        }
        if len(self.rows) < self.pictures:
            before = np.asarray(item["mask_before_crf"].sigmoid().cpu())[0] >= self.threshold
            name = Path(file).relative_to(self.root)
            picture = self.folder / "overlays" / name.with_name(f"{name.name}.png")
            write_png(picture, crf_slices(read_mrc(file)[0], before, mask))
            row["overlay"] = str(picture)
        return row

    def _write(self, _: Any) -> None:
        write_csv(self.folder / "predictions.csv", self.rows, () if self.rows else ("file", "structure", "score"))
        if self.scores:
            picture = io.BytesIO()
            match_figure(np.stack(self.scores), self.names, [Path(r["file"]).name for r in self.rows]).savefig(picture)
            write_atomically(self.folder / "overlays" / "match_matrix.png", picture.getvalue())
        counts = ", ".join(f"{n} {sum(r['structure'] == n for r in self.rows)}" for n in self.names)
        log.info("%d of %d targets: %s", len(self.rows), len(self.images), counts)
        log.info("predictions.csv, overlays/ (with match_matrix.png) and masks in %s", self.folder)

    def _fail(self, engine: Any, error: BaseException) -> None:
        self._write(engine)
        raise error


def match_figure(scores: npt.NDArray[np.float64], names: Sequence[str], targets: Sequence[str]) -> Any:
    """The match matrix: targets, grouped by the structure that they match best, against structures.

    Args:
        scores: (N, n), each row sums to 1.
        names: of the n structures.
        targets: of the N targets. Beyond 200 an even choice of them is shown.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    order = np.lexsort((-scores.max(axis=1), scores.argmax(axis=1)))
    shown = order[np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).astype(int))]
    height = float(np.clip(0.22 * len(shown), 2.5, 14))
    figure = Figure(figsize=(2.5 + 0.45 * len(names) + 1.5, height + 1.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(scores[shown], aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    if len(shown) <= 60:
        axes.set_yticks(range(len(shown)), [targets[i] for i in shown], fontsize=6)
    else:
        axes.set_yticks([])
        axes.set_ylabel(f"{len(shown)} of {len(order)} targets, by their best match")
    axes.set_title("Match of targets (rows) with structures (columns)", fontsize=9)
    figure.colorbar(picture, ax=axes, label="score (softmax over the structures)")
    return figure
