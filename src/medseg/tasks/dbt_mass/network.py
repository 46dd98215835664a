"""3D Mask R-CNN in the size of the paper, or thin; its 2D baselines are in :mod:`medseg.tasks.dbt_mass.slicewise`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.networks.blocks.backbone_fpn_utils import BackboneWithFPN
from monai.networks.nets.resnet import ResNet
from torch import nn

from medseg.detection.anchors import fit_anchors
from medseg.detection.mask_rcnn import MaskRCNN3D
from medseg.detection.region_proposal import ProposalSettings, RegionProposalNetwork
from medseg.detection.roi_heads import RoIHeads, RoISettings

#: Depth of the ResNets: block, and blocks of each of the four layers.
RESNETS = {10: ("basic", (1, 1, 1, 1)), 18: ("basic", (2, 2, 2, 2)), 50: ("bottleneck", (3, 4, 6, 3))}

#: Anchors before they are fitted: cubes of these sides in mm, two to a level.
SIDES = (10.0, 16.0, 24.0, 36.0, 54.0, 80.0, 110.0, 140.0)

__all__ = ["MassRCNN3D", "resnet_fpn"]


class MassRCNN3D(MaskRCNN3D):
    """3D Mask R-CNN with a ResNet and a feature pyramid; the defaults are the paper's size, 52.8 million parameters.

    Args:
        spacing: (d, h, w) in mm of the volumes: anchors are given in mm.
        depth: of the ResNet: 10, 18 or 50.
        widths: channels of its four layers (of the bottleneck's inner convolutions at depth 50).
        fpn_channels: channels of the pyramid.
        max_pool: whether the stem ends with a max-pool. Without it the finest map is that of the second layer, on the
            same grid: half the slices, a quarter of the rows and columns.
        stem: kernel size of the first convolution; its stride is (1, 2, 2).
        norm: of the backbone: MONAI's name and arguments.
        anchors_per_level: sizes of anchors at each place.
        proposals: changes to :class:`~medseg.detection.region_proposal.ProposalSettings`.
        regions: changes to :class:`~medseg.detection.roi_heads.RoISettings`.
        box_convolutions: strides of the box head's convolutions.
        box_hidden: width of its linear layers.
        mask_hidden: channels of the mask head.
        mask_convolutions: number of its convolutions.

    Raises:
        ValueError: if the depth is unknown.

    Source: the paper's Figure 1 and Table 5 (5.27e7 parameters). It names ResNet-50-C4 and ResNet-FPN and nothing more;
    this is design A of our digest: P2 to P5 with 128 channels.
    """

    def __init__(
        self,
        spacing: Sequence[float] = (1.0, 0.424, 0.424),
        depth: int = 50,
        widths: Sequence[int] = (64, 128, 256, 512),
        fpn_channels: int = 128,
        max_pool: bool = True,
        stem: int = 7,
        norm: str | tuple[str, dict[str, Any]] = "batch",
        anchors_per_level: int = 3,
        proposals: dict[str, Any] | None = None,
        regions: dict[str, Any] | None = None,
        box_convolutions: Sequence[int] = (1, 2),
        box_hidden: int = 256,
        mask_hidden: int = 128,
        mask_convolutions: int = 4,
    ) -> None:
        backbone = resnet_fpn(depth, widths, fpn_channels, max_pool, stem, norm)
        levels = 4 if max_pool else 3
        self.spacing = tuple(float(s) for s in spacing)
        sides = torch.tensor(SIDES)[torch.linspace(0, len(SIDES) - 1, levels * anchors_per_level).round().long()]
        first = (sides[:, None] / torch.tensor(self.spacing)).reshape(levels, anchors_per_level, 3)
        heads: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in (regions or {}).items()}
        settings = replace(RoISettings(), **heads)
        super().__init__(
            backbone,
            RegionProposalNetwork(fpn_channels, first, replace(ProposalSettings(), **(proposals or {}))),
            RoIHeads(fpn_channels, settings, box_convolutions, box_hidden, mask_hidden, mask_convolutions),
        )

    def fit_anchors(self, sizes: npt.NDArray[np.float64]) -> None:
        """Take the anchors that fit these box sizes (n, 3) in voxels best: the smallest ones on the finest level.

        Raises:
            ValueError: if there are fewer sizes than anchors.
        """
        shape = self.proposals.anchors.shape
        try:
            fitted = fit_anchors(sizes, shape[0] * shape[1])
        except ValueError as error:
            raise ValueError(f"no anchors fit the training masses: {error} (--anchors_per_level)") from error
        self.proposals.set_anchors(fitted.reshape(shape))


def resnet_fpn(
    depth: int,
    widths: Sequence[int],
    channels: int,
    max_pool: bool,
    stem: int,
    norm: str | tuple[str, dict[str, Any]],
) -> nn.Module:
    """A 3D ResNet with a feature pyramid on strides (2, 4, 4), (4, 8, 8), (8, 16, 16) and, with max-pool, (16, 32, 32).

    Args: as of :class:`MassRCNN3D`.
    """
    if depth not in RESNETS:
        raise ValueError(f"depth is {depth}; choose from {', '.join(map(str, RESNETS))}")
    block, layers = RESNETS[depth]
    body = ResNet(
        block=block, layers=list(layers), block_inplanes=list(widths), n_input_channels=1, conv1_t_size=stem,
        conv1_t_stride=(1, 2, 2), no_max_pool=not max_pool, feed_forward=False, bias_downsample=False,
        norm=tuple(norm) if isinstance(norm, list) else norm,
    )  # fmt: skip
    if not max_pool:
        body.maxpool = nn.Identity()  # the feature extractor runs every child, whatever its forward would do
    used = (1, 2, 3, 4) if max_pool else (2, 3, 4)
    expansion = 4 if block == "bottleneck" else 1
    pyramid: nn.Module = BackboneWithFPN(
        body,
        {f"layer{i}": str(n) for n, i in enumerate(used)},
        [widths[i - 1] * expansion for i in used],
        channels,
        extra_blocks=None,
    )
    return pyramid
