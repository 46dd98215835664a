"""Searching thousands of subtomograms for the structures of a support set, every volume encoded once."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from torch import nn

from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.tasks.cryoet_one_shot.refine import MaskRefiner
from medseg.tasks.cryoet_one_shot.support import SupportSet
from medseg.training.module import plain_tensor

__all__ = ["OneShotSearch"]


class OneShotSearch(nn.Module):
    """A network for ``SupervisedEvaluator``: what structure is it, and where.

    The support set is encoded when the first batch comes (the weights are loaded by then) and kept; a batch costs one
    encoding per target, however many structures there are.

    Args:
        network: with its weights loaded before the first batch.
        support: the structures.
        refine: the CRF; ``None`` leaves the network's own masks.
    """

    def __init__(self, network: COSNet, support: SupportSet, refine: MaskRefiner | None = None) -> None:
        super().__init__()
        self.network, self.refine = network, refine
        self._support = support
        self._encoded: torch.Tensor | None = None

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scores and masks of a batch of targets.

        Args:
            image: (B, 1, D, H, W), mean 0 and standard deviation 1 each.

        Returns:
            ``match`` (B, n): match logits with the n structures, in the order of the support set; with a decoder also
            ``mask`` (B, 1, D, H, W): logits after the CRF, and ``mask_before_crf``: those of the network.
        """
        volumes = plain_tensor(image)
        support = self.encoded_support(volumes.device)
        features, logits = self.network.embed(volumes)
        found = {"match": self.network.match(support, features).float()}
        if logits is not None:
            logits = logits.float()
            found["mask_before_crf"] = _like(image, logits)
            if self.refine is not None:
                logits = torch.logit(self.refine(logits.sigmoid(), volumes.float()), eps=1e-6)
            found["mask"] = _like(image, logits)
        return found

    def encoded_support(self, device: torch.device) -> torch.Tensor:
        """Features (n, 512) of the structures: the mean of each one's shots. Encoded once."""
        if self._encoded is None:
            shots = [self.network.embed(self._support.volumes(name).to(device))[0] for name in self._support.names]
            self._encoded = torch.stack([features.mean(dim=0) for features in shots])
        return self._encoded


def _like(image: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Values with the names and the geometry of the images that they belong to."""
    if not isinstance(image, MetaTensor):
        return values
    result: torch.Tensor = MetaTensor(values).copy_meta_from(image, copy_attr=False)
    return result
