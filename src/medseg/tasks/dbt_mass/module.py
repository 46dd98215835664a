"""How the detectors train and are scored: losses over patches, whole views, FROC over all views of a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from monai.data import decollate_batch
from monai.data.box_utils import box_iou
from monai.inferers import SimpleInferer
from torch import nn

from medseg.detection.patches import paste_masks
from medseg.io.files import write_csv
from medseg.metrics import summarise
from medseg.progress import track
from medseg.tasks.dbt_mass.network import MassRCNN3D
from medseg.tasks.dbt_mass.scores import BOX, FrocScore, view_table
from medseg.tasks.dbt_mass.views import boxes_of, boxes_to_grid, masks_of, numbers_of
from medseg.training.module import Case, SegmentationModule, plain_tensor

#: Views at most that anchors are fitted to.
FITTED = 200

__all__ = ["DetectionCase", "DetectionModule"]


@dataclass
class DetectionCase(Case):
    """Result of one view.

    Attributes:
        found: detections in the voxels of the view's own grid: box, ``score``, and ``iou`` with the best true box.
        true: masses likewise: box, ``mass``.
        boxes: (N, 6) on the network's grid, for pictures.
        scores: (N,) of these.
    """

    found: list[dict[str, Any]] = field(default_factory=list)
    true: list[dict[str, Any]] = field(default_factory=list)
    boxes: list[list[float]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


class DetectionModule(SegmentationModule):
    """A :class:`SegmentationModule` for detectors, called as ``network(images, targets)``.

    Among ``metrics`` are scores over a whole part (:class:`~medseg.tasks.dbt_mass.scores.FrocArea`,
    :class:`~medseg.tasks.dbt_mass.scores.SensitivityAt`) and functions of two masks. The latter are taken over the
    masses of a view that are hit: the mask of the best box with IoU > ``mask_iou`` against the true one; ``nan`` where
    none is.

    Args:
        mask_iou: IoU of boxes from which on a mask is compared with the truth.
        threshold: of the masks' probability.
        kwargs: as of :class:`SegmentationModule`; ``val_inferer`` is a
            :class:`~medseg.detection.patches.PatchDetection`.
    """

    metrics: dict[str, Any]

    def __init__(self, *, mask_iou: float = 0.5, threshold: float = 0.5, **kwargs: Any) -> None:
        # a detector gives its losses itself, and is trained on the patches as they come
        super().__init__(loss=nn.Identity(), train_inferer=SimpleInferer(), **kwargs)
        self.mask_iou, self.threshold = mask_iou, threshold
        self.probability_key = None  # of a voxel: the score of a box is what would be calibrated

    def on_fit_start(self) -> None:
        """Fit the anchors to the sizes of the masses in the training patches, unless the run is resumed."""
        if not isinstance(self.network, MassRCNN3D) or getattr(self.trainer, "resumed", False):
            return
        dataset = self.trainer.train_dataloader.dataset if self.trainer.train_dataloader is not None else None
        if dataset is None:  # Lightning has not asked for it yet
            self.trainer.fit_loop.setup_data()
            dataset = self.trainer.train_dataloader.dataset
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(FITTED, len(dataset))).astype(int))
        # the loader's draws (epoch, position, item) are seeded: every process fits the same
        sizes = [_sizes(plain_tensor(dataset[0, int(i), int(i)]["label"])) for i in track(chosen, "fit anchors")]
        self.network.fit_anchors(np.concatenate(sizes))

    def training_step(self, batch: Mapping[str, Any], _: int) -> torch.Tensor:
        """Sum of the losses of a batch with ``image`` and ``label``, numbered masses, (B, 1, D, H, W)."""
        images, labels = (plain_tensor(batch[k]) for k in ("image", "label"))
        drawn = batch.get("truth", ["mask"] * len(images))
        targets = [
            {"boxes": boxes_of(label), "masks": None if kind == "box" else masks_of(label)}
            for label, kind in zip(labels, drawn, strict=True)
        ]
        losses = self.network(self.in_memory_format(images), targets)
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(images), "sync_dist": True}
        for name, value in losses.items():
            self.log(f"train_{name}", value.detach(), **options)
        loss: torch.Tensor = torch.stack(list(losses.values())).sum()
        self.log("train_loss", loss.detach(), prog_bar=True, **options)
        return loss

    def _score(self, batch: dict[str, Any], stage: str) -> None:
        batch |= self.val_inferer(batch["image"], self.network)
        for item in decollate_batch(batch):
            self.cases.append(self._case(self.postprocessing(item)))

    def _case(self, item: Mapping[str, Any]) -> Case:
        image, label = item["image"], plain_tensor(item["label"])
        boxes, scores = (plain_tensor(item[k]).float() for k in ("boxes", "scores"))
        truth = boxes_of(label)
        iou = box_iou(boxes, truth) if len(boxes) and len(truth) else boxes.new_zeros((len(boxes), len(truth)))
        pred = plain_tensor(item["probability"])[0] > self.threshold
        known = ("image", "label", "probability", "boxes", "scores", "masks", "fold", "part")
        native = _to_native(image)
        best = iou.max(dim=1).values.tolist() if iou.shape[1] else [0.0] * len(boxes)
        found = [
            {**dict(zip(BOX, box, strict=True)), "score": round(score, 6), "iou": round(quality, 4)}
            for box, score, quality in zip(native(boxes).round(3).tolist(), scores.tolist(), best, strict=True)
        ]
        fields = {k: v for k, v in item.items() if k not in known and isinstance(v, (str, int, float))}
        values = [str(v) for v in numbers_of(label)]
        named = str(fields.get("mass", "")) or "none"
        # a mass has its name in both views: the item's field, or its number in the mask
        names = [named] if len(values) == 1 and named != "none" and "," not in named else values
        true = [
            {**dict(zip(BOX, box, strict=True)), "mass": name}
            for box, name in zip(native(truth).round(3).tolist(), names, strict=True)
        ]
        return DetectionCase(
            image=str(image.meta["filename_or_obj"]),
            metrics=self._hit_metrics(item, boxes, iou, masks_of(label)),
            empty_prediction=not bool(pred.any()),
            empty_truth=not len(truth),
            fields={**fields, "masses": len(truth), **_grid_of(image)},
            masks=_packed(pred, label[0] > 0) if self.keep_masks else None,
            part=str(item.get("part", "")),
            found=found,
            true=true,
            boxes=boxes.tolist(),
            scores=scores.tolist(),
        )

    def _hit_metrics(
        self, item: Mapping[str, Any], boxes: torch.Tensor, iou: torch.Tensor, truths: torch.Tensor
    ) -> dict[str, float]:
        """Metrics of masks: the mean over the masses of a view that are hit, ``nan`` without one."""
        values: dict[str, list[float]] = {name: [] for name in self.metrics}
        masks = plain_tensor(item["masks"]).float()
        for number, truth in enumerate(truths):
            if item.get("truth") == "box" or not len(boxes) or float(iou[:, number].max()) <= self.mask_iou:
                continue
            best = int(iou[:, number].argmax())
            where, mask = next(paste_masks(boxes[best : best + 1], masks[best : best + 1], truth.shape))
            pred = torch.zeros_like(truth)
            pred[where] = mask > self.threshold
            pair = pred.cpu().numpy(), truth.cpu().numpy()
            for name, metric in self.metrics.items():
                if not isinstance(metric, FrocScore):
                    values[name].append(float(metric(*pair)))
        return {name: float(summarise(own)["mean"]) for name, own in values.items()}

    def _gather_cases(self) -> None:
        super()._gather_cases()
        for part in dict.fromkeys(c.part for c in self.cases):
            cases = [c for c in self.cases if c.part == part]
            views = view_table(cases)
            found, true = _tables(cases)
            for name, metric in self.metrics.items():
                if isinstance(metric, FrocScore):
                    for case, value in zip(cases, metric(found, true, views), strict=True):
                        case.metrics[name] = value

    def write_details(self, folder: Path, cases: list[Case]) -> None:
        """Write ``detections.csv`` and ``truths.csv``: boxes in voxels of each view's own grid."""
        found, true = _tables(cases)
        for name, table in (("detections", found), ("truths", true)):
            write_csv(folder / f"{name}.csv", table.to_dict("records"), list(table.columns))


def _tables(cases: Sequence[Case]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Detections and truths of all cases, see :mod:`medseg.detection.free_response`."""
    own = [c for c in cases if isinstance(c, DetectionCase)]
    found = [{"view": case.image, **row} for case in own for row in case.found]
    true = [{"view": case.image, **row} for case in own for row in case.true]
    columns = ["view", *BOX]
    return (
        pd.DataFrame(found, columns=[*columns, "score", "iou"]),
        pd.DataFrame(true, columns=[*columns, "mass"]),
    )


def _sizes(label: torch.Tensor) -> npt.NDArray[np.float64]:
    boxes = boxes_of(label).cpu().numpy().astype(float)
    sizes: npt.NDArray[np.float64] = boxes[:, 3:] - boxes[:, :3]
    return sizes


def _grid_of(image: Any) -> dict[str, float]:
    """What the hit rule ``bcs-dbt`` has to know of a view's own grid, in which its boxes are."""
    affine, shape = np.asarray(image.meta["native_affine"], float), np.asarray(image.meta["native_shape"])
    _, height, width = np.linalg.norm(affine[:3, :3], axis=0).round(6).tolist()
    return {"slices": int(shape[0]), "spacing_h": height, "spacing_w": width, "pixel_mm": width}


def _to_native(image: Any) -> Any:
    """From boxes on the network's grid to boxes in the voxels of the view's own grid."""
    affine, native = np.asarray(image.affine.cpu(), float), np.asarray(image.meta["native_affine"], float)

    def convert(boxes: torch.Tensor) -> npt.NDArray[np.float64]:
        return boxes_to_grid(boxes.cpu().numpy().astype(float), affine, native)

    return convert


def _packed(
    pred: torch.Tensor, truth: torch.Tensor
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], tuple[int, ...]]:
    return np.packbits(pred.cpu().numpy()), np.packbits(truth.cpu().numpy()), tuple(pred.shape)
