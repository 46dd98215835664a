"""Mask R-CNN in 3D: a backbone with a feature pyramid, region proposals, and heads for class, box and mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from medseg.detection.region_proposal import RegionProposalNetwork
from medseg.detection.roi_heads import Detections, RoIHeads

__all__ = ["MaskRCNN3D"]


class MaskRCNN3D(nn.Module):
    """A two-stage detector of one class of object in volumes, called as torchvision's detectors are.

    Args:
        backbone: from images (B, 1, D, H, W) to a dictionary of feature maps, finest first, all with the same channels;
            e.g. MONAI's ``BackboneWithFPN``.
        proposals: the first stage.
        heads: the second stage.

    Source: Fan et al. (see the bundle's references), Figure 1.
    """

    def __init__(self, backbone: nn.Module, proposals: RegionProposalNetwork, heads: RoIHeads) -> None:
        super().__init__()
        self.backbone, self.proposals, self.heads = backbone, proposals, heads

    def forward(
        self, images: torch.Tensor, targets: Sequence[Mapping[str, Any]] | None = None
    ) -> dict[str, torch.Tensor] | list[Detections]:
        """Losses with targets, detections without.

        Args:
            images: (B, 1, D, H, W); sides are multiples of the coarsest stride.
            targets: of each image ``boxes`` (n, 6) in voxels and ``masks`` (n, D, H, W), or ``masks`` ``None`` where
                only boxes are known.

        Returns:
            With targets the losses by name; their sum is minimised. Without, the detections of each image.

        Raises:
            ValueError: if there are not as many feature maps as levels of anchors, or the network gives NaN.
        """
        features = list(self.backbone(images).values())
        levels = len(self.proposals.anchors)
        if len(features) < levels:
            raise ValueError(f"the backbone gives {len(features)} feature maps and there are anchors for {levels}")
        features = features[:levels]
        truths = None if targets is None else [target["boxes"] for target in targets]
        proposals, losses = self.proposals(images, features, truths)
        if targets is None:
            detections: list[Detections] = self.heads.detect(images, features, proposals)
            return detections
        return {**losses, **self.heads.losses(images, features, proposals, targets)}
