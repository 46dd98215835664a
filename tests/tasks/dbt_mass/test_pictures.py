"""Pictures and films of a view."""

from __future__ import annotations

import numpy as np
from PIL import Image

from medseg.io.overlay import GREEN, YELLOW
from medseg.tasks.dbt_mass.pictures import FILM_HEIGHT, FRAME_MS, mass_montage, slice_picture, write_film


def volume(shape=(12, 60, 40)) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32) * 0.5


def has(picture: np.ndarray, colour) -> bool:
    return bool((picture == np.array(colour)).all(axis=-1).any())


def tiles(picture: np.ndarray) -> int:
    gaps = (picture == 255).all(axis=(0, 2))
    return 1 + int((np.diff(gaps.astype(int)) == 1).sum())


def test_boxes_show_on_the_slices_they_cross():
    box = [3, 10, 10, 6, 30, 30]
    for d in range(12):
        picture = slice_picture(volume(), d, [box], [0.7])
        assert has(picture, YELLOW) == (3 <= d < 6)
        assert not has(picture, GREEN)
    assert has(slice_picture(volume(), 4, [], [], true_boxes=[box]), GREEN)


def test_a_montage_has_a_slice_of_every_mass():
    boxes = [[0, 10, 10, 3, 20, 20], [5, 10, 10, 8, 20, 20], [9, 30, 10, 12, 40, 20]]
    assert tiles(mass_montage(volume(), [], [])) == 1
    assert tiles(mass_montage(volume(), boxes, [0.9, 0.8, 0.7])) == 3
    assert tiles(mass_montage(volume(), [boxes[0]] * 3, [0.9, 0.8, 0.7])) == 1, "one slice shows all"
    assert tiles(mass_montage(volume(), boxes[:1], [0.9], true_boxes=boxes[1:2])) == 2
    many = [[d, 5, 5, d + 1, 10, 10] for d in range(12)]
    assert tiles(mass_montage(volume(), many, [0.5] * 12)) == 4


def test_a_film_has_a_frame_of_every_slice(tmp_path):
    path = write_film(tmp_path / "sub" / "film.gif", volume(), [[3, 10, 10, 6, 30, 30]], [0.7])
    with Image.open(path) as film:
        assert film.n_frames == 12
        assert film.height == FILM_HEIGHT
        assert film.info["duration"] == FRAME_MS
        assert film.info["loop"] == 0
