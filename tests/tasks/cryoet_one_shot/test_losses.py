"""The loss of an episode against NumPy, and the bundle's mask loss against equation (15)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from medseg.bundles.configs import read_config
from medseg.tasks.cryoet_one_shot.losses import EpisodeLoss

CONFIG = Path("bundles/cryoet_one_shot/configs/train.yaml")


@pytest.fixture
def mask_loss() -> nn.Module:
    """As the bundle builds it."""
    return ConfigParser({"mask_loss": read_config(CONFIG)["mask_loss"]}).get_parsed_content("mask_loss")


@pytest.fixture
def scores() -> torch.Tensor:
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def pairs(scores: np.ndarray, weight: float) -> float:
    """Equation (14): mean over all pairs, the matching ones weighted."""
    total, count = 0.0, 0
    for episode in scores:
        for target, structure in np.ndindex(episode.shape):
            probability = 1 / (1 + np.exp(-episode[target, structure]))
            total -= weight * np.log(probability) if target == structure else np.log(1 - probability)
            count += 1
    return total / count


@pytest.mark.parametrize(("given", "weight"), [(None, 3.0), (1.0, 1.0), (0.25, 0.25)])
def test_sigmoid_judges_every_pair_by_itself(scores, given, weight):
    loss = EpisodeLoss(nn.Identity(), positive_weight=given)(scores, None, torch.empty(0))
    assert float(loss) == pytest.approx(pairs(scores.numpy(), weight), rel=1e-12)


def test_the_default_weight_balances_one_match_against_the_others():
    # with scores of zero matches and mismatches weigh alike: half of the loss is the matches'
    for ways in (2, 5):
        scores = torch.zeros(1, ways, ways, dtype=torch.float64, requires_grad=True)
        EpisodeLoss(nn.Identity()).matching(scores).backward()
        gradient = scores.grad[0]
        assert float(gradient.diag().sum()) == pytest.approx(-float(gradient.sum() - gradient.diag().sum()))


def test_softmax_is_the_cross_entropy_over_the_structures_of_a_target(scores):
    total = 0.0
    for episode in scores.numpy():
        for target, row in enumerate(episode):
            total -= np.log(np.exp(row[target]) / sum(np.exp(value) for value in row))
    loss = EpisodeLoss(nn.Identity(), match="softmax")(scores, None, torch.empty(0))
    assert float(loss) == pytest.approx(total / 12, rel=1e-12)
    # targets are rows and structures are columns: not the same thing
    turned = EpisodeLoss(nn.Identity(), match="softmax").matching(scores.transpose(-1, -2))
    assert float(turned) != pytest.approx(total / 12, rel=1e-3)


def test_a_perfect_answer_costs_nothing():
    scores = (torch.eye(5) * 2 - 1) * 40
    for match in ("sigmoid", "softmax"):
        assert float(EpisodeLoss(nn.Identity(), match=match).matching(scores[None])) < 1e-8
        assert float(EpisodeLoss(nn.Identity(), match=match).matching(-scores[None])) > 30


def test_masks_of_both_streams_are_added_to_the_matching(scores, mask_loss):
    """Supports and targets of an episode are as many: the two means of (15) are twice the mean over all volumes."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 1, 3, 3, 3, generator=generator, dtype=torch.float64)
    masks = (torch.rand(8, 1, 3, 3, 3, generator=generator) < 0.3).double()
    loss = EpisodeLoss(mask_loss)
    supports, targets = (float(mask_loss(logits[part], masks[part])) for part in (slice(4), slice(4, 8)))
    expected = float(loss.matching(scores)) + supports + targets
    assert float(loss(scores, logits, masks)) == pytest.approx(expected, rel=1e-12)
    assert float(loss(scores, None, masks)) == float(loss.matching(scores))


def test_the_bundles_mask_loss_is_equation_15_of_every_volume(mask_loss):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 1, 4, 3, 6, generator=generator, dtype=torch.float64) * 4
    masks = (torch.rand(5, 1, 4, 3, 6, generator=generator) < 0.2).double()
    masks[3], masks[4] = 0, 1  # an empty mask, and one that would outweigh all others in a sum over the batch
    each = []
    for p, g in zip(1 / (1 + np.exp(-logits.numpy())), masks.numpy(), strict=True):
        each.append(1 - (2 * (p * g).sum() + 1) / (p.sum() + g.sum() + 1))
    assert float(mask_loss(logits, masks)) == pytest.approx(np.mean(each), rel=1e-6)
    p, g = 1 / (1 + np.exp(-logits.numpy())), masks.numpy()
    whole_batch = 1 - (2 * (p * g).sum() + 1) / (p.sum() + g.sum() + 1)
    assert abs(np.mean(each) - whole_batch) > 0.01, "the released code's sum over the batch is another number"


def test_an_empty_mask_found_empty_costs_nothing(mask_loss):
    assert float(mask_loss(torch.full((1, 1, 4, 4, 4), -60.0), torch.zeros(1, 1, 4, 4, 4))) == pytest.approx(
        0, abs=1e-6
    )


def test_an_unknown_match_is_refused():
    with pytest.raises(ValueError, match="match is 'cosine'; choose from sigmoid, softmax"):
        EpisodeLoss(nn.Identity(), match="cosine")
