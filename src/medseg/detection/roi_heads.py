"""The second stage of a 3D Mask R-CNN: class, box and mask of each region of interest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data.box_utils import box_iou
from torch import nn
from torch.nn import functional

from medseg.detection.heads import BoxHead, MaskHead, Size
from medseg.detection.nms import nms_3d
from medseg.detection.region_proposal import Proposals, box_coder, clip_boxes
from medseg.detection.roi_align import roi_align_3d

Tensor = torch.Tensor

__all__ = ["Detections", "RoIHeads", "RoISettings"]


@dataclass(frozen=True)
class RoISettings:
    """How the second stage samples, pools and selects.

    Attributes:
        box_size: (d, h, w) that the box head sees of a region.
        mask_size: (d, h, w) that the mask head sees; its masks are twice as large.
        samples: regions of an image in training (paper: 32 in a mini-batch).
        positives: largest number of positive ones (paper: 3 : 2, that is 19 of 32).
        positive_iou: a region from this IoU on is positive.
        negative_iou: below this it is negative; in between it is left out.
        jittered: copies of each true box, moved and resized at random, among the regions: with one mass in a patch
            there would never be 19 positive ones.
        jitter: standard deviation of that, as a share of the box's size.
        hard_negatives: so many negatives are the highest-scoring ones, the others are drawn.
        mask_samples: positive regions of an image that the mask loss is taken over.
        refinements: how often inference puts a box through the box head again.
        nms_threshold: IoU above which the lower-scoring one of two detections goes.
        score_threshold: lowest score of a detection.
        detections: of an image at most.
        box_weight: weight of the box loss.
        mask_share: how far inference moves a box to the box of its mask, in [0, 1]: 0.5 is half-way.
        finest: pool from the finest level only, not from the one that fits the region's size.
    """

    box_size: Size = (3, 7, 7)
    mask_size: Size = (7, 14, 14)
    samples: int = 32
    positives: int = 19
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    jittered: int = 8
    jitter: float = 0.08
    hard_negatives: int = 8
    mask_samples: int = 8
    refinements: int = 1
    nms_threshold: float = 0.2
    score_threshold: float = 0.02
    detections: int = 20
    box_weight: float = 2.0
    mask_share: float = 0.0
    finest: bool = False


@dataclass(frozen=True)
class Detections:
    """What is found in one image.

    Attributes:
        boxes: (N, 6).
        scores: (N,), falling.
        masks: (N, d, h, w) probabilities inside the boxes.
    """

    boxes: Tensor
    scores: Tensor
    masks: Tensor


class RoIHeads(nn.Module):
    """Samples or selects regions, pools their features and gives class, box and mask.

    Args:
        channels: of the feature maps.
        settings: sampling, pooling and selection.
        box_convolutions: strides of the box head's convolutions.
        box_hidden: width of its linear layers.
        mask_hidden: channels of the mask head.
        mask_convolutions: number of its convolutions.

    Source: K. He et al., Mask R-CNN, 2020, in 3D.
    """

    def __init__(
        self,
        channels: int,
        settings: RoISettings | None = None,
        box_convolutions: Sequence[int] = (1, 2),
        box_hidden: int = 256,
        mask_hidden: int = 128,
        mask_convolutions: int = 4,
    ) -> None:
        super().__init__()
        self.settings = settings or RoISettings()
        self.box_head = BoxHead(channels, self.settings.box_size, box_convolutions, box_hidden)
        self.mask_head = MaskHead(channels, mask_hidden, mask_convolutions)
        self.coder = box_coder()

    def losses(
        self,
        images: Tensor,
        features: Sequence[Tensor],
        proposals: Sequence[Proposals],
        targets: Sequence[Mapping[str, Any]],
    ) -> dict[str, Tensor]:
        """Losses over sampled regions.

        Args:
            images: (B, 1, D, H, W); only the shape counts.
            features: (B, C, d, h, w) of each level.
            proposals: of each image.
            targets: ``boxes`` (n, 6) and, if masks are known, ``masks`` (n, D, H, W) of each image.

        Returns:
            ``roi_class``, ``roi_box`` and, if there is a mask to learn from, ``roi_mask``.
        """
        rois, labels, matched = [], [], []
        for proposal, target in zip(proposals, targets, strict=True):
            boxes, label, index = self._sample(proposal, target["boxes"], images.shape[2:])
            rois.append(boxes)
            labels.append(label)
            matched.append(index)
        logits, deltas = self.box_head(self._pool(images, features, rois, self.settings.box_size))
        label = torch.cat(labels)
        true = [t["boxes"] for t in targets]
        truth = torch.cat([t[m] if len(t) else r for t, m, r in zip(true, matched, rois, strict=True)])
        wanted = self.coder.encode_single(truth, torch.cat(rois))
        box = functional.smooth_l1_loss(deltas[label].float(), wanted[label], beta=0.1, reduction="sum")
        found = {
            # a mean over no region at all would be nan
            "roi_class": functional.cross_entropy(logits.float(), label.long(), reduction="sum") / max(1, len(label)),
            "roi_box": self.settings.box_weight * box / max(1, int(label.sum()) * 6),
        }
        positive = [roi[i][: self.settings.mask_samples] for roi, i in zip(rois, labels, strict=True)]
        whose = [m[i][: self.settings.mask_samples] for m, i in zip(matched, labels, strict=True)]
        with_masks = [i for i, t in enumerate(targets) if t.get("masks") is not None and len(positive[i])]
        if with_masks:
            found["roi_mask"] = self._mask_loss(images, features, positive, whose, targets, with_masks)
        return found

    def detect(self, images: Tensor, features: Sequence[Tensor], proposals: Sequence[Proposals]) -> list[Detections]:
        """Detections of each image from its proposals; a score is the root of box score times proposal score."""
        boxes = [p.boxes for p in proposals]
        counts = [len(b) for b in boxes]
        scores = torch.empty(0)
        for _ in range(self.settings.refinements + 1):
            logits, deltas = self.box_head(self._pool(images, features, boxes, self.settings.box_size))
            scores = logits.float().softmax(dim=1)[:, 1]
            moved = self.coder.decode_single(deltas.float().clamp(-4, 4), torch.cat(boxes))
            boxes = list(torch.split(clip_boxes(moved, images.shape[2:]), counts))
        kept = [
            self._select(b, (s * p.scores.clamp(min=0)).sqrt())
            for b, s, p in zip(boxes, torch.split(scores, counts), proposals, strict=True)
        ]
        masks = self.mask_head(self._pool(images, features, [b for b, _ in kept], self.settings.mask_size))
        probabilities = torch.split(masks.float().sigmoid()[:, 0], [len(b) for b, _ in kept])
        share = self.settings.mask_share
        found = []
        for (b, s), mask in zip(kept, probabilities, strict=True):
            moved, reframed = moved_to_masks(b, mask, share)
            found.append(Detections(moved, s, reframed))
        return found

    def _select(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.isfinite(scores).all():  # NaN would sort as the highest score
            raise ValueError("the scores of the detections are not finite; did the training diverge?")
        good = (scores >= self.settings.score_threshold) & ((boxes[:, 3:] - boxes[:, :3]) >= 1).all(dim=1)
        boxes, scores = boxes[good], scores[good]
        keep = nms_3d(boxes, scores, self.settings.nms_threshold)[: self.settings.detections]
        return boxes[keep], scores[keep]

    def _sample(self, proposals: Proposals, truth: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Regions (n, 6) of one image, whether each is positive, and the index of its true box."""
        settings = self.settings
        boxes = torch.cat([proposals.boxes, *self._around(truth, shape)])
        if not len(truth):
            negative = self._negatives(torch.arange(len(boxes), device=boxes.device), settings.samples)
            zeros = torch.zeros(len(negative), dtype=torch.long, device=boxes.device)
            return boxes[negative], zeros.bool(), zeros
        quality, match = box_iou(boxes, truth).max(dim=1)
        positive = torch.where(quality >= settings.positive_iou)[0]
        positive = positive[torch.randperm(len(positive), device=boxes.device)[: settings.positives]]
        negative = torch.where(quality < settings.negative_iou)[0]
        # as many as the 3 : 2 of the paper leaves beside the positives that there are, at least a dozen or so
        negative = self._negatives(negative, settings.samples - settings.positives)
        chosen = torch.cat([positive, negative])
        label = torch.zeros(len(chosen), dtype=torch.bool, device=boxes.device)
        label[: len(positive)] = True
        return boxes[chosen], label, match[chosen]

    def _negatives(self, candidates: Tensor, count: int) -> Tensor:
        """The highest-scoring ones and a random draw of the others: candidates come in falling order."""
        hard = candidates[: self.settings.hard_negatives]
        others = candidates[self.settings.hard_negatives :]
        drawn = others[torch.randperm(len(others), device=others.device)[: max(0, count - len(hard))]]
        return torch.cat([hard, drawn])[:count]

    def _around(self, truth: Tensor, shape: Sequence[int]) -> list[Tensor]:
        if not len(truth):
            return []
        copies = truth.repeat(self.settings.jittered, 1)
        sizes = (copies[:, 3:] - copies[:, :3]).repeat(1, 2)
        moved = clip_boxes(copies + self.settings.jitter * sizes * torch.randn_like(copies), shape)
        large = ((moved[:, 3:] - moved[:, :3]) >= 1).all(dim=1)
        return [truth, moved[large]]

    def _mask_loss(
        self,
        images: Tensor,
        features: Sequence[Tensor],
        rois: list[Tensor],
        matched: list[Tensor],
        targets: Sequence[Mapping[str, Any]],
        with_masks: list[int],
    ) -> Tensor:
        used = [rois[i] if i in with_masks else rois[i][:0] for i in range(len(rois))]
        logits = self.mask_head(self._pool(images, features, used, self.settings.mask_size))[:, 0]
        wanted = []
        for i in with_masks:
            masks = targets[i]["masks"][:, None].float()
            picked = torch.cat([matched[i][:, None].to(rois[i].dtype), rois[i]], dim=1)
            wanted.append(roi_align_3d(masks, picked, tuple(logits.shape[1:]))[:, 0] >= 0.5)
        return functional.binary_cross_entropy_with_logits(logits.float(), torch.cat(wanted).float())

    def _pool(self, images: Tensor, features: Sequence[Tensor], boxes: Sequence[Tensor], size: Size) -> Tensor:
        """Features (N, C, *size) of the boxes of all images, each from its level of the pyramid."""
        index = torch.cat([torch.full((len(b), 1), i, dtype=b.dtype, device=b.device) for i, b in enumerate(boxes)])
        rois = torch.cat([index, torch.cat(list(boxes))], dim=1)
        levels = self._levels(rois[:, 1:], len(features))
        pooled = features[0].new_zeros((len(rois), features[0].shape[1], *size))
        for level, feature in enumerate(features):
            here = torch.where(levels == level)[0]
            if len(here):
                scale = tuple(f / i for f, i in zip(feature.shape[2:], images.shape[2:], strict=True))
                pooled = pooled.index_copy(0, here, roi_align_3d(feature, rois[here], size, scale))
        return pooled

    def _levels(self, boxes: Tensor, count: int) -> Tensor:
        """Level of each box, 0 the finest: 1 from a mean side of 28 voxels on, and one more for each doubling."""
        if self.settings.finest:
            return torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        side = (boxes[:, 3:] - boxes[:, :3]).clamp(min=1e-3).prod(dim=1) ** (1 / 3)
        return torch.floor(2 + torch.log2(side / 56)).clamp(0, count - 1).long()


def moved_to_masks(boxes: Tensor, masks: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Boxes moved part of the way to the boxes of their masks, and the masks in these frames.

    Args:
        boxes: (N, 6).
        masks: (N, d, h, w) probabilities inside the boxes; one that nowhere reaches 0.5 leaves its box.
        share: part of the way, in [0, 1].
    """
    if share <= 0 or not len(boxes):
        return boxes, masks
    ends = []
    for axis in range(3):
        filled = (masks >= 0.5).movedim(axis + 1, 1).flatten(2).any(dim=2).float()
        count = filled.shape[1]
        first = filled.argmax(dim=1) / count
        last = 1 - filled.flip(1).argmax(dim=1) / count
        ends.append((first, last))
    fractions = torch.stack([low for low, _ in ends] + [high for _, high in ends], dim=1)
    whole = fractions.new_tensor([0.0, 0, 0, 1, 1, 1])
    fractions = whole + share * (fractions - whole)
    sizes = (boxes[:, 3:] - boxes[:, :3]).repeat(1, 2)
    grid_axes = [_places(fractions[:, a], fractions[:, a + 3], masks.shape[a + 1]) for a in range(3)]
    grids = [torch.stack(torch.meshgrid(*own, indexing="ij")[::-1], dim=-1) for own in zip(*grid_axes, strict=True)]
    reframed = functional.grid_sample(masks[:, None], torch.stack(grids), align_corners=False, padding_mode="border")
    return boxes[:, :3].repeat(1, 2) + fractions * sizes, reframed[:, 0]


def _places(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Centres of ``count`` cells between two fractions (N,) of an axis, from -1 to 1."""
    centres = (torch.arange(count, device=low.device, dtype=low.dtype) + 0.5) / count
    return 2 * (low[:, None] + centres * (high - low)[:, None]) - 1
