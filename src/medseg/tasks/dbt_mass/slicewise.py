"""The paper's 2D baselines: Mask R-CNN and Faster R-CNN on slices, their boxes linked to 3D candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_iou

from medseg.detection.nms import nms_3d
from medseg.detection.roi_heads import Detections

Tensor = torch.Tensor

#: (d, h, w) of the masks inside the boxes of candidates.
MASK_SIZE = (16, 28, 28)

__all__ = ["SliceWiseRCNN", "Tube", "link_slices"]


class SliceWiseRCNN(nn.Module):
    """torchvision's Mask R-CNN or Faster R-CNN on slices, with the interface of the 3D detector.

    Training draws a few slices of each volume, most of them with a mass. Detection goes through all slices and links
    their boxes (see :func:`link_slices`).

    Args:
        masks: Mask R-CNN if true, else Faster R-CNN, which gives no masks.
        spacing: (d, h, w) in mm of the volumes.
        depth: of the ResNet: 18, 34 or 50.
        encoder_weights: ``None``, or a name of torchvision's, e.g. ``DEFAULT``: fetched from the network.
        slices: drawn of each volume in training.
        with_mass: share of these that show a mass, where there is one.
        chunk: slices at a time in detection.
        score_threshold: lowest score of a box in a slice.
        anchor_sides: sides in voxels of the anchors of the five levels.
        shortest: length in mm that a candidate must have along the slices.
        candidates: 3D candidates of a volume at most.
        samples: regions of a slice that the second stage trains on (paper's Faster R-CNN: 256); torchvision's 512 make
            a step on a CPU several times as long.

    Source: the paper's baselines; how slices are merged it does not say (our choice, see :func:`link_slices`).
    """

    def __init__(
        self,
        masks: bool = True,
        spacing: Sequence[float] = (1.0, 0.424, 0.424),
        depth: int = 50,
        encoder_weights: str | None = None,
        slices: int = 2,
        with_mass: float = 0.75,
        chunk: int = 8,
        score_threshold: float = 0.05,
        anchor_sides: Sequence[float] = (16, 32, 64, 128, 256),
        shortest: float = 3.0,
        candidates: int = 20,
        samples: int = 256,
    ) -> None:
        super().__init__()
        from torchvision.models.detection.anchor_utils import AnchorGenerator

        backbone = resnet_fpn_backbone(
            backbone_name=f"resnet{depth}", weights=encoder_weights, trainable_layers=5, norm_layer=_group_norm
        )
        anchors = AnchorGenerator(tuple((float(s),) for s in anchor_sides), ((0.5, 1.0, 2.0),) * len(anchor_sides))
        build = MaskRCNN if masks else FasterRCNN
        self.detector = build(
            backbone, num_classes=2, rpn_anchor_generator=anchors, box_score_thresh=score_threshold,
            box_detections_per_img=10, rpn_pre_nms_top_n_train=4 * samples, rpn_post_nms_top_n_train=2 * samples,
            rpn_pre_nms_top_n_test=300, rpn_post_nms_top_n_test=100, box_batch_size_per_image=samples,
        )  # fmt: skip
        self.detector.transform = _AsTheyAre(1, 1, image_mean=[0.45] * 3, image_std=[0.25] * 3)
        self.with_masks, self.slices, self.with_mass, self.chunk = masks, slices, with_mass, chunk
        self.shortest = max(1, round(shortest / float(spacing[0])))
        self.candidates = candidates

    def forward(
        self, images: Tensor, targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses with targets, detections without; as :class:`medseg.detection.mask_rcnn.MaskRCNN3D`.

        Args:
            images: (B, 1, D, H, W).
            targets: of each volume ``boxes`` (n, 6) and ``masks`` (n, D, H, W), or ``masks`` ``None``.
        """
        if targets is None:
            return [self._detect(image[0]) for image in images]
        slices: list[Tensor] = []
        flat: list[dict[str, Tensor]] = []
        for image, target in zip(images, targets, strict=True):
            for d in self._draw(target["boxes"], image.shape[1]):
                slices.append(image[:, d].expand(3, -1, -1))
                flat.append(_slice_target(target, d, image.shape[2:]))
        losses: dict[str, Tensor] = self.detector(slices, flat)
        if any(target["masks"] is None for target in targets):
            losses.pop("loss_mask", None)  # a filled box is no mask
        return losses

    def _draw(self, boxes: Tensor, depth: int) -> list[int]:
        """Slices to train on."""
        shown = torch.zeros(depth, dtype=torch.bool)
        for box in boxes:
            shown[int(box[0]) : int(box[3])] = True
        rows = []
        for _ in range(self.slices):
            pool = torch.where(shown if torch.rand(()) < self.with_mass and shown.any() else torch.ones(depth) > 0)[0]
            rows.append(int(pool[torch.randint(len(pool), ())]))
        return rows

    def _detect(self, volume: Tensor) -> Detections:
        nothing = {"boxes": volume.new_zeros((0, 4)), "scores": volume.new_zeros(0)}
        found: list[dict[str, Tensor]] = [nothing] * len(volume)
        shown = torch.where(volume.flatten(1).any(dim=1))[0].tolist()  # padding shows nothing
        for first in range(0, len(shown), self.chunk):
            part = shown[first : first + self.chunk]
            for d, result in zip(part, self.detector([volume[d].expand(3, -1, -1) for d in part]), strict=True):
                found[d] = result
        tubes = [t for t in link_slices(found) if t.length >= self.shortest]
        if not tubes:
            return Detections(volume.new_zeros((0, 6)), volume.new_zeros(0), volume.new_zeros((0, *MASK_SIZE)))
        boxes, scores = torch.stack([t.box() for t in tubes]), torch.stack([t.score() for t in tubes])
        kept = nms_3d(boxes, scores, 0.2)[: self.candidates]
        masks = [self._mask(tubes[i], boxes[i], found) for i in kept.tolist()]
        return Detections(boxes[kept], scores[kept], torch.stack(masks))

    def _mask(self, tube: Tube, box: Tensor, found: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Masks of the slices of a candidate, in its box; without masks the whole box counts as one."""
        if not self.with_masks:
            return box.new_ones(MASK_SIZE)
        low, high = [int(v) for v in box[:3].floor()], [int(v) for v in box[3:].ceil()]
        whole = box.new_zeros([last - first for first, last in zip(low, high, strict=True)])
        for d, index in zip(tube.slices, tube.indices, strict=True):
            whole[d - low[0]] = found[d]["masks"][index, 0, low[1] : high[1], low[2] : high[2]]
        mask: Tensor = functional.interpolate(whole[None, None], MASK_SIZE, mode="trilinear")[0, 0]
        return mask


class _AsTheyAre(GeneralizedRCNNTransform):
    """Slices keep their size: torchvision's own ``_skip_resize`` holds in training only, in detection it enlarges."""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Leave image and target alone."""
        return image, target


@dataclass
class Tube:
    """Boxes of consecutive slices that belong together.

    Attributes:
        slices: their slices, rising.
        indices: which box of its slice each one is.
        boxes: (4,) x0, y0, x1, y1 of each.
        scores: of each.
    """

    slices: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Slices from the first to the last."""
        return self.slices[-1] - self.slices[0] + 1

    def box(self) -> Tensor:
        """(6,) d0, h0, w0, d1, h1, w1: all slices, and the median of their corners."""
        x0, y0, x1, y1 = torch.stack(self.boxes).median(dim=0).values
        ends = x0.new_tensor([self.slices[0], self.slices[-1] + 1])
        return torch.stack([ends[0], y0, x0, ends[1], y1, x1])

    def score(self) -> Tensor:
        """Mean of the highest third of the scores."""
        scores = torch.stack(self.scores).sort(descending=True).values
        return scores[: -(-len(scores) // 3)].mean()


def link_slices(found: Sequence[Mapping[str, Tensor]], iou_threshold: float = 0.5, gap: int = 2) -> list[Tube]:
    """Link the boxes of slices to tubes: our choice, the paper does not say how it counts 2D boxes in 3D.

    Slice by slice, the boxes by falling score each join the tube whose last box they overlap most, if by at least
    ``iou_threshold`` and if it ended at most ``gap`` empty slices before; else a new tube begins.

    Args:
        found: of each slice ``boxes`` (n, 4) x0, y0, x1, y1 and ``scores`` (n,).
        iou_threshold: IoU of two boxes of one tube.
        gap: slices without a box that a tube may have in between.
    """
    tubes: list[Tube] = []
    for d, result in enumerate(found):
        open_ = [t for t in tubes if 0 < d - t.slices[-1] <= gap + 1]
        for index in result["scores"].argsort(descending=True).tolist():
            box = result["boxes"][index]
            free = [t for t in open_ if t.slices[-1] < d]
            quality = box_iou(box[None], torch.stack([t.boxes[-1] for t in free]))[0] if free else None
            if quality is not None and float(quality.max()) >= iou_threshold:
                tube = free[int(quality.argmax())]
            else:
                tube = Tube()
                tubes.append(tube)
            tube.slices.append(d)
            tube.indices.append(index)
            tube.boxes.append(box)
            tube.scores.append(result["scores"][index])
    return tubes


def _slice_target(target: Mapping[str, Any], d: int, shape: Sequence[int]) -> dict[str, Tensor]:
    """Boxes, labels and masks of one slice of a volume's target."""
    known = target["masks"]
    whole = _filled(target["boxes"], d, shape) if known is None else known[:, d]
    masks = whole[whole.flatten(1).any(dim=1)]
    boxes = []
    for mask in masks:
        rows, columns = torch.nonzero(mask, as_tuple=True)
        boxes.append(torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
    found = torch.stack(boxes).float() if boxes else torch.zeros((0, 4), device=masks.device)
    labels = torch.ones(len(masks), dtype=torch.long, device=masks.device)
    return {"boxes": found, "labels": labels, "masks": masks.to(torch.uint8)}


def _filled(boxes: Tensor, d: int, shape: Sequence[int]) -> Tensor:
    masks = torch.zeros((len(boxes), *shape), dtype=torch.bool, device=boxes.device)
    for mask, box in zip(masks, boxes, strict=True):
        if box[0] <= d < box[3]:
            mask[int(box[1]) : int(box[4]), int(box[2]) : int(box[5])] = True
    return masks


def _group_norm(channels: int) -> nn.Module:
    """Batches of a few slices from scratch: group instead of batch normalisation."""
    return nn.GroupNorm(min(32, channels // 4), channels)
