"""Attention-guided segmentation: the 3D-CRF that turns the decoder's probability into the final mask (paper, 2.2)."""

from __future__ import annotations

import torch
from torch import nn

from medseg.crf import DenseCRF3D

__all__ = ["MaskRefiner", "grey_levels"]


class MaskRefiner(nn.Module):
    """Refines foreground probabilities with a fully connected CRF on the subtomogram's grey levels.

    Args:
        crf: its intensity sigma is in grey levels 0 to 255, see :func:`grey_levels`.
    """

    def __init__(self, crf: DenseCRF3D) -> None:
        super().__init__()
        self.crf = crf

    def forward(self, probability: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
        """Refined probabilities.

        Args:
            probability: of the foreground, (B, 1, D, H, W) in [0, 1].
            volumes: the subtomograms, of the same shape, in any scale.

        Returns:
            The CRF's marginals of the foreground, (B, 1, D, H, W).
        """
        both = torch.cat([1 - probability, probability], dim=1)
        marginals: torch.Tensor = self.crf(both, grey_levels(volumes))
        return marginals[:, 1:]


def grey_levels(volumes: torch.Tensor) -> torch.Tensor:
    """Volumes (B, 1, D, H, W) as grey levels 0 to 255 between their 0.5th and 99.5th percentile.

    The authors' code takes minimum and maximum, so that a single bright voxel rescales the intensity sigma.
    """
    flat = volumes.flatten(1)
    low, high = (torch.quantile(flat, q, dim=1).view(-1, 1, 1, 1, 1) for q in (0.005, 0.995))
    return ((volumes - low) / (high - low).clamp(min=1e-12)).clamp(0, 1) * 255
