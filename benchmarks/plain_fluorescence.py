"""The peer of ``segmentation_networks.py``: what one would write for the fluorescence task without medseg.

PyTorch, MONAI and segmentation-models-pytorch as their tutorials use them; nothing here imports medseg.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from monai import transforms as mt
from monai.data import CacheDataset
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SwinUNETR
from PIL import Image
from torch import nn


def build(name: str) -> nn.Module:
    """One of the four networks of the paper, with random weights."""
    if name == "swin_unetr":
        return SwinUNETR(in_channels=1, out_channels=1, feature_size=24, spatial_dims=2)
    models = {"unet": smp.Unet, "unetpp": smp.UnetPlusPlus, "deeplabv3plus": smp.DeepLabV3Plus}
    return models[name]("efficientnet-b3", encoder_weights=None, in_channels=1, classes=1)


def segment(network: nn.Module, file: Path) -> torch.Tensor:
    """Logits (1, 1, W, H) of a grey image file."""
    inferer = SlidingWindowInferer(roi_size=(512, 512), sw_batch_size=4, overlap=0.25, mode="gaussian")
    pixels = np.asarray(Image.open(file), dtype=np.float32).T.copy()
    image = torch.from_numpy((pixels - pixels.mean()) / pixels.std())
    with torch.inference_mode():
        logits: torch.Tensor = inferer(image[None, None], network)
    return logits


def cached(items: list[dict[str, Any]], roi: int) -> CacheDataset:
    """Items with ``image`` and ``label`` files: read once, cut and turned anew every time."""
    keys, size = ["image", "label"], (roi, roi)
    steps = [
        mt.LoadImaged(keys, reader="ITKReader", image_only=True),
        mt.EnsureChannelFirstd(keys),
        mt.Lambdad("label", lambda x: (x > 0).float()),
        mt.NormalizeIntensityd("image"),
        mt.SpatialPadd(keys, size),
        mt.RandCropByPosNegLabeld(keys, label_key="label", spatial_size=size, pos=1, neg=0, num_samples=1),
        mt.RandRotate90d(keys, prob=0.75, max_k=3),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=0),
        mt.RandFlipd(keys, prob=0.5, spatial_axis=1),
    ]
    return CacheDataset(items, mt.Compose(steps), progress=False)


def train(
    network: nn.Module, loader: Any, loss_function: Callable[..., torch.Tensor], optimizer: Any, epochs: int
) -> None:
    """The loop of every tutorial."""
    network.train()
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_function(network(batch["image"]), batch["label"])
            loss.backward()
            optimizer.step()
