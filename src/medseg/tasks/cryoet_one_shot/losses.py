"""The loss of an episode, equations (14)-(16)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["EpisodeLoss"]


class EpisodeLoss(nn.Module):
    """Binary cross-entropy of all pairs plus the mask loss of both streams.

    Args:
        mask_loss: of logits and masks (V, 1, D, H, W), averaged over the volumes; it counts twice, once for each
            stream, as in (15).
        positive_weight: weight of the matching pairs; ``None`` takes n - 1, the number of the others beside each.
        match: ``sigmoid`` judges every pair by itself (14); ``softmax`` is the cross-entropy over the n structures
            of a target (8).
    """

    def __init__(self, mask_loss: nn.Module, positive_weight: float | None = None, match: str = "sigmoid") -> None:
        super().__init__()
        if match not in ("sigmoid", "softmax"):
            raise ValueError(f"match is {match!r}; choose from sigmoid, softmax")
        self.mask_loss, self.positive_weight, self.match = mask_loss, positive_weight, match

    def forward(self, scores: torch.Tensor, logits: torch.Tensor | None, masks: torch.Tensor) -> torch.Tensor:
        """Loss of several episodes.

        Args:
            scores: match logits (E, n, n) of targets and supports; the diagonal matches.
            logits: mask logits (V, 1, D, H, W) of all volumes of both streams; ``None`` without a decoder.
            masks: their true masks, 0 or 1.
        """
        loss = self.matching(scores)
        return loss if logits is None else loss + 2 * self.mask_loss(logits, masks)

    def matching(self, scores: torch.Tensor) -> torch.Tensor:
        """Loss of the match logits (E, n, n) alone."""
        ways = scores.shape[-1]
        if self.match == "softmax":
            own = torch.arange(ways, device=scores.device).expand(scores.shape[:-1])
            return functional.cross_entropy(scores.flatten(0, -2), own.flatten())
        weight = float(ways - 1) if self.positive_weight is None else self.positive_weight
        truth = torch.eye(ways, device=scores.device, dtype=scores.dtype).expand_as(scores)
        return functional.binary_cross_entropy_with_logits(scores, truth, pos_weight=scores.new_tensor(weight))
