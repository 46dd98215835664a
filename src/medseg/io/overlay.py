"""Overlays as in the paper's figures: truth in green, prediction in yellow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medseg.io.images import read_grey

GREEN, YELLOW = (0, 220, 60), (255, 225, 0)

__all__ = ["overlay", "overlay_of_file"]


def overlay(
    image: npt.NDArray[Any],
    pred: npt.NDArray[np.bool_] | None = None,
    truth: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.uint8]:
    """Outline masks on a grey picture, between its 0.5th and 99.5th percentile.

    Small pictures are enlarged to at least 512 pixels so that outlines stay fine. Where both outlines run along the
    same pixels the prediction's lies on top.

    Args:
        image: grey values (H, W) in any scale.
        pred: prediction (H, W), outlined in yellow.
        truth: truth (H, W), outlined in green.

    Returns:
        RGB picture (s H, s W, 3) uint8 with a whole factor s >= 1.

    Raises:
        ValueError: if a mask has another size than the image.
    """
    scale = max(1, round(512 / max(image.shape)))
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, [0.5, 99.5]) if finite.size else (0.0, 1.0)
    grey = np.clip((np.nan_to_num(image, nan=low) - low) / max(high - low, 1e-12), 0, 1) * 255
    picture = np.repeat(_enlarge(grey.astype(np.uint8), scale)[..., None], 3, axis=-1)
    width = max(1, round(max(picture.shape[:2]) / 300))
    for mask, colour in ((truth, GREEN), (pred, YELLOW)):
        if mask is None:
            continue
        if mask.shape != image.shape:
            raise ValueError(f"the mask is {mask.shape} and the image {image.shape}; they must be of one size")
        large = _enlarge(mask, scale)
        picture[large & ~ndimage.binary_erosion(large, iterations=width)] = colour
    return picture


def overlay_of_file(
    path: str, pred: npt.NDArray[np.bool_] | None = None, truth: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint8]:
    """:func:`overlay` on a 2D image file.

    Args:
        path: image, read with :func:`medseg.io.images.read_grey`.
        pred: prediction (W, H), as MONAI loads images.
        truth: truth (W, H).
    """
    return overlay(read_grey(path), *(None if mask is None else mask.T for mask in (pred, truth)))


def _enlarge(image: npt.NDArray[Any], scale: int) -> npt.NDArray[Any]:
    return np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)
