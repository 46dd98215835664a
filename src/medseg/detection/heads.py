"""The small networks that look at a region of interest: one for class and box, one for the mask."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

Tensor = torch.Tensor
Size = tuple[int, int, int]

__all__ = ["BoxHead", "MaskHead", "Size", "he_initialised"]


class BoxHead(nn.Module):
    """Class logits (N, 2) and box deltas (N, 6) of pooled regions (N, C, d, h, w).

    Args:
        channels: of the regions.
        size: (d, h, w) of the regions.
        convolutions: strides of the 3 x 3 x 3 convolutions before the linear layers.
        hidden: width of the two linear layers.
    """

    def __init__(self, channels: int, size: Size, convolutions: Sequence[int], hidden: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stride in convolutions:
            layers += [nn.Conv3d(channels, channels, 3, stride, padding=1), nn.ReLU(inplace=True)]
            size = (-(-size[0] // stride), -(-size[1] // stride), -(-size[2] // stride))
        widths = [channels * size[0] * size[1] * size[2], hidden, hidden]
        layers.append(nn.Flatten())
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.classes, self.deltas = nn.Linear(hidden, 2), nn.Linear(hidden, 6)
        he_initialised(self.layers)
        nn.init.normal_(self.classes.weight, std=0.01)
        nn.init.normal_(self.deltas.weight, std=0.001)
        nn.init.zeros_(self.classes.bias)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (N, 2) and box deltas (N, 6)."""
        hidden = self.layers(regions)
        return self.classes(hidden), self.deltas(hidden)


class MaskHead(nn.Sequential):
    """Mask logits (N, 1, 2d, 2h, 2w) of pooled regions (N, C, d, h, w).

    Args:
        channels: of the regions.
        hidden: channels of the convolutions.
        convolutions: how many there are before the transposed one.
    """

    def __init__(self, channels: int, hidden: int, convolutions: int) -> None:
        layers: list[nn.Module] = []
        for i in range(convolutions):
            layers += [nn.Conv3d(hidden if i else channels, hidden, 3, padding=1), nn.ReLU(inplace=True)]
        layers += [nn.ConvTranspose3d(hidden, hidden, 2, stride=2), nn.ReLU(inplace=True), nn.Conv3d(hidden, 1, 1)]
        super().__init__(*layers)
        he_initialised(self)


def he_initialised(module: nn.Module) -> None:
    """Give convolutions and linear layers He's initialisation (paper: "He initialisation")."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv3d, nn.ConvTranspose3d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
