"""Pictures of a view: slices through its masses and detections, and a film that scrolls through all slices."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from medseg.io.files import write_atomically
from medseg.io.overlay import GREEN, YELLOW, overlay

Picture = npt.NDArray[np.uint8]

#: Slices in a montage at most.
TILES = 4

#: Height of the frames of a film in pixels, and milliseconds that each is shown.
FILM_HEIGHT, FRAME_MS = 384, 80

__all__ = ["mass_montage", "slice_picture", "write_film"]


def slice_picture(
    volume: npt.NDArray[Any],
    d: int,
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    pred: npt.NDArray[np.bool_] | None = None,
    truth: npt.NDArray[np.bool_] | None = None,
    true_boxes: Sequence[Sequence[float]] = (),
) -> Picture:
    """One slice with the detections that cross it in yellow and the truth in green.

    Args:
        volume: (D, H, W), 0 outside of the breast.
        d: slice.
        boxes: (N, 6) detections.
        scores: (N,) of the detections, written beside their boxes.
        pred: (D, H, W) their masks.
        truth: (D, H, W) true masks.
        true_boxes: (n, 6).

    Returns:
        RGB picture.
    """
    picture = overlay(volume[d], None if pred is None else pred[d], None if truth is None else truth[d])
    scale = picture.shape[0] / volume.shape[1]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    texts = [*([""] * len(true_boxes)), *(f"{s:.2f}" for s in scores)]
    colours = [*([GREEN] * len(true_boxes)), *([YELLOW] * len(scores))]
    for box, text, colour in zip([*true_boxes, *boxes], texts, colours, strict=True):
        if box[0] <= d < box[3]:
            left, top, right, bottom = (scale * box[i] for i in (2, 1, 5, 4))
            draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
            draw.text((left + 2, max(0, top - 12)), text, fill=colour)
    draw.text((4, image.height - 14), f"slice {d + 1}/{len(volume)}", fill=(200, 200, 200))
    return np.asarray(image)


def mass_montage(
    volume: npt.NDArray[Any],
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    pred: npt.NDArray[np.bool_] | None = None,
    truth: npt.NDArray[np.bool_] | None = None,
    true_boxes: Sequence[Sequence[float]] = (),
) -> Picture:
    """The slices through the middle of every mass, then of the detections by falling score, side by side.

    Slices that show what an earlier one shows are left out; without a mass and a detection it is the middle slice.

    Args: as of :func:`slice_picture`.
    """
    middles = [int((box[0] + box[3]) / 2) for box in [*true_boxes, *boxes]]
    chosen: list[int] = []
    for box, middle in zip([*true_boxes, *boxes], middles, strict=True):
        middle = min(max(middle, 0), len(volume) - 1)
        if not any(box[0] <= d < box[3] for d in chosen):
            chosen.append(middle)
    chosen = chosen[:TILES] or [len(volume) // 2]
    tiles = [slice_picture(volume, d, boxes, scores, pred, truth, true_boxes) for d in chosen]
    gap = np.full((tiles[0].shape[0], 8, 3), 255, np.uint8)
    parts = [tile for pair in zip(tiles, [gap] * len(tiles), strict=True) for tile in pair][:-1]
    return np.concatenate(parts, axis=1)


def write_film(
    path: Path,
    volume: npt.NDArray[Any],
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    pred: npt.NDArray[np.bool_] | None = None,
) -> Path:
    """Write a GIF that scrolls through the slices.

    Args:
        path: file to write.
        volume: (D, H, W).
        boxes: (N, 6) detections.
        scores: of the detections.
        pred: (D, H, W) their masks.
    """
    frames = []
    for d in range(len(volume)):
        image = Image.fromarray(slice_picture(volume, d, boxes, scores, pred))
        width = max(1, round(image.width * FILM_HEIGHT / image.height))
        frames.append(image.resize((width, FILM_HEIGHT)).quantize(64))
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    write_atomically(path, content.getvalue())
    return path
