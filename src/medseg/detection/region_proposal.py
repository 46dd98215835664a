"""The region proposal network of a 3D detector: where there may be something, and how large it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.apps.detection.utils.hard_negative_sampler import HardNegativeSampler
from torch import nn
from torch.nn import functional

from medseg.detection.nms import nms_3d

Tensor = torch.Tensor

__all__ = ["ProposalSettings", "Proposals", "RegionProposalNetwork", "box_coder", "clip_boxes"]


@dataclass(frozen=True)
class ProposalSettings:
    """How many proposals there are, and what the network learns from.

    Attributes:
        samples: anchors of an image that the losses are taken over.
        positive_fraction: largest share of positive ones among them.
        min_negatives: negative ones at least, so that an image without an object teaches something.
        pool_size: negatives are drawn from so many times as many of the highest-scoring ones.
        candidates: boxes of an image, over all levels, that enter the non-maximum suppression.
        nms_threshold: IoU above which the lower-scoring one of two goes.
        kept_train: proposals of an image in training.
        kept: the same in inference.
        box_weight: weight of the box loss.
    """

    samples: int = 64
    positive_fraction: float = 1 / 3
    min_negatives: int = 16
    pool_size: float = 10
    candidates: int = 400
    nms_threshold: float = 0.6
    kept_train: int = 64
    kept: int = 48
    box_weight: float = 2.0


@dataclass(frozen=True)
class Proposals:
    """Proposals of one image.

    Attributes:
        boxes: (N, 6), within the image.
        scores: (N,), probabilities of the objectness, falling.
    """

    boxes: Tensor
    scores: Tensor


class RegionProposalNetwork(nn.Module):
    """Objectness and box of every anchor, with one head for all levels of the pyramid.

    Args:
        channels: of the feature maps.
        anchors: (levels, A, 3) sizes d, h, w in voxels. A buffer: weights bring their anchors along.
        settings: numbers of samples and proposals.

    Source: S. Ren et al., Faster R-CNN, 2017, section 3; anchors are matched by ATSS (S. Zhang et al., 2020).
    """

    anchors: Tensor

    def __init__(self, channels: int, anchors: Any, settings: ProposalSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or ProposalSettings()
        sizes = torch.as_tensor(anchors, dtype=torch.float32)
        if sizes.ndim != 3 or sizes.shape[-1] != 3 or not bool((sizes > 0).all()):
            raise ValueError(f"anchors are {tuple(sizes.shape)}; give positive sizes (levels, anchors, 3) in voxels")
        self.register_buffer("anchors", sizes)
        count = sizes.shape[1]
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv3d(channels, count, 1)
        self.deltas = nn.Conv3d(channels, 6 * count, 1)
        self.matcher = ATSSMatcher(num_candidates=4, center_in_gt=False)
        self.sampler = HardNegativeSampler(
            self.settings.samples, self.settings.positive_fraction, self.settings.min_negatives, self.settings.pool_size
        )
        self.coder = box_coder()
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias if self.conv.bias is not None else torch.empty(0))
        for layer in (self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
        nn.init.constant_(self.objectness.bias if self.objectness.bias is not None else torch.empty(0), -3.0)

    def set_anchors(self, sizes: Any) -> None:
        """Take other anchor sizes (levels, A, 3) in voxels, as many as there are."""
        new = torch.as_tensor(sizes, dtype=torch.float32, device=self.anchors.device)
        if new.shape != self.anchors.shape:
            raise ValueError(f"anchors are {tuple(new.shape)}; this network has {tuple(self.anchors.shape)}")
        self.anchors.copy_(new)

    def forward(
        self, images: Tensor, features: Sequence[Tensor], truths: Sequence[Tensor] | None = None
    ) -> tuple[list[Proposals], dict[str, Tensor]]:
        """Proposals of each image and, with truths, the losses.

        Args:
            images: (B, 1, D, H, W); only the shape counts.
            features: (B, C, d, h, w) of each level.
            truths: boxes (n, 6) of each image.

        Returns:
            Proposals of each image; ``rpn_objectness`` and ``rpn_box`` if truths are given.
        """
        logits, deltas = self._heads(features)
        anchors, per_level = self._anchors(images, features)
        losses = {} if truths is None else self._losses(logits, deltas, anchors, per_level, truths)
        with torch.no_grad():
            shape = images.shape[2:]
            found = [self._propose(logit, delta, anchors, shape) for logit, delta in zip(logits, deltas, strict=True)]
        return found, losses

    def _heads(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and box deltas (B, K, 6) of all K anchors, in the order of :meth:`_anchors`."""
        logits, deltas = [], []
        for feature in features:
            hidden = functional.relu(self.conv(feature))
            logits.append(self.objectness(hidden).movedim(1, -1).flatten(1))
            delta = self.deltas(hidden).movedim(1, -1)
            deltas.append(delta.reshape(len(delta), -1, 6))
        # boxes lose half a voxel at a size of 256 in half precision
        return torch.cat(logits, dim=1).float(), torch.cat(deltas, dim=1).float()

    def _anchors(self, images: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        generator = AnchorGeneratorWithAnchorShape((1,) * len(self.anchors), self.anchors[0].tolist())
        generator.cell_anchors = [torch.cat([-sizes / 2, sizes / 2], dim=1) for sizes in self.anchors]
        shapes = [feature.detach().float() for feature in features]
        anchors: Tensor = generator(images[:1], shapes)[0]
        return anchors, [feature.shape[2:].numel() for feature in features]

    def _losses(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor, per_level: list[int], truths: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        labels, matched = [], []
        for boxes in truths:
            match = torch.full((len(anchors),), -1, device=anchors.device)
            if len(boxes):
                _, match = self.matcher.compute_matches(boxes, anchors, per_level, self.anchors.shape[1])
            labels.append((match >= 0).float())
            matched.append(match)
        positive, negative = self.sampler(labels, logits.detach().sigmoid().flatten())
        is_positive = torch.stack(positive).bool()
        sampled = is_positive | torch.stack(negative).bool()
        objectness = functional.binary_cross_entropy_with_logits(logits[sampled], torch.stack(labels)[sampled])
        box = deltas.new_zeros(())
        for own, boxes, match, chosen in zip(deltas, truths, matched, is_positive, strict=True):
            if chosen.any():  # of the many anchors only these few are encoded
                wanted = self.coder.encode_single(boxes[match[chosen]], anchors[chosen])
                box = box + functional.smooth_l1_loss(own[chosen], wanted, beta=0.1, reduction="sum")
        box = box / max(1, int(is_positive.sum()) * 6)
        return {"rpn_objectness": objectness, "rpn_box": self.settings.box_weight * box}

    def _propose(self, logits: Tensor, deltas: Tensor, anchors: Tensor, shape: Sequence[int]) -> Proposals:
        if not torch.isfinite(logits).all():
            raise ValueError("the scores of the proposals are not finite; did the training diverge?")
        kept = self.settings.kept_train if self.training else self.settings.kept
        scores, order = logits.sigmoid().topk(min(self.settings.candidates, len(logits)))
        boxes = clip_boxes(self.coder.decode_single(deltas[order].clamp(-4, 4), anchors[order]), shape)
        large = ((boxes[:, 3:] - boxes[:, :3]) >= 1).all(dim=1)
        boxes, scores = boxes[large], scores[large]
        keep = nms_3d(boxes, scores, self.settings.nms_threshold)[:kept]
        return Proposals(boxes[keep], scores[keep])


def box_coder() -> BoxCoder:
    """Boxes (6) as offsets of a reference box: centre in its sizes, logarithm of the sizes."""
    return BoxCoder(weights=(1.0,) * 6, boxes_xform_clip=math.log(8.0))


def clip_boxes(boxes: Tensor, shape: Sequence[int]) -> Tensor:
    """Boxes (N, 6) cut at the edges of an image of shape (D, H, W)."""
    limit = torch.as_tensor([*shape, *shape], dtype=boxes.dtype, device=boxes.device)
    return torch.minimum(boxes.clamp(min=0), limit)
