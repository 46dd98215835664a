"""Spatial fuzzy C-means: updates against loops, phantoms, and masks that come back at their place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.detection.patches import paste_masks
from medseg.tasks.dbt_mass.fuzzy_c_means import SpatialFuzzyCMeans

SHAPE = (20, 40, 36)
BOX = (5.0, 10.0, 12.0, 15.0, 28.0, 26.0)


def ellipsoid(shape=SHAPE, box=BOX) -> np.ndarray:
    """Voxels whose centres lie in the ellipsoid that fills a box."""
    low, high = np.array(box[:3]), np.array(box[3:])
    centres = np.moveaxis(np.indices(shape), 0, -1) + 0.5
    return ((2 * (centres - low) / (high - low) - 1) ** 2).sum(axis=-1) <= 1


def phantom(noise: float, seed: int = 0, offset=0.3, contrast=0.3) -> tuple[np.ndarray, np.ndarray]:
    mass = ellipsoid()
    return offset + contrast * mass + np.random.default_rng(seed).normal(0, noise, SHAPE), mass


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def one_update(region: np.ndarray, centres: np.ndarray, m: float, p: float, q: float, window: int):
    """New centres and memberships u', by the equations voxel by voxel."""
    clusters, reach = len(centres), window // 2
    u = np.zeros((clusters, *region.shape))
    inside = [j for j in np.ndindex(region.shape) if region[j] != 0]
    for j in inside:
        distance = [abs(region[j] - v) for v in centres]
        for i in range(clusters):
            u[i][j] = 1 / sum((distance[i] / d) ** (2 / (m - 1)) for d in distance)
    spatial = np.zeros_like(u)
    for j in inside:
        h = [0.0] * clusters
        for step in itertools.product(range(-reach, reach + 1), repeat=3):
            k = tuple(np.add(j, step))
            if all(0 <= a < n for a, n in zip(k, region.shape, strict=True)):
                h = [h[i] + u[i][k] for i in range(clusters)]
        products = [u[i][j] ** p * h[i] ** q for i in range(clusters)]
        for i in range(clusters):
            spatial[i][j] = products[i] / sum(products)
    weights = spatial**m
    return (weights * region).sum(axis=(1, 2, 3)) / weights.sum(axis=(1, 2, 3)), spatial


@pytest.mark.parametrize(
    ("clusters", "m", "p", "q", "window"),
    [(2, 2, 1, 1, 3), (3, 2, 1, 2, 3), (2, 1.5, 2, 0.5, 5), (4, 3, 0, 1, 3), (2, 1.1, 1, 1, 1)],
)
def test_one_update_is_the_equations_voxel_by_voxel(clusters, m, p, q, window):
    region = np.random.default_rng(1).uniform(20, 900, (4, 5, 6))
    region[:2, 0] = 0  # outside of the breast
    start = np.quantile(region[region != 0], (np.arange(clusters) + 0.5) / clusters)
    expected, memberships = one_update(region, start, m, p, q, window)
    fcm = SpatialFuzzyCMeans(clusters, m, p, q, window=window, iterations=1)
    found, found_memberships = fcm.fit(region)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found_memberships, memberships, atol=1e-9)


@pytest.mark.parametrize("clusters", [2, 3])
def test_without_the_spatial_function_it_is_plain_fuzzy_c_means(clusters):
    region = phantom(0.05)[0]
    values = region.ravel()
    centres = np.quantile(values, (np.arange(clusters) + 0.5) / clusters)
    for _ in range(200):  # the textbook form, over a flat list of values
        u = 1 / ((np.abs(values - centres[:, None])[:, None] / np.abs(values - centres[:, None])[None]) ** 2).sum(
            axis=1
        )
        centres = (u**2 @ values) / (u**2).sum(axis=1)
    found, memberships = SpatialFuzzyCMeans(clusters, q=0, iterations=200, tolerance=0).fit(region)
    np.testing.assert_allclose(found, centres, atol=1e-7)
    np.testing.assert_allclose(memberships.reshape(clusters, -1), u, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 4), st.floats(1.2, 4))
def test_the_objective_of_plain_fuzzy_c_means_never_grows(seed, clusters, m):
    region = np.random.default_rng(seed).gamma(2, 1, (4, 6, 6))
    objective = []
    for iterations in range(1, 12):
        fcm = SpatialFuzzyCMeans(clusters, m, q=0, iterations=iterations, tolerance=0)
        centres, u = fcm.fit(region)
        objective.append((u**m * (region - centres[:, None, None, None]) ** 2).sum())
    assert (np.diff(objective) <= 1e-9 * objective[0]).all()


def test_the_spatial_function_removes_specks():
    around = tuple(slice(a - 2, b + 2) for a, b in zip((5, 10, 12), (15, 28, 26), strict=True))
    region, mass = (array[around] for array in phantom(0.1))
    centres, plain = SpatialFuzzyCMeans(q=0).fit(region)
    bright = plain.argmax(axis=0) == centres.argmax()
    centres, spatial = SpatialFuzzyCMeans().fit(region)
    cleaned = spatial.argmax(axis=0) == centres.argmax()
    threshold = region > region[mass].mean() / 2 + region[~mass].mean() / 2  # the best there is, from the truth
    assert (cleaned & ~mass).sum() < (bright & ~mass).sum() / 3
    assert (cleaned & ~mass).sum() < (threshold & ~mass).sum() / 2
    assert dice(cleaned, mass) > max(dice(bright, mass), dice(threshold, mass)) + 0.05


@pytest.mark.parametrize("window", [3, 5])
def test_masks_land_in_the_voxels_of_the_mass(window):
    region, mass = phantom(0.04, offset=500, contrast=0.3)
    volume = torch.from_numpy(region - 500 + 0.3)
    boxes = torch.tensor([BOX, [4.3, 8.2, 11.5, 16.1, 29.7, 28.4]])
    masks = SpatialFuzzyCMeans(window=window, size=(20, 36, 28))(volume.float(), boxes)
    assert masks.shape == (2, 20, 36, 28)
    assert masks.dtype == torch.float32
    for where, pasted in paste_masks(boxes, masks, SHAPE):
        whole = np.zeros(SHAPE, dtype=bool)
        whole[where] = pasted.numpy() >= 0.5
        assert dice(whole, mass) > 0.95


def test_a_shift_of_the_volume_shifts_the_mask_and_other_units_change_nothing():
    region, _ = phantom(0.04)
    fcm = SpatialFuzzyCMeans()
    box = torch.tensor([BOX])
    mask = fcm(torch.from_numpy(region), box)
    moved = np.zeros((26, 43, 40))
    moved[6:, 3:, 4:] = region
    assert torch.equal(fcm(torch.from_numpy(moved), box + torch.tensor([6, 3, 4, 6, 3, 4])), mask)
    assert torch.equal(fcm(torch.from_numpy(1000 * region), box), mask)
    assert torch.equal(fcm(torch.from_numpy(region), box), mask)  # and again: nothing is drawn


def test_zero_outside_of_the_breast_does_not_count():
    region, mass = phantom(0.03)
    region[:, :, 22:] = 0  # the breast ends inside the box: with these voxels the dark cluster would be at 0
    mass[:, :, 22:] = False
    centres, memberships = SpatialFuzzyCMeans().fit(region)
    np.testing.assert_allclose(sorted(centres), [0.3, 0.6], atol=0.03)
    assert (memberships[:, region == 0] == 0).all()
    np.testing.assert_allclose(memberships.sum(axis=0)[region != 0], 1)
    found = SpatialFuzzyCMeans().segment(region)
    assert found.dtype == bool
    assert dice(found, mass) > 0.95
    assert not found[region == 0].any()


def test_the_component_in_the_middle_is_taken_even_if_another_one_is_larger():
    region = np.full((9, 24, 24), 0.2)
    region[3:6, 10:14, 10:14] = 0.8
    middle = region == 0.8
    region[:, :4, :] = 0.8  # e.g. the chest wall
    fcm = SpatialFuzzyCMeans(q=0)
    np.testing.assert_array_equal(fcm.segment(region), middle)
    region[middle] = 0.2
    np.testing.assert_array_equal(fcm.segment(region), region == 0.8)  # nothing in the middle: the largest
    region[-1, -1, -1] = 0.8
    assert not fcm.segment(region)[-1, -1, -1]


def test_a_box_that_reaches_beyond_the_volume_has_its_mass_where_it_is():
    region, mass = phantom(0.02)
    volume = torch.from_numpy(region[:, :, 19:])  # the volume's border cuts the mass
    box = torch.tensor([BOX]) - torch.tensor([0, 0, 19, 0, 0, 19])
    masks = SpatialFuzzyCMeans(size=(20, 36, 28))(volume, box)
    assert not masks[..., :14].any()  # the half of the box outside of the volume
    (where, pasted), *_ = paste_masks(box, masks, volume.shape)
    assert dice(pasted.numpy() >= 0.5, mass[:, :, 19:][where]) > 0.93


def test_empty_cases_give_empty_masks():
    fcm = SpatialFuzzyCMeans(size=(4, 5, 6))
    region, _ = phantom(0.02)
    volume = torch.from_numpy(region)
    none = fcm(volume, torch.zeros((0, 6)))
    assert none.shape == (0, 4, 5, 6)
    assert none.dtype == torch.float32
    boxes = torch.tensor(
        [
            [5, 10, 12, 15, 10.5, 26],  # a side of half a voxel
            [5, 10, 12, 5, 10, 12],
            [15, 28, 26, 5, 10, 12],  # upside down
            [50, 10, 12, 60, 28, 26],  # outside of the volume
            [-30, 10, 12, -20, 28, 26],
        ],
        dtype=torch.float32,
    )
    assert not fcm(volume, boxes).any()
    assert not fcm(torch.zeros(SHAPE), torch.tensor([BOX])).any()
    assert not fcm(torch.full(SHAPE, 0.4), torch.tensor([BOX])).any()
    assert not fcm.segment(np.zeros((0, 3, 3))).any()
    assert fcm(volume, torch.tensor([[9.0, 10, 12, 10, 28, 26]])).any()  # one slice is enough


@pytest.mark.parametrize("clusters", [2, 3, 5])
def test_few_different_intensities_are_enough(clusters):
    region = np.full((6, 10, 10), 0.2)
    region[2:4, 4:6, 4:6] = 0.9  # all quantiles are 0.2
    found = SpatialFuzzyCMeans(clusters, q=0).segment(region)
    np.testing.assert_array_equal(found, region == 0.9)


def test_inputs_stay_as_they_were():
    region, _ = phantom(0.1)
    volume, boxes = torch.from_numpy(region.copy()), torch.tensor([BOX])
    fcm = SpatialFuzzyCMeans()
    fcm(volume, boxes)
    fcm.segment(volume.numpy())
    np.testing.assert_array_equal(volume.numpy(), region)
    assert torch.equal(boxes, torch.tensor([BOX]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": 1}, "clusters is 1"),
        ({"fuzziness": 1.0}, "fuzziness is 1"),
        ({"q": -1.0}, "q is -1"),
        ({"p": 0.0, "q": 0.0}, "both 0"),
        ({"window": 4}, "window is 4; pass an odd"),
        ({"enlarge": float("nan")}, "enlarge is nan"),
        ({"iterations": 0}, "iterations is 0"),
        ({"size": (3, 3)}, "three numbers"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SpatialFuzzyCMeans(**options)


def test_wrong_inputs_are_refused():
    fcm, box = SpatialFuzzyCMeans(), torch.tensor([BOX])
    with pytest.raises(ValueError, match="without channels"):
        fcm(torch.ones(1, *SHAPE), box)
    with pytest.raises(ValueError, match=r"\(N, 6\)"):
        fcm(torch.ones(SHAPE), box[:, :4])
    with pytest.raises(ValueError, match="corner that is not finite"):
        fcm(torch.ones(SHAPE), box * float("nan"))
    with pytest.raises(ValueError, match="voxel of the region is not finite"):
        fcm(torch.full(SHAPE, float("nan")), box)
    with pytest.raises(ValueError, match="less than two different"):
        fcm.fit(np.ones((3, 3, 3)))
    with pytest.raises(ValueError, match="without channels"):
        fcm.segment(np.ones((3, 3)))
