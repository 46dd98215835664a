"""Several networks as one: the mean of their probabilities, given back as logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS = ("sigmoid", "softmax")

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """Averages the probabilities of networks with the same inputs and outputs, e.g. those of the folds.

    Its output are logits again, so that inferer, post-processing and calibration treat it as one network.

    Args:
        networks: each maps images (B, C, ...) to logits (B, K, ...).
        activation: how their logits become probabilities: ``sigmoid`` per channel, ``softmax`` over the channels.

    Raises:
        ValueError: without networks or with an unknown activation.
    """

    def __init__(self, networks: Sequence[nn.Module], activation: str = "sigmoid") -> None:
        super().__init__()
        if not networks:
            raise ValueError("an ensemble needs at least one network")
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
        self.networks, self.activation = nn.ModuleList(networks), activation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, ...) of the mean probability; computed from logarithms, exact where probabilities saturate."""
        logits = torch.stack([network(images).float() for network in self.networks])
        if self.activation == "softmax":
            return functional.log_softmax(logits, dim=2).logsumexp(dim=0) - math.log(len(logits))
        return functional.logsigmoid(logits).logsumexp(dim=0) - functional.logsigmoid(-logits).logsumexp(dim=0)
