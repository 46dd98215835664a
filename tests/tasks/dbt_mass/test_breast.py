"""The breast's outline and its grey values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.filters import threshold_multiotsu

from medseg.tasks.dbt_mass.breast import breast_region, chest_wall_at_low_columns, normalise, otsu_thresholds


def between_variance(values: np.ndarray, low: float, high: float) -> float:
    """Straight from Otsu's definition."""
    classes = [values[values < low], values[(values >= low) & (values < high)], values[values >= high]]
    mean = values.mean()
    return sum(len(c) * (c.mean() - mean) ** 2 for c in classes if len(c)) / len(values)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.tuples(*[st.integers(5, 200)] * 3))
def test_two_thresholds_are_the_best_pair(seed, counts):
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(m, 0.6, n) for m, n in zip((0, 4, 9), counts, strict=True)])
    low, high = otsu_thresholds(values, bins=24)
    edges = np.histogram_bin_edges(values, 24)
    centres = (edges[:-1] + edges[1:]) / 2
    binned = centres[np.clip(np.digitize(values, edges) - 1, 0, 23)]
    best = max(between_variance(binned, a, b) for i, a in enumerate(edges) for b in edges[i:])
    assert between_variance(binned, low, high) == pytest.approx(best, rel=1e-9)
    assert low <= high


def test_thresholds_of_scikit_image():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(m, 0.5, n) for m, n in ((0, 3000), (4, 2000), (9, 800))])
    ours, theirs = otsu_thresholds(values), threshold_multiotsu(values, 3, nbins=256)
    width = np.ptp(values) / 256
    np.testing.assert_allclose(ours, theirs, atol=2 * width)  # they name centres of bins, we edges


def phantom(skin: int, shape=(6, 60, 50)) -> tuple[np.ndarray, np.ndarray]:
    """A volume with air, fat, some gland and a bright skin; and the tissue (H, W) inside the skin."""
    h, w = np.mgrid[: shape[1], : shape[2]]
    rim = 1 - np.sqrt(((h - 29.5) / 26) ** 2 + (w / 42) ** 2)
    inside, core = rim > 0, rim * 26 > skin
    picture = 0.05 + 0.5 * inside + 0.35 * (inside & ~core) + 0.3 * ((h - 30) ** 2 + (w - 15) ** 2 < 60)
    rng = np.random.default_rng(0)
    return (picture + 0.02 * rng.normal(size=shape)).astype(np.float32), core


@pytest.mark.parametrize("flipped", [False, True])
def test_skin_and_background_are_cut_off(flipped):
    volume, core = phantom(skin=3)
    if flipped:
        volume, core = volume[:, :, ::-1], core[:, ::-1]
    region = breast_region(volume, (2.0, 1.0, 1.0), skin=3.0)
    assert region.shape == core.shape
    overlap = (region & core).sum()
    assert 2 * overlap / (region.sum() + core.sum()) > 0.93
    wall = -1 if flipped else 0
    assert region[20:40, wall].all(), "nothing is cut off at the chest wall"
    assert chest_wall_at_low_columns(region) is not flipped


def test_skin_is_in_millimetres():
    volume, _ = phantom(skin=3)
    thin, thick = (breast_region(volume, (2.0, s, s), skin=3.0).sum() for s in (3.0, 1.0))
    none = breast_region(volume, (2.0, 1.0, 1.0), skin=0.0).sum()
    assert thick < thin < none


def test_a_label_in_the_corner_is_no_breast():
    volume, _ = phantom(skin=2)
    volume[:, 2:8, 44:49] = 5.0
    region = breast_region(volume, (2.0, 1.0, 1.0), skin=0.0)
    assert not region[2:8, 44:49].any()


def test_a_constant_volume_has_no_breast():
    assert not breast_region(np.full((3, 8, 8), 2.0, np.float32), (1.0, 1.0, 1.0)).any()


def test_an_empty_region_is_one_of_a_left_view():
    assert chest_wall_at_low_columns(np.zeros((4, 4), bool))


def test_percentiles_become_the_ends_of_the_range():
    rng = np.random.default_rng(0)
    volume = rng.normal(100, 20, (16, 40, 40)).astype(np.float32)
    region = np.zeros((40, 40), bool)
    region[5:30, :20] = True
    scaled = normalise(volume, region)
    assert scaled.dtype == np.float32
    assert (scaled[:, ~region] == 0).all()
    inside = scaled[:, region]
    assert inside.min() == pytest.approx(0.01)
    assert inside.max() <= 1.5
    low, high = np.percentile(volume[:, region], [1, 99])
    middle = (volume > low) & (volume < high) & region
    np.testing.assert_allclose(scaled[middle], (volume[middle] - low) / (high - low) * 0.98 + 0.01, atol=1e-5)


def test_a_bright_spot_is_cut():
    volume = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    volume[0, 3, 3] = 1e6
    assert normalise(volume, np.ones((20, 20), bool)).max() == np.float32(1.5)


@pytest.mark.parametrize(
    ("region", "message"), [(np.zeros((5, 5), bool), "no breast was found"), (np.ones((5, 5), bool), "constant")]
)
def test_nothing_to_scale_is_refused(region, message):
    with pytest.raises(ValueError, match=message):
        normalise(np.full((3, 5, 5), 4.0, np.float32), region)
