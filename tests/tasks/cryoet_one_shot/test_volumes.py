"""Subtomograms before they are learned from: what is refused, how they are drawn, and which turns they may make."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from medseg.bundles.configs import read_config
from medseg.io.datalist import DatalistError, load_datalist
from medseg.io.mrc import write_mrc
from medseg.io.overlay import GREEN, YELLOW
from medseg.tasks.cryoet_one_shot.volumes import (
    CheckSubtomogram,
    DrawSlices,
    crf_slices,
    orthogonal_slices,
    read_subtomogram,
)
from medseg.training.module import Case

RECIPES = Path("transforms/cryoet.yaml")
SIZE = 8


def noise(seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(size,) * 3).astype(np.float32)


@pytest.fixture
def item(tmp_path: Path) -> Callable[..., dict]:
    """An item of a data list on disk, broken in one way."""

    def make(volume: np.ndarray | None = None, mask: np.ndarray | None = None, **fields: object) -> dict:
        count = len(list(tmp_path.glob("*_v.mrc")))
        write_mrc(tmp_path / f"{count}_v.mrc", noise(count) if volume is None else volume, 10.0)
        write_mrc(tmp_path / f"{count}_m.mrc", noise(count) > 1 if mask is None else mask, 10.0)
        paths = {"image": str(tmp_path / f"{count}_v.mrc"), "label": str(tmp_path / f"{count}_m.mrc")}
        return {**paths, "class": "ribosome", "fold": count % 2, **fields}

    return make


def hole(value: float) -> np.ndarray:
    volume = noise()
    volume[1, 2, 3] = value
    return volume


def three_values() -> np.ndarray:
    mask = np.zeros((SIZE,) * 3, np.int8)
    mask[0], mask[1] = 1, 2
    return mask


#: What is broken, what the message says, and which file it names.
BROKEN = {
    "constant": ({"volume": np.full((SIZE,) * 3, 2.5)}, r"is constant \(2.5 everywhere\).*leave it out", "v"),
    "nan": ({"volume": hole(np.nan)}, "holds NaN or infinite values", "v"),
    "size": ({"volume": noise(size=SIZE + 1)}, "is 9 x 9 x 9; the network takes 8 x 8 x 8 voxels", "v"),
    "mask_size": ({"mask": noise(size=SIZE - 1) > 0}, "is 7 x 7 x 7; the network takes 8 x 8 x 8 voxels", "m"),
    "mask_nan": ({"mask": hole(np.inf)}, "holds NaN or infinite values", "m"),
    "mask_values": ({"mask": three_values()}, r"is not binary \(values 0, 1, 2\); use 0 and one other value", "m"),
    "mask_grey": ({"mask": noise()}, r"is not binary \(values (-[\d.]+, ){6}\.\.\.\)", "m"),
    "mask_negative": ({"mask": -(noise() > 0).astype(np.int8)}, r"is not binary \(values -1, 0\)", "m"),
    "mask_without_0": ({"mask": (noise() > 0) + np.int8(1)}, r"is not binary \(values 1, 2\)", "m"),
    "no_class": ({"class": None}, 'has no "class"; give every item the name of its structure', "v"),
    "empty_class": ({"class": ""}, 'has no "class"', "v"),
    "number_class": ({"class": 3}, 'has no "class"', "v"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:mrcfile", "ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_with_an_item_is_said_with_its_file(item, tmp_path, name):
    fields, message, file = BROKEN[name]
    broken = item(**fields)
    check = CheckSubtomogram(SIZE)
    problem = check(broken)
    assert problem is not None
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)
    assert str(tmp_path / f"0_{file}.mrc") in problem
    # and the same through the data list, with the item's place in front
    content = {"training": [item(fold=0), broken, item(fold=1)], "test": [item()]}
    (tmp_path / "datalist.json").write_text(json.dumps(content))
    with pytest.raises(DatalistError) as error:
        load_datalist(tmp_path / "datalist.json", tmp_path, check)
    assert error.value.problems == [f"training[1]: {problem}"]


def test_good_items_pass(item, tmp_path):
    check = CheckSubtomogram(SIZE)
    masks = [None, np.zeros((SIZE,) * 3, bool), np.ones((SIZE,) * 3, bool), (noise() > 0) * np.uint8(255)]
    items = [item(mask=mask) for mask in masks]
    assert [check(i) for i in items] == [None] * 4
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    lists = load_datalist(tmp_path / "datalist.json", tmp_path, check)
    assert [i["class"] for i in lists["training"]] == ["ribosome"] * 4


def test_a_subtomogram_is_read_in_its_own_scale(item):
    path = item(volume=noise() * 100 + 7)["image"]
    np.testing.assert_array_equal(read_subtomogram(path, SIZE), (noise() * 100 + 7).astype(np.float32))
    with pytest.raises(FileNotFoundError, match=r"absent.mrc"):
        read_subtomogram("absent.mrc", SIZE)


def test_slices_have_the_size_and_the_colours_they_say():
    volume = np.random.default_rng(0).normal(size=(4, 5, 6))
    # a slice is enlarged by a whole factor to about 512 pixels: 6 x 85, 6 x 85 and 5 x 102
    sizes = [(5 * 85, 6 * 85), (4 * 85, 6 * 85), (4 * 102, 5 * 102)]
    picture = orthogonal_slices(volume)
    assert picture.dtype == np.uint8
    assert picture.shape == (425, 510 + 8 + 510 + 8 + 510, 3)
    assert (picture[..., 0] == picture[..., 1]).all(), "grey without masks"
    starts = [0, 518, 1036]
    for (height, width), start in zip(sizes, starts, strict=True):
        assert (picture[height:, start : start + width] == 255).all(), "white below a smaller slice"
        assert len(np.unique(picture[:height, start : start + width])) > 5
    for gap in (510, 1028):
        assert (picture[:, gap : gap + 8] == 255).all()


def test_slices_show_the_middle_across_z_y_and_x():
    volume = np.zeros((8, 8, 8))
    volume[4, 1, 2] = volume[2, 4, 6] = volume[5, 6, 4] = 1  # one bright voxel in each of the middle slices
    volume[0, 0, 0] = volume[3, 3, 3] = 1  # in none
    picture = orthogonal_slices(volume)[..., 0]
    tiles = [picture[32::64, start + 32 : start + 512 : 64] for start in (0, 520, 1040)]
    for tile, place in zip(tiles, [(1, 2), (2, 6), (5, 6)], strict=True):
        assert tile.shape == (8, 8)
        assert np.argwhere(tile == 255).tolist() == [list(place)]


def test_prediction_is_yellow_and_truth_green():
    volume, truth, pred = noise(), np.zeros((SIZE,) * 3, bool), np.zeros((SIZE,) * 3, bool)
    truth[:, :2], pred[:, 6:] = True, True
    picture = orthogonal_slices(volume, pred, truth)
    green, yellow = (picture == GREEN).all(-1), (picture == YELLOW).all(-1)
    assert green[:, :512].any()
    assert yellow[:, :512].any()
    assert not (green | yellow)[:, 520:1032].any(), "neither mask reaches the middle across y"
    # across x: rows are z, columns are y
    assert np.flatnonzero(green[:, 1040:].any(0)).max() < 2 * 64
    assert np.flatnonzero(yellow[:, 1040:].any(0)).min() >= 6 * 64


def test_the_row_before_the_crf_is_above_the_row_after_it():
    volume, before, after = noise(), np.zeros((SIZE,) * 3, bool), np.zeros((SIZE,) * 3, bool)
    before[2:6, 2:6, 2:6] = True
    picture = crf_slices(volume, before, after)
    assert picture.shape == (512 + 8 + 512, 1552, 3)
    assert (picture[512:520] == 255).all()
    np.testing.assert_array_equal(picture[:512], orthogonal_slices(volume, before))
    np.testing.assert_array_equal(picture[520:], orthogonal_slices(volume, after))
    assert (picture[:512] == YELLOW).all(-1).any()
    assert not (picture[520:] == YELLOW).all(-1).any()


def test_the_trainer_draws_from_a_file(item):
    path, mask = item()["image"], noise() > 0
    masks = (np.packbits(mask), np.packbits(~mask), mask.shape)
    case = Case(path, {}, empty_prediction=False, empty_truth=False, masks=masks)
    np.testing.assert_array_equal(DrawSlices()(case), orthogonal_slices(noise(), mask, ~mask))


def outcomes(recipe: str, volume: torch.Tensor, draws: int) -> list[torch.Tensor]:
    """All different results of a recipe on a volume (1, D, H, W) that is image and label."""
    transform = Compose(ConfigParser({"recipe": read_config(RECIPES)[recipe]}).get_parsed_content("recipe"))
    transform.set_random_state(0)
    found: dict[bytes, torch.Tensor] = {}
    for _ in range(draws):
        done = transform({"image": volume.clone(), "label": volume.clone() * 2})
        image, label = (done[k].as_tensor() for k in ("image", "label"))
        assert torch.equal(image * 2, label), "image and label turn together"
        found[image.numpy().tobytes()] = image
    return list(found.values())


def operations(recipe: str) -> list[np.ndarray]:
    """Matrices (z, y, x) of what a recipe may do, read off numbered voxels."""
    numbers = torch.arange(float(SIZE**3)).view(1, SIZE, SIZE, SIZE)
    axis = np.arange(SIZE) - (SIZE - 1) / 2
    before = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    matrices = []
    for result in outcomes(recipe, numbers, 100):
        came_from = before[result.numpy().ravel().astype(int)]  # result(p) = volume(A p)
        matrix = np.linalg.lstsq(before, came_from, rcond=None)[0].T
        np.testing.assert_allclose(before @ matrix.T, came_from, atol=1e-9)
        matrices.append(matrix.round().astype(int))
    return matrices


def as_set(matrices: list[np.ndarray]) -> set[tuple[int, ...]]:
    return {tuple(int(v) for v in m.ravel()) for m in matrices}


def test_augmentation_is_the_identity_and_the_three_half_turns():
    found = operations("augment")
    half_turns = [np.diag(d) for d in ([1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1])]
    assert as_set(found) == as_set(half_turns)
    assert all(round(np.linalg.det(m)) == 1 for m in found), "left-handed molecules stay left-handed"


def test_the_mirrored_recipe_turns_left_into_right_hands():
    found = operations("augment_mirrored")
    assert as_set(found) == as_set([np.diag(d) for d in product([1, -1], repeat=3)])
    assert sorted(round(np.linalg.det(m)) for m in found) == [-1] * 4 + [1] * 4


def missing_wedge(size: int, max_tilt: float = 60.0) -> np.ndarray:
    """Frequencies (z, y, x) that a tilt series about y with the beam along z does not measure. ``size`` is odd."""
    frequency = np.fft.fftfreq(size)
    z, x = frequency[:, None, None], frequency[None, None, :]
    return np.broadcast_to(np.abs(z) > np.abs(x) * np.tan(np.radians(max_tilt)) + 1e-9, (size,) * 3)


def energy_in_the_wedge(volume: np.ndarray) -> float:
    power = np.abs(np.fft.fftn(volume)) ** 2
    return float(power[missing_wedge(len(volume))].sum() / power.sum())


@pytest.mark.parametrize(("recipe", "count"), [("augment", 4), ("augment_mirrored", 8)])
def test_augmentation_keeps_the_missing_wedge(recipe, count):
    size = 15
    whole = noise(size=size).astype(np.float64)
    spectrum = np.fft.fftn(whole)
    spectrum[missing_wedge(size)] = 0
    volume = np.fft.ifftn(spectrum).real
    assert energy_in_the_wedge(volume) < 1e-20 < 0.1 < energy_in_the_wedge(whole)
    # what the check would see of turns that are not allowed: quarter turns about y, and about z
    assert energy_in_the_wedge(np.rot90(volume, axes=(0, 2))) > 0.1
    assert energy_in_the_wedge(np.rot90(volume, axes=(0, 1))) > 0.1
    assert energy_in_the_wedge(np.rot90(volume, axes=(1, 2))) > 0.1
    results = outcomes(recipe, torch.from_numpy(volume)[None], 100)
    assert len(results) == count
    for result in results:
        assert energy_in_the_wedge(result[0].numpy()) < 1e-20
