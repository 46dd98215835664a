"""COS-Net: a Siamese encoder that says which structure a subtomogram shows, and a decoder that outlines it.

Zhou et al. 2020, "One-Shot Learning With Attention-Guided Segmentation in Cryo-Electron Tomography", section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["COSNet", "DuSE"]

_jit: Any = torch.jit  # comes without types

FUSIONS = ("add", "max")
STRIDES = (1, 2)


class DuSE(nn.Module):
    """Dual squeeze-and-excitation, equations (9)-(13): channels and voxels re-weighted, then fused.

    Args:
        channels: C of the feature map, even.
        fusion: ``add`` as in the paper, or ``max`` as in the authors' released code.
    """

    def __init__(self, channels: int, fusion: str = "add") -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"channels is {channels}; a DuSE block takes an even number")
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; choose from {', '.join(FUSIONS)}")
        self.squeeze = nn.Linear(channels, channels // 2)
        self.excite = nn.Linear(channels // 2, channels)
        self.spatial = nn.Conv3d(channels, 1, 1)
        self.fusion = fusion

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Re-calibrate features (B, C, D, H, W)."""
        hidden = functional.relu(self.squeeze(features.mean(dim=(2, 3, 4))))  # (9), (10)
        by_channel = torch.sigmoid(self.excite(hidden))[:, :, None, None, None]
        by_voxel = torch.sigmoid(self.spatial(features))  # (12)
        if self.fusion == "max":
            return torch.maximum(features * by_channel, features * by_voxel)
        return features * (by_channel + by_voxel)


class COSNet(nn.Module):
    """One stream of COS-Net with its matching layer; both streams share these weights.

    No skip connections between encoder and decoder; convolution, ReLU, batch norm in this order (released code). With
    the defaults it has 18,233,286 parameters (the released network: 18,233,293 without the 513 of the match score,
    520 of them in batch norms that it never uses). The feature encoder's biases cancel in the match and never learn.

    Args:
        channels: C of every feature map.
        duse: with DuSE blocks ("DuSE-SCNN" in the paper's tables) or without ("SCNN").
        decoder: with the volume decoder. Without it there are no masks, and the encoder learns from the match alone.
        fusion: of the DuSE blocks, see :class:`DuSE`.
        stem_stride: 1 as in the paper; 2 works on a grid of half the size, for CPUs, and ends in a small head that
            sees the input again.
        in_channels: of the input.
        size: side of the input volumes, a multiple of 4 ``stem_stride``; the feature encoder is built for it.
        feature_size: length of the feature vector (512).

    Raises:
        ValueError: on a size that does not divide, or an unknown option.
    """

    def __init__(
        self,
        channels: int = 64,
        duse: bool = True,
        decoder: bool = True,
        *,
        fusion: str = "add",
        stem_stride: int = 1,
        in_channels: int = 1,
        size: int = 32,
        feature_size: int = 512,
    ) -> None:
        super().__init__()
        if stem_stride not in STRIDES:
            raise ValueError(f"stem_stride is {stem_stride}; choose from 1, 2")
        if size < 4 * stem_stride or size % (4 * stem_stride):
            raise ValueError(f"size is {size}; it must be a multiple of {4 * stem_stride}")
        self.size, self.in_channels = size, in_channels

        def level(*layers: nn.Module) -> nn.Sequential:
            return nn.Sequential(*layers, *_convolutions(channels), *([DuSE(channels, fusion)] if duse else []))

        stem = nn.Conv3d(in_channels, channels, 3 if stem_stride == 1 else 4, stem_stride, padding=1)
        self.encoder = nn.Sequential(
            nn.Sequential(stem, nn.ReLU()),
            nn.Sequential(level(), nn.MaxPool3d(2)),
            nn.Sequential(level(), nn.MaxPool3d(2)),
            nn.Sequential(*_convolutions(channels)),
        )
        flat = channels * (size // stem_stride // 4) ** 3
        # Two linear layers without an activation between them, as released; the second is the paper's 512 x 512.
        self.feature_encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(flat, feature_size), nn.Linear(feature_size, feature_size)
        )
        self.score = nn.Linear(feature_size, 1)
        self.decoder: _Decoder | None = None
        if decoder:
            up = [level(nn.ConvTranspose3d(channels, channels, 2, stride=2)) for _ in range(2)]
            self.decoder = _Decoder(nn.Sequential(*up), channels, stem_stride, in_channels)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, D, H, W) of the mask of volumes (B, 1, D, H, W), mean 0 and standard deviation 1 each.

        Raises:
            ValueError: without a decoder, or for volumes of another size.
        """
        mask = self._decode(self._encode(volumes), volumes)
        if mask is None:
            raise ValueError("this network has no decoder and makes no masks; embed() gives its features")
        return mask

    def embed(self, volumes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Features (B, 512) and mask logits (B, 1, D, H, W) of volumes, equations (1)-(6).

        Args:
            volumes: (B, 1, D, H, W), mean 0 and standard deviation 1 each.

        Returns:
            The features, which :meth:`match` compares, and the logits, ``None`` without a decoder.

        Raises:
            ValueError: for volumes of another size.
        """
        encoded = self._encode(volumes)
        features: torch.Tensor = self.feature_encoder(encoded)
        return features, self._decode(encoded, volumes)

    def match(self, support: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits of the match between targets and supports, equations (7)-(8) before the softmax.

        Args:
            support: features (..., n, F) of the n structures to choose from.
            target: features (..., m, F).

        Returns:
            (..., m, n): a sigmoid makes it the chance of a pair to match, a softmax over n that of each structure.
        """
        distance = (target.unsqueeze(-2) - support.unsqueeze(-3)).abs()
        scores: torch.Tensor = self.score(distance).squeeze(-1)
        return scores

    def _encode(self, volumes: torch.Tensor) -> torch.Tensor:
        tracing = _jit.is_tracing()  # a trace would keep the comparison as a constant, with a warning
        if not tracing and tuple(volumes.shape[1:]) != (self.in_channels, *[self.size] * 3):
            raise ValueError(
                f"volumes have the shape {tuple(volumes.shape)}; this network takes (B, {self.in_channels}, "
                f"{self.size}, {self.size}, {self.size})"
            )
        encoded: torch.Tensor = self.encoder(volumes)
        return encoded

    def _decode(self, encoded: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor | None:
        return None if self.decoder is None else self.decoder(encoded, volumes)


class _Decoder(nn.Module):
    """From the encoder's grid to mask logits of the input's size; of a stem with stride 2, with the input beside it."""

    def __init__(self, up: nn.Module, channels: int, stem_stride: int, in_channels: int, width: int = 8) -> None:
        super().__init__()
        self.up = up
        self.fine = nn.ConvTranspose3d(channels, width, 2, stride=2) if stem_stride == 2 else None
        self.out: nn.Module = nn.Conv3d(channels, 1, 1)
        if self.fine is not None:
            last = nn.Conv3d(width, 1, 3, padding=1)
            self.out = nn.Sequential(nn.Conv3d(width + in_channels, width, 3, padding=1), nn.ReLU(), last)

    def forward(self, encoded: torch.Tensor, volumes: torch.Tensor) -> torch.Tensor:
        features = self.up(encoded)
        if self.fine is not None:
            features = torch.cat([self.fine(features), volumes], dim=1)
        logits: torch.Tensor = self.out(features)
        return logits


def _convolutions(channels: int) -> list[nn.Module]:
    return [
        layer
        for _ in range(2)
        for layer in (nn.Conv3d(channels, channels, 3, padding=1), nn.ReLU(), nn.BatchNorm3d(channels))
    ]
