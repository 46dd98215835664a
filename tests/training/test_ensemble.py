from __future__ import annotations

import pytest
import torch
from torch import nn

from medseg.training.ensemble import Ensemble


def networks(count: int, channels: int = 1) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Conv2d(1, channels, 3, padding=1) for _ in range(count)]


def test_sigmoid_probabilities_are_averaged():
    members, images = networks(3), torch.randn(2, 1, 8, 8)
    expected = torch.stack([m(images).sigmoid() for m in members]).mean(0)
    torch.testing.assert_close(Ensemble(members)(images).sigmoid(), expected)


def test_softmax_probabilities_are_averaged():
    members, images = networks(3, channels=4), torch.randn(2, 1, 8, 8)
    expected = torch.stack([m(images).softmax(1) for m in members]).mean(0)
    torch.testing.assert_close(Ensemble(members, "softmax")(images).softmax(1), expected)


def test_saturated_logits_stay_finite():
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.full_like(images, self.value)

    images = torch.zeros(1, 1, 2, 2)
    torch.testing.assert_close(Ensemble([Constant(200.0)] * 2)(images), torch.full_like(images, 200.0))
    torch.testing.assert_close(Ensemble([Constant(200.0), Constant(-200.0)])(images), images)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match="tanh"):
        Ensemble(networks(1), "tanh")
