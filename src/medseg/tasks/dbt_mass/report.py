"""What detection in a folder leaves: boxes, masks, pictures and films of each view, and a table per breast."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medseg.detection.patches import paste_masks
from medseg.io.dicom_seg import write_dicom_seg
from medseg.io.files import write_atomically, write_csv
from medseg.io.images import write_png
from medseg.io.predictions import check_inputs
from medseg.io.tomosynthesis import View, find_views
from medseg.io.tomosynthesis_nifti import write_nifti
from medseg.progress import track
from medseg.tasks.dbt_mass.module import DetectionCase
from medseg.tasks.dbt_mass.pictures import Picture, mass_montage, write_film
from medseg.tasks.dbt_mass.scores import BOX
from medseg.tasks.dbt_mass.views import LoadViewd, boxes_of, boxes_to_grid
from medseg.training.module import Case

log = logging.getLogger(__name__)

#: Box corners in DICOM patient coordinates (LPS), in mm.
MILLIMETRES = ("x0_mm", "y0_mm", "z0_mm", "x1_mm", "y1_mm", "z1_mm")
COLUMNS = ("file", "patient", "laterality", "view", "score", *BOX, *MILLIMETRES, "diameter_mm", "volume_ml", "reported")

BREAST_COLUMNS = ("breast", "study", "patient", "laterality", "views", "masses", "score")

__all__ = ["BOX", "DetectionReport", "DrawView", "NameProblems", "ViewFolder", "box_in_millimetres"]


class DrawView:
    """Draws a scored view for the trainer: see :func:`medseg.tasks.dbt_mass.pictures.mass_montage`.

    Args:
        load: how views are loaded.
        min_score: detections below are not drawn.
    """

    def __init__(self, load: LoadViewd, min_score: float = 0.3) -> None:
        self.load, self.min_score = load, min_score

    def __call__(self, case: Case) -> Picture:
        """Slices through masses and detections of a case."""
        pred, truth = case.unpacked()
        item = self.load({"image": case.image})
        boxes: list[list[float]] = []
        scores: list[float] = []
        if isinstance(case, DetectionCase):
            boxes = [b for b, s in zip(case.boxes, case.scores, strict=True) if s >= self.min_score]
            scores = [s for s in case.scores if s >= self.min_score]
        true_boxes = boxes_of(torch.from_numpy(truth)[None].byte()).tolist()
        return mass_montage(item["image"][0].numpy(), boxes, scores, pred, truth, true_boxes)


class ViewFolder:
    """The views of a folder that can be processed, and what is wrong with the others.

    Args:
        dataset_dir: folder of DICOM studies, NIfTI or NRRD files.
        pattern: glob below it.
        spacing: (d, h, w) in mm for files that lack it.
        ckpt_path: weights, checked before the work.
        output_dir: where results go.
    """

    def __init__(
        self,
        dataset_dir: str,
        pattern: str,
        spacing: Sequence[float] | None,
        ckpt_path: str,
        output_dir: str,
    ) -> None:
        file_spacing = None if spacing is None else (float(spacing[0]), float(spacing[1]), float(spacing[2]))
        self.root = Path(dataset_dir)
        self.views, self.problems = find_views(dataset_dir, pattern, file_spacing)
        if not self.views and not self.problems:
            raise ValueError(f"no DICOM, NIfTI or NRRD view in {dataset_dir}: check --dataset_dir and --pattern")
        if not self.views:
            raise ValueError(f"no view in {dataset_dir} can be used:\n" + "\n".join(self.problems[:20]))
        check_inputs([view.name for view in self.views], ckpt_path, dataset_dir, output_dir)
        self.items: list[dict[str, Any]] = [{"image": view} for view in self.views]


class DetectionReport:
    """Ignite handler: results of each view, and the tables when the run ends, also when it ends with an error.

    Args:
        output_dir: folder to write to.
        folder: the views.
        min_score: detections from this score on are reported: masks, pictures, and the table per breast. All are in
            ``detections.csv``.
        threshold: of the masks' probability.
        dicom_seg: write a DICOM segmentation beside the NIfTI mask of DICOM views.
        films: how many views get a film.
    """

    def __init__(
        self,
        output_dir: str,
        folder: ViewFolder,
        min_score: float = 0.3,
        threshold: float = 0.5,
        dicom_seg: bool = True,
        films: int = 12,
    ) -> None:
        self.out, self.folder = Path(output_dir), folder
        self.min_score, self.threshold = min_score, threshold
        self.dicom_seg, self.films = dicom_seg, films
        self.views = {view.name: view for view in folder.views}
        self.stems = _stems(folder.views, folder.root)
        self.problems = list(folder.problems)
        self.rows: list[dict[str, Any]] = []
        self.done: list[dict[str, Any]] = []

    def attach(self, engine: Any) -> None:
        """Join an Ignite engine whose output items hold what ``LoadViewd`` and ``PatchDetection`` give."""
        from ignite.engine import Events

        bar = track(self.views, "detect")
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._report, bar)
        engine.add_event_handler(Events.COMPLETED, self._write)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def finish(self) -> None:
        """Say what could not be processed: the run's last step.

        Raises:
            ValueError: if anything could not; everything else is written by then.
        """
        if self.problems:
            count, of = len(self.problems), len(self.views) + len(self.folder.problems)
            shown = [f"  - {problem}" for problem in self.problems[:20]]
            shown += [f"  - ... and {count - 20} more, see problems.txt"] if count > 20 else []
            raise ValueError(
                f"{count} of {of} views could not be processed (the others are done, see {self.out}):\n"
                + "\n".join(shown)
            )

    def _report(self, engine: Any, bar: Any) -> None:
        for item in engine.state.output:
            next(bar, None)
            if item.get("problem"):
                self.problems.append(str(item["problem"]))
                continue
            view = self.views[str(item["image"].meta["filename_or_obj"])]
            if not torch.isfinite(torch.as_tensor(item["scores"])).all():
                raise ValueError(f"{view.name}: the scores are not finite; do the weights hold NaN?")
            try:
                self._view(view, item)
            except (OSError, ValueError) as error:  # the other views are still processed
                self.problems.append(f"{view.name}: {error}")

    def _view(self, view: View, item: Mapping[str, Any]) -> None:
        """Write what was found in one view."""
        image = item["image"]
        boxes, scores, masks = (torch.as_tensor(item[k]).cpu().float() for k in ("boxes", "scores", "masks"))
        affine = np.asarray(image.affine.cpu(), float)
        native = boxes_to_grid(boxes.numpy(), affine, view.affine)
        labels = self._native_mask(view, native, masks, scores, affine)
        stem = self.out / self.stems[view.name]
        picture = self.out / "overlays" / f"{self.stems[view.name]}.png"
        segmentation, film = stem.with_name(f"{stem.name}_mass.dcm"), picture.with_suffix(".gif")
        for old in (segmentation, film):  # of an earlier run, and not written by every one
            old.unlink(missing_ok=True)
        write_nifti(stem.with_name(f"{stem.name}_mass.nii.gz"), labels, view.affine)
        if self.dicom_seg and view.frames:
            try:
                write_dicom_seg(segmentation, labels, view)
            except ValueError as error:  # the NIfTI mask and the boxes are there all the same
                self.problems.append(str(error))
        shown = [i for i, s in enumerate(scores.tolist()) if s >= self.min_score]
        pred = np.asarray(item["probability"].cpu())[0] > self.threshold
        grey, drawn = image[0].cpu().numpy(), (boxes[shown].tolist(), scores[shown].tolist())
        write_png(picture, mass_montage(grey, *drawn, pred))
        if len(self.done) < self.films:
            write_film(film, grey, *drawn, pred)
        voxel_ml = float(np.prod(view.spacing)) / 1000
        for number, (box, score) in enumerate(zip(native, scores.tolist(), strict=True), start=1):
            volume = float((labels == number).sum()) * voxel_ml if score >= self.min_score else float("nan")
            self.rows.append(self._row(view, box, score, volume))
        self.done.append({"view": view, "reported": len(shown), "highest": float(scores.max()) if len(scores) else 0.0})

    def _native_mask(
        self, view: View, boxes: npt.NDArray[np.float64], masks: torch.Tensor, scores: torch.Tensor, affine: Any
    ) -> npt.NDArray[np.uint8]:
        """Reported masses numbered from 1 by falling score, on the view's own grid."""
        flipped = bool((np.linalg.inv(view.affine) @ affine)[2, 2] < 0)
        labels = np.zeros(view.shape, np.uint8)
        count = min(255, int((scores >= self.min_score).sum()))  # the scores are falling
        turned = masks[:count].flip(3) if flipped else masks[:count]
        pasted = paste_masks(torch.from_numpy(boxes[:count]).float(), turned, view.shape)
        for number, (where, mask) in enumerate(pasted, start=1):
            part = labels[where]
            part[(mask.numpy() > self.threshold) & (part == 0)] = number
        return labels

    def _row(self, view: View, box: npt.NDArray[np.float64], score: float, volume: float) -> dict[str, Any]:
        corners = box_in_millimetres(box, view.affine)
        sides = (box[3:] - box[:3]) * np.asarray(view.spacing)
        return {
            "file": view.name,
            "patient": view.patient,
            "laterality": view.laterality,
            "view": view.view,
            "score": round(score, 4),
            **dict(zip(BOX, box.round(2).tolist(), strict=True)),
            **dict(zip(MILLIMETRES, corners.round(2).tolist(), strict=True)),
            "diameter_mm": round(float(sides.max()), 1),
            "volume_ml": "" if np.isnan(volume) else round(volume, 3),
            "reported": score >= self.min_score,
        }

    def _write(self, _: Any) -> None:
        rows = sorted(self.rows, key=lambda r: (r["file"], -r["score"]))
        write_csv(self.out / "detections.csv", rows, COLUMNS)
        write_atomically(
            self.out / "detections.json", (json.dumps(_by_view(rows, self.done), indent=1) + "\n").encode()
        )
        write_csv(self.out / "breasts.csv", self._breasts(), BREAST_COLUMNS)
        problems = self.out / "problems.txt"
        problems.unlink(missing_ok=True)
        if self.problems:
            write_atomically(problems, ("\n".join(self.problems) + "\n").encode())
        log.info(
            "%d views, %d with a mass of score >= %g; %d problems", len(self.done),
            sum(d["reported"] > 0 for d in self.done), self.min_score, len(self.problems),
        )  # fmt: skip
        log.info("detections.csv, breasts.csv, masks and overlays/ in %s", self.out)

    def _breasts(self) -> list[dict[str, Any]]:
        """One row per breast and study; a view without laterality or patient makes a row of its own."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for done in self.done:
            view = done["view"]
            groups.setdefault((view.breast or view.name, view.study if view.breast else ""), []).append(done)
        return [
            {
                "breast": name,
                "study": study,
                "patient": members[0]["view"].patient,
                "laterality": members[0]["view"].laterality,
                "views": " ".join(sorted(m["view"].view or "?" for m in members)),
                "masses": max(m["reported"] for m in members),
                "score": round(max(m["highest"] for m in members), 4),
            }
            for (name, study), members in sorted(groups.items())
        ]

    def _fail(self, engine: Any, error: BaseException) -> None:
        self._write(engine)
        raise error


class NameProblems:
    """The run's last step: :meth:`DetectionReport.finish`, in the form of a component, which a trusted bundle may hold.

    Args:
        report: of the run.
    """

    def __init__(self, report: DetectionReport) -> None:
        report.finish()


def _stems(views: Sequence[View], root: Path) -> dict[str, Path]:
    """Path of each view's results below the output folder: its own, without the suffix where no other view has that."""
    own = {view.name: Path(view.name).relative_to(root) for view in views}
    own = {name: path if path.name else Path(root.resolve().name) for name, path in own.items()}
    bare = {name: path.with_name(path.name.split(".")[0] or path.name) for name, path in own.items()}
    counts = Counter(bare.values())
    return {name: bare[name] if counts[bare[name]] == 1 else path for name, path in own.items()}


def box_in_millimetres(box: npt.NDArray[np.float64], affine: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Corners of a box in DICOM patient coordinates.

    Args:
        box: (6,) half-open edges in voxels.
        affine: 4 x 4, from indices of voxel centres to RAS mm.

    Returns:
        (6,) smallest and largest x, y and z in LPS mm of the box's eight corners.
    """
    edges = np.asarray(box, float).reshape(2, 3) - 0.5  # the edge of voxel 0 is at index -0.5
    corners = np.stack(np.meshgrid(*edges.T, indexing="ij"), axis=-1).reshape(-1, 3)
    lps = (corners @ affine[:3, :3].T + affine[:3, 3]) * [-1, -1, 1]
    return np.concatenate([lps.min(axis=0), lps.max(axis=0)])


def _by_view(rows: Sequence[Mapping[str, Any]], done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The detections as JSON: a list for each view, also for those without one."""
    found: dict[str, Any] = {
        d["view"].name: {"study": d["view"].study, "series": d["view"].series, "sop_instance": d["view"].sop_instance,
                         "spacing_mm": list(d["view"].spacing), "shape": list(d["view"].shape), "detections": []}
        for d in done
    }  # fmt: skip
    for row in rows:
        found[row["file"]]["detections"].append(
            {"score": row["score"], "box_voxels_dhw": [row[k] for k in BOX],
             "box_mm_lps": [row[k] for k in MILLIMETRES], "reported": row["reported"]}
        )  # fmt: skip
    return found
