"""Fully connected conditional random field on a 3D grid, differentiable in its parameters."""

from __future__ import annotations

from medseg.crf.dense_crf import DenseCRF3D

__all__ = ["DenseCRF3D"]
