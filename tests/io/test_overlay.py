from __future__ import annotations

import numpy as np
import pytest

from medseg.io.images import write_png
from medseg.io.overlay import GREEN, YELLOW, overlay, overlay_of_file
from medseg.io.predictions import measure


def test_outlines_have_the_papers_colours(disc):
    image = np.random.default_rng(0).normal(100, 5, (600, 600))
    truth, pred = disc(600, 100, (200, 200)), disc(600, 80, (400, 400))
    picture = overlay(image, pred, truth)
    assert picture.shape == (600, 600, 3)
    green, yellow = (picture == GREEN).all(-1), (picture == YELLOW).all(-1)
    assert green.any()
    assert yellow.any()
    assert (green <= truth).all()
    assert (yellow <= pred).all()
    # outlines, not areas
    assert green.sum() < 0.1 * truth.sum()


def test_small_images_are_enlarged_and_dead_ones_survive():
    assert overlay(np.zeros((64, 128))).shape == (256, 512, 3)
    assert overlay(np.full((600, 600), np.nan)).max() == 0


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(ValueError, match="one size"):
        overlay(np.zeros((8, 8)), np.zeros((8, 9), bool))


def test_lesions_are_counted():
    pred = np.zeros((8, 8), bool)
    pred[0, 0] = pred[1, 1] = pred[5:7, 5:7] = True  # the first two touch at a corner
    assert measure(pred, np.where(pred, 0.75, 0.1)) == {"lesion_count": 2, "area_pixels": 6, "confidence": 0.75}
    assert measure(pred & False, np.zeros((8, 8))) == {"lesion_count": 0, "area_pixels": 0, "confidence": ""}


def test_masks_of_a_file_have_the_networks_axes(tmp_path):
    """MONAI loads a picture (H, W) as (W, H)."""
    image = np.zeros((300, 600), dtype=np.uint8)
    write_png(tmp_path / "a.png", image)
    mask = np.zeros((600, 300), dtype=bool)
    mask[400:500, 50:60] = True
    picture = overlay_of_file(str(tmp_path / "a.png"), mask)
    rows, columns = np.nonzero((picture == YELLOW).all(-1))
    assert (rows.min(), rows.max()) == (50, 59)
    assert (columns.min(), columns.max()) == (400, 499)
