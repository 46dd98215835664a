"""Subtomograms in files and on screen: what is wrong with one, and its orthogonal slices with outlines."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.datalist import Item, stray_values
from medseg.io.mrc import read_mrc
from medseg.io.overlay import overlay
from medseg.training.module import Case

__all__ = ["CheckSubtomogram", "DrawSlices", "crf_slices", "orthogonal_slices", "read_subtomogram"]


def read_subtomogram(path: str, size: int) -> npt.NDArray[np.float32]:
    """A subtomogram (size, size, size) in the file's own scale.

    Raises:
        FileNotFoundError, ValueError: as :func:`medseg.io.mrc.read_mrc`, and if all voxels are equal.
    """
    volume, _ = read_mrc(path, size)
    if volume.min() == volume.max():
        raise ValueError(f"{path} is constant ({volume.flat[0]:g} everywhere): nothing can be seen in it; leave it out")
    return volume


class CheckSubtomogram:
    """Checks an item of a data list: its volume, its mask and its class.

    Args:
        size: side of the volumes.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, item: Item) -> str | None:
        """Say what is wrong with an item, with the file and the fix, or ``None``."""
        if not isinstance(item.get("class"), str) or not item["class"]:
            return f'{item["image"]} has no "class"; give every item the name of its structure'
        try:
            read_subtomogram(item["image"], self.size)
            mask, _ = read_mrc(item["label"], self.size)
        except (OSError, ValueError) as error:
            return str(error)
        stray = stray_values(mask)
        return f"mask {item['label']} is not binary (values {stray}); use 0 and one other value" if stray else None


class DrawSlices:
    """Draws a subtomogram for the trainer: see :func:`orthogonal_slices`."""

    def __call__(self, case: Case) -> npt.NDArray[np.uint8]:
        """Slices of a case with prediction and truth outlined."""
        return orthogonal_slices(read_mrc(case.image)[0], *case.unpacked())


def orthogonal_slices(
    volume: npt.NDArray[Any],
    pred: npt.NDArray[np.bool_] | None = None,
    truth: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.uint8]:
    """The middle slices across z, y and x side by side, with the truth in green and the prediction in yellow.

    Args:
        volume: (D, H, W).
        pred: prediction of the same shape.
        truth: truth of the same shape.

    Returns:
        RGB picture uint8. Each slice has its own grey scale.
    """
    tiles = []
    for axis in range(3):
        middle = volume.shape[axis] // 2
        masks = [None if m is None else m.take(middle, axis) for m in (pred, truth)]
        tiles.append(overlay(volume.take(middle, axis), *masks))
    height = max(tile.shape[0] for tile in tiles)
    gap = np.full((height, 8, 3), 255, dtype=np.uint8)
    padded = [np.pad(t, ((0, height - t.shape[0]), (0, 0), (0, 0)), constant_values=255) for t in tiles]
    return np.concatenate([padded[0], gap, padded[1], gap, padded[2]], axis=1)


def crf_slices(
    volume: npt.NDArray[Any], before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint8]:
    """:func:`orthogonal_slices` with the mask before the CRF in the upper row and after it in the lower one.

    Args:
        volume: (D, H, W).
        before: the network's mask, of the same shape.
        after: the CRF's mask, of the same shape.
    """
    rows = [orthogonal_slices(volume, mask) for mask in (before, after)]
    gap = np.full((8, rows[0].shape[1], 3), 255, dtype=np.uint8)
    return np.concatenate([rows[0], gap, rows[1]], axis=0)
