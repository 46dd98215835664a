"""Views on the network's grid, patches of them, and the way back to the file's own grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import Compose

from medseg.io.tomosynthesis import read_header, read_view
from medseg.io.tomosynthesis_nifti import write_nifti
from medseg.tasks.dbt_mass.views import (
    CheckView,
    LoadViewd,
    RandMassPatchd,
    boxes_of,
    boxes_to_grid,
    flip_columns,
    masks_of,
    numbers_of,
    resampled,
)

KEYS = ["image", "label"]


def load(item, spacing=(2.0, 1.0, 1.0), **arguments):
    return LoadViewd(KEYS, spacing, skin=1.0, **arguments)(item)


def test_a_left_view_on_its_own_grid(make_view):
    view = make_view((2, 10, 6, 5, 18, 14))
    item = load(view.item)
    image, label = item["image"], item["label"]
    assert image.shape == label.shape == (1, 8, 40, 32)
    assert image.dtype == torch.float32
    assert label.dtype == torch.uint8
    np.testing.assert_array_equal(label[0].numpy(), view.mask)
    header = read_header(view.image)
    np.testing.assert_allclose(image.affine.numpy(), header.affine)
    np.testing.assert_allclose(image.meta["native_affine"], header.affine)
    assert image.meta["filename_or_obj"] == str(view.image)
    assert tuple(image.meta["native_shape"]) == (8, 40, 32)
    assert boxes_of(label).tolist() == [[2, 10, 6, 5, 18, 14]]


def test_grey_values_are_kept_in_order_inside_and_0_outside(make_view):
    view = make_view()
    image = load(view.item)["image"][0].numpy()
    inside = image[0] > 0
    assert 0.3 < inside.mean() < 0.8
    assert ((image > 0) == inside).all()
    a, b = view.stored[:, inside].astype(float).ravel(), image[:, inside].ravel()
    order = np.argsort(a, kind="stable")
    assert (np.diff(b[order]) >= 0).all()
    assert image[:, inside].min() >= 0.01
    assert image.max() <= 1.5
    assert image.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (4.0, 2.0, 2.0), (1.0, 0.5, 0.5)])
def test_a_right_view_is_turned_and_finds_its_way_back(make_view, spacing):
    """A marked voxel has the same place in the patient through the affine of the file and of the turned image."""
    view = make_view((2, 10, 18, 6, 18, 26), laterality="R")
    item = load(view.item, spacing)
    image, label = item["image"], item["label"]
    assert image[0, :, :, 0].any(), "the chest wall is at low columns"
    assert not image[0, :, :, -1].any()
    header = read_header(view.image)
    centre = np.array([4, 14, 22, 1.0]) - [0.5, 0.5, 0.5, 0]  # of the mass, in indices
    marked = np.argwhere(label[0].numpy() > 0)
    found = np.append(marked.mean(axis=0), 1.0)
    np.testing.assert_allclose(image.affine.numpy() @ found, header.affine @ centre, atol=0.6 * max(spacing))
    back = boxes_to_grid(boxes_of(label).numpy(), image.affine.numpy(), header.affine)
    np.testing.assert_allclose(back, [[2, 10, 18, 6, 18, 26]], atol=1e-6)


def test_a_marker_voxel_of_a_right_view(make_view):
    view = make_view((3, 12, 20, 4, 13, 21), laterality="R")
    item = load(view.item)
    (place,) = np.argwhere(item["label"][0].numpy())
    assert place.tolist() == [3, 12, 31 - 20]
    assert item["image"][(0, *place)] == item["image"].max()
    world = read_header(view.image).affine @ [3, 12, 20, 1]
    np.testing.assert_allclose(item["image"].affine.numpy() @ [*place, 1], world, atol=1e-9)


def test_masses_keep_their_numbers(make_view):
    view = make_view((1, 8, 4, 3, 12, 8), (4, 24, 6, 7, 30, 10))
    mask = view.mask.copy()
    mask[mask == 2] = 9
    mask[mask == 1] = 4
    write_nifti(view.label, mask, read_header(view.image).affine)
    label = load(view.item)["label"]
    assert numbers_of(label) == [4, 9]
    assert boxes_of(label).tolist() == [[1, 8, 4, 3, 12, 8], [4, 24, 6, 7, 30, 10]]
    assert masks_of(label).shape == (2, 8, 40, 32)
    assert masks_of(label).sum((1, 2, 3)).tolist() == [2 * 4 * 4, 3 * 6 * 4]


def test_a_mask_that_lies_elsewhere_is_refused(make_view):
    """A converter may store the rows the other way round and say so in the affine: that is another grid."""
    view = make_view((1, 8, 4, 3, 12, 8))
    turned = read_header(view.image).affine @ np.array([[1, 0, 0, 0], [0, -1, 0, 39], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    write_nifti(view.label, view.mask[:, ::-1], turned)
    with pytest.raises(ValueError, match="lies elsewhere than its view"):
        load(view.item)
    assert "affines differ" in CheckView()({**view.item, "breast": "P-L", "patient": "P"})


def test_a_tiny_mass_keeps_a_voxel(make_view):
    label = load(make_view((3, 12, 7, 4, 13, 8)).item, (8.0, 5.0, 5.0))["label"]
    assert (label == 1).sum() >= 1
    assert boxes_of(label).shape == (1, 6)


def test_a_view_without_a_mass(make_view):
    label = load(make_view().item)["label"]
    assert boxes_of(label).shape == (0, 6)
    assert masks_of(label).shape == (0, 8, 40, 32)


def test_an_image_alone(make_view):
    view = make_view()
    item = LoadViewd(["image"], (2.0, 1.0, 1.0))({"image": read_header(view.image)})
    assert set(item) == {"image"}
    assert item["image"].meta["filename_or_obj"] == str(view.image)


def test_a_mask_on_another_grid_is_refused(make_view):
    view = make_view()
    write_nifti(view.label, np.zeros((8, 40, 30), np.uint8), np.eye(4))
    with pytest.raises(ValueError, match=r"_mask\.nii\.gz is \(8, 40, 30\) and its view .*\(8, 40, 32\); save it on"):
        load(view.item)


def test_a_contradicting_laterality_is_refused_or_allowed(make_view):
    view = make_view((2, 10, 18, 6, 18, 26), laterality="L", mirrored=True)
    with pytest.raises(ValueError, match=r"v\.dcm: the header says left breast, but the chest wall is at the high col"):
        load(view.item)
    item = load(view.item, check_laterality=False)
    assert boxes_of(item["label"]).tolist() == [[2, 10, 32 - 26, 6, 18, 32 - 18]]


def test_errors_are_kept_for_the_end(make_view):
    view = make_view()
    kept = load(view.item, keep_errors=True)
    assert kept["problem"] == ""
    view.image.write_bytes(view.image.read_bytes()[:9000])
    with pytest.raises(ValueError, match=r"v\.dcm is cut off"):
        load(view.item)
    kept = load(view.item, keep_errors=True)
    assert "v.dcm is cut off" in kept["problem"]
    assert kept["image"].meta["filename_or_obj"] == str(view.image)
    assert not kept["image"].any()
    gone = load({"image": "nowhere.dcm"}, keep_errors=True)
    assert "nowhere.dcm" in gone["problem"]


def test_an_empty_picture_names_its_file(make_view):
    view = make_view()
    write_nifti(view.label.with_name("flat.nii.gz"), np.full((8, 40, 32), 7, np.int16), np.diag([2.0, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"flat\.nii\.gz: no breast was found"):
        LoadViewd(["image"], (2.0, 1.0, 1.0))({"image": str(view.label.with_name("flat.nii.gz"))})


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0)])
def test_an_impossible_spacing_is_refused(spacing):
    with pytest.raises(ValueError, match="give three positive numbers in mm"):
        LoadViewd(["image"], spacing)


def test_shares_keep_the_volume():
    mask = np.zeros((8, 30, 30), bool)
    mask[2:6, 10:20, 5:25] = True
    share = resampled(mask, (2.0, 1.0, 1.0), (4.0, 2.0, 2.0))
    assert share.shape == (4, 15, 15)
    assert share.sum() * 16 == pytest.approx(mask.sum() * 2, rel=1e-5)
    assert share.min() >= 0
    assert share.max() <= 1 + 1e-6
    np.testing.assert_array_equal(resampled(mask, (2.0, 1.0, 1.0), (2.0, 1.0, 1.0)), mask)


# --- boxes


places = st.lists(
    st.tuples(*[st.floats(-20, 60, width=32)] * 3, *[st.floats(0.5, 40, width=32)] * 3), min_size=0, max_size=4
)


def grid(draw) -> np.ndarray:
    """Parallel axes: scales, flips, a rotation that all share is added elsewhere."""
    scales = [draw(st.floats(0.1, 5)) * draw(st.sampled_from([-1, 1])) for _ in range(3)]
    affine = np.diag([*scales, 1.0])
    affine[:3, 3] = [draw(st.floats(-100, 100)) for _ in range(3)]
    return affine


@given(places, st.data())
def test_boxes_go_to_another_grid_and_back(values, data):
    turn, _ = np.linalg.qr(np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(3, 3)))
    rotation = np.eye(4)
    rotation[:3, :3] = turn
    boxes = np.array([[*v[:3], *np.add(v[:3], v[3:])] for v in values]).reshape(-1, 6)
    first, second = rotation @ grid(data.draw), rotation @ grid(data.draw)
    there = boxes_to_grid(boxes, first, second)
    assert (there[:, 3:] > there[:, :3]).all()
    np.testing.assert_allclose(boxes_to_grid(there, second, first), boxes, atol=1e-6)


def test_boxes_of_a_finer_and_a_flipped_grid():
    half = np.diag([1.0, 0.5, 0.5, 1.0])
    half[:3, 3] = [0, -0.25, -0.25]  # the same corner: edge of voxel 0 at -0.5
    boxes = np.array([[1.0, 2, 3, 4, 6, 8]])
    np.testing.assert_allclose(boxes_to_grid(boxes, np.eye(4), half), [[1, 4, 6, 4, 12, 16]])
    np.testing.assert_allclose(boxes_to_grid(boxes, flip_columns(10), np.eye(4)), [[1, 2, 2, 4, 6, 7]])


# --- patches


def patch_item(shape=(8, 30, 30), *boxes):
    label = torch.zeros(1, *shape, dtype=torch.uint8)
    for number, (d0, h0, w0, d1, h1, w1) in enumerate(boxes, start=1):
        label[0, d0:d1, h0:h1, w0:w1] = number
    image = torch.arange(label.numel(), dtype=torch.float32).reshape(label.shape) + 1
    return {"image": MetaTensor(image), "label": label, "patient": "P1"}


def draws(transform, item, count=200):
    transform.set_random_state(seed=0)
    return [transform(item) for _ in range(count)]


@pytest.mark.parametrize(("positive", "low", "high"), [(1.0, 1.0, 1.0), (0.5, 0.45, 0.75), (0.0, 0.0, 0.2)])
def test_share_of_patches_at_a_mass(positive, low, high):
    item = patch_item((8, 60, 60), (2, 4, 4, 6, 12, 12))
    shown = [bool(p["label"].any()) for p in draws(RandMassPatchd((8, 20, 20), positive), item)]
    assert low <= np.mean(shown) <= high


def test_a_mass_that_fits_is_whole_in_a_patch_drawn_at_it():
    item = patch_item((12, 60, 60), (3, 20, 30, 6, 32, 45))
    corners = set()
    for patch in draws(RandMassPatchd((8, 20, 20), 1.0), item, 100):
        assert patch["image"].shape == patch["label"].shape == (1, 8, 20, 20)
        assert patch["label"].sum() == item["label"].sum()
        (box,) = boxes_of(patch["label"]).tolist()
        assert [b - a for a, b in zip(box[:3], box[3:], strict=True)] == [3, 12, 15]
        corners.add(tuple(box[:3]))
        first = int(patch["image"][0, 0, 0, 0]) - 1  # image and label are cut at the same place
        corner = np.unravel_index(first, (12, 60, 60))
        assert [c + b for c, b in zip(corner, box[:3], strict=True)] == [3, 20, 30]
        assert patch["patient"] == "P1"
    assert len(corners) > 30, "not always in the middle"
    assert item["label"].shape == (1, 12, 60, 60)


def test_a_mass_larger_than_the_patch():
    item = patch_item((8, 60, 60), (0, 5, 5, 8, 55, 55))
    for patch in draws(RandMassPatchd((8, 40, 40), 1.0), item, 20):
        assert boxes_of(patch["label"]).shape == (1, 6)


def test_most_of_a_cut_mass_must_be_inside():
    item = patch_item((4, 40, 40), (0, 0, 0, 4, 20, 20), (0, 18, 22, 4, 34, 38))
    before = [int((item["label"] == v).sum()) for v in (1, 2)]
    kept = set()
    for patch in draws(RandMassPatchd((4, 20, 20), 0.5), item):
        corner = np.unravel_index(int(patch["image"][0, 0, 0, 0]) - 1, (4, 40, 40))
        window = item["label"][0, :, corner[1] : corner[1] + 20, corner[2] : corner[2] + 20]
        for value, whole in zip((1, 2), before, strict=True):
            share = int((window == value).sum()) / whole
            assert bool((patch["label"] == value).any()) == (share >= 0.25)
            kept.add((value, 0 < share < 0.25))
    assert len(kept) == 4, "both masses were kept, and cut away"
    assert [int((item["label"] == v).sum()) for v in (1, 2)] == before, "the item is not changed"


def test_a_small_volume_is_padded_at_the_end():
    item = patch_item((3, 10, 30), (0, 2, 3, 2, 6, 8))
    (patch,) = draws(RandMassPatchd((8, 20, 20), 1.0), item, 1)
    assert patch["image"].shape == patch["label"].shape == (1, 8, 20, 20)
    assert not patch["image"][:, 3:].any()
    assert not patch["image"][:, :, 10:].any()
    assert patch["image"][:, :3, :10].all()
    assert patch["label"].sum() == item["label"].sum()


def test_the_same_state_draws_the_same_patches():
    item = patch_item((8, 60, 60), (2, 4, 4, 6, 12, 12))
    first, second = (Compose([RandMassPatchd((8, 20, 20))]) for _ in range(2))
    for transform in (first, second):
        transform.set_random_state(seed=4)
    for _ in range(5):
        torch.testing.assert_close(first(item)["image"].as_tensor(), second(item)["image"].as_tensor())


# --- data lists


def test_items_are_checked_by_their_headers(make_view, tmp_path):
    view = make_view()
    item = {**view.item, "breast": "P1-L", "patient": "P1"}
    check = CheckView()
    assert check(item) is None
    assert 'has no "breast"; give one name to all views of a breast' in check({**item, "breast": ""})
    assert 'has no "patient"; views of a patient must stay' in check({**item, "patient": ""})
    assert "no file" in check({**item, "image": str(tmp_path / "gone.dcm")})
    write_nifti(tmp_path / "other.nii.gz", np.zeros((8, 40, 30), np.uint8), np.eye(4))
    assert "save it on the view's grid" in check({**item, "label": str(tmp_path / "other.nii.gz")})
    view.image.write_bytes(view.image.read_bytes()[:9000])
    assert "v.dcm is cut off" in check(item)


def test_simulated_boxes_on_the_native_grid_are_those_of_the_masks(tiny_breasts):
    for image in sorted((tiny_breasts / "views").glob("*.dcm"))[:6]:
        mask = tiny_breasts / "masks" / f"{image.stem}.nii.gz"
        item = LoadViewd(KEYS, (4.0, 2.5, 2.5))({"image": str(image), "label": str(mask)})
        native = read_header(image).affine
        places = np.argwhere(read_view(read_header(mask))[0] > 0)
        expected = [[*places.min(axis=0), *(places.max(axis=0) + 1)]]
        found = boxes_to_grid(boxes_of(item["label"]).numpy(), item["image"].affine.numpy(), native)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert item["image"][0, :, :, 0].any(), "the chest wall is at low columns"
