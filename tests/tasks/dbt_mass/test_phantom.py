from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.tasks.dbt_mass.acquisition import Acquisition
from medseg.tasks.dbt_mass.masses import KINDS, Mass, draw_mass, render_mass
from medseg.tasks.dbt_mass.phantom import (
    FAT,
    GLAND,
    GLAND_SHARE,
    VIEWS,
    Grid,
    Population,
    ViewAnatomy,
    draw_breast,
    make_view,
    tissue,
)
from medseg.tasks.dbt_mass.texture import power_law_field

GRID = Grid()


def breasts(count: int, **population) -> list:
    return [draw_breast(np.random.SeedSequence((7, i)), GRID, Population(**population)) for i in range(count)]


def slope(spectrum: np.ndarray, k: np.ndarray) -> float:
    """Exponent of a power law, fitted between 1/16 and 1/4 of the sampling frequency."""
    inner = (k > 1 / 16) & (k < 1 / 4)
    return float(np.polyfit(np.log(k[inner]), np.log(spectrum[inner]), 1)[0])


def frequencies(shape: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")))


@pytest.mark.parametrize("exponent", [2.2, 2.5, 3.0])
def test_texture_has_the_power_law_that_was_asked_for(exponent):
    rng = np.random.default_rng(0)
    field = power_law_field(rng, (48, 64, 50), (1.0, 1.0, 1.0), exponent)
    assert field.dtype == np.float32
    assert abs(field.mean()) < 1e-4
    assert field.std() == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.fftn(field)) ** 2
    assert slope(power, frequencies(field.shape)) == pytest.approx(-exponent, abs=0.1)
    # a projection is a slice of the spectrum: the exponent stays (Burgess: 3 in mammograms)
    shadows = [power_law_field(rng, (16, 64, 50), (1.0, 1.0, 1.0), exponent).sum(axis=0) for _ in range(20)]
    shadow = np.mean([np.abs(np.fft.fft2(s)) ** 2 for s in shadows], axis=0)
    assert slope(shadow, frequencies(shadow.shape)) == pytest.approx(-exponent, abs=0.15)


def test_texture_is_isotropic_in_millimetres():
    field = power_law_field(np.random.default_rng(1), (32, 64, 64), (2.0, 1.0, 1.0), 3.0)
    apart = [np.mean(field * np.roll(field, step, axis)) for axis, step in ((0, 3), (1, 6), (2, 6))]  # 6 mm each
    assert np.ptp(apart) < 0.12


def test_the_same_seed_is_the_same_breast_and_views_are_unlike():
    a, b = (draw_breast(np.random.SeedSequence(4), GRID) for _ in range(2))
    assert a == b
    assert a != draw_breast(np.random.SeedSequence(5), GRID)
    (one, mask), (two, same) = (make_view(x, "CC", GRID) for x in (a, b))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(mask, same)
    other, _ = make_view(a, "MLO", GRID)
    assert not np.array_equal(one, other)


def test_view_and_mask_are_well_formed():
    for breast in breasts(4):
        for name in VIEWS:
            attenuation, _ = tissue(breast, name, GRID)
            volume, mask = make_view(breast, name, GRID)
            assert volume.shape == mask.shape == GRID.shape
            assert volume.dtype == np.float32
            assert mask.dtype == np.uint8
            assert set(np.unique(mask)) == {0, 1}
            assert 0 <= volume.min() <= volume.max() <= 1
            assert (attenuation[mask == 1] > FAT).all(), "the mask lies within the breast"
            low, high = np.percentile(volume[attenuation > 0.9 * FAT], (1, 99))
            assert low == pytest.approx(0.1, abs=0.02)
            assert high == pytest.approx(0.9, abs=0.02)
            air = attenuation.max(axis=0) == 0
            assert volume[:, air].mean() < 0.05
            assert volume[..., 0].mean() > 2 * volume[..., -1].mean(), "chest wall at w = 0"


def test_without_a_mass_the_mask_is_empty_and_half_of_the_breasts_can_be_normal():
    drawn = breasts(60, normal=0.5)
    healthy = [b for b in drawn if b.mass is None]
    assert 15 < len(healthy) < 45
    view = healthy[0].views["CC"]
    assert (view.mass_centre, view.mass_diameter, view.nipple_mm) == (None, 0.0, 0.0)
    assert not make_view(healthy[0], "CC", GRID)[1].any()
    assert all(b.mass is None for b in breasts(5, normal=1))


def test_patients_are_like_those_of_the_paper():
    drawn = breasts(800)
    ages = [b.age for b in drawn]
    assert min(ages) >= 18
    assert max(ages) <= 88
    assert np.mean(ages) == pytest.approx(52, abs=2)
    densities = Counter(b.density for b in drawn)
    for density, share in zip((1, 2, 3, 4), (0.1, 0.3, 0.4, 0.2), strict=True):
        assert densities[density] / 800 == pytest.approx(share, abs=0.06)
    kinds = Counter(b.mass.kind for b in drawn)
    for kind, (share, _, _) in KINDS.items():
        assert kinds[kind] / 800 == pytest.approx(share / 364, abs=0.06)
    benign = [b for b in drawn if b.mass.histology == "benign"]
    assert len(benign) / 800 == pytest.approx(75 / 364, abs=0.06)
    assert np.mean([b.mass.kind == "round/oval" for b in benign]) > 0.6
    diameters = [b.mass.diameter for b in drawn]
    assert min(diameters) >= 10
    assert max(diameters) <= 55
    assert np.median(diameters) == pytest.approx(28, abs=3)
    assert {b.laterality for b in drawn} == {"L", "R"}


def test_both_views_show_the_same_mass_at_about_the_same_distance_from_the_nipple():
    for breast in breasts(300):
        cc, mlo = breast.views["CC"], breast.views["MLO"]
        assert cc.nipple_mm == pytest.approx(mlo.nipple_mm, rel=0.1)
        assert cc.mass_diameter == pytest.approx(mlo.mass_diameter, rel=0.11)
        assert cc.seed != mlo.seed
        assert cc.muscle == (0, 0)
        assert min(mlo.muscle) > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31))
def test_every_mass_leaves_a_truth_of_its_size(seed):
    breast = draw_breast(np.random.SeedSequence(seed), GRID)
    for name in VIEWS:
        _, mask = tissue(breast, name, GRID)
        diameter, ratios = breast.views[name].mass_diameter, breast.mass.ratios
        volume = float(mask.sum()) * np.prod(GRID.spacing)
        assert 0.25 < volume / (np.pi / 6 * diameter**3 * ratios[0] * ratios[2]) < 1.3
        low, high = np.argwhere(mask).min(axis=0), np.argwhere(mask).max(axis=0) + 1
        size = (high - low) * GRID.spacing
        assert (size <= 1.15 * diameter + 2 * np.array(GRID.spacing)).all()
        assert size[1:].max() >= 0.6 * diameter
        centre = (low + high) / 2 * GRID.spacing - np.array([GRID.extent[0] / 2, 0, 0])
        assert np.linalg.norm(centre - breast.views[name].mass_centre) < 0.35 * diameter


@pytest.mark.parametrize("kind", list(KINDS))
def test_masses_of_every_kind_on_a_fine_grid(kind):
    """Longest chord = diameter; round ones fill their ellipsoid, irregular ones do not; spicules are outside."""
    filled = []
    axes = tuple((np.arange(100) + 0.5).astype(np.float32) - 50 for _ in range(3))
    for seed in range(6):
        mass = replace(draw_mass(np.random.default_rng(seed), (1.2, 1.2), (50, 50)), kind=kind, ratios=(0.8, 1, 0.9))
        corner, amount, core = render_mass(mass, (0.0, 0.0, 0.0), 40.0, 0.3, axes)
        assert amount.shape == core.shape
        assert 0 <= amount.min() <= amount.max() <= 1
        places = np.argwhere(core) + corner - 49.5
        # star-shaped, so the longest chord through the centre: the farthest voxel pair in opposite directions
        directions = places / np.linalg.norm(places, axis=1, keepdims=True)
        probe = directions[:: len(directions) // 300]
        chords = [places[(directions @ p) > 0.998] @ p for p in probe]
        back = [places[(directions @ p) < -0.998] @ -p for p in probe]
        longest = max(c.max() + b.max() for c, b in zip(chords, back, strict=True) if len(c) and len(b))
        assert longest == pytest.approx(40, abs=3)
        assert ndimage.label(core, np.ones((3, 3, 3)))[1] == 1
        filled.append(core.sum() / (np.pi / 6 * 40**3 * 0.8 * 0.9))
        beyond = (amount > 0.4) & ~ndimage.binary_dilation(core, iterations=2)
        assert beyond.any() == (kind == "spiculated")
    expected = {"round/oval": (0.8, 1.05), "spiculated": (0.55, 1.0), "irregular": (0.3, 0.85)}[kind]
    assert expected[0] < np.mean(filled) < expected[1]


def test_a_round_mass_without_modulation_is_an_ellipsoid(monkeypatch):
    monkeypatch.setitem(KINDS, "round/oval", (1, 0.5, 0.0))
    axes = tuple((np.arange(60) + 0.5).astype(np.float32) for _ in range(3))
    mass = Mass("round/oval", "benign", 1.2, 30.0, (0.7, 1.0, 0.8), 1)
    corner, _, core = render_mass(mass, (30.0, 31.0, 29.0), 30.0, np.pi / 2, axes)
    whole = np.zeros((60, 60, 60), bool)
    whole[tuple(slice(c, c + n) for c, n in zip(corner, core.shape, strict=True))] = core
    d, h, w = np.meshgrid(*axes, indexing="ij")
    # a quarter turn: the long axis, h, comes to lie along w
    expected = ((d - 30) / 10.5) ** 2 + ((h - 31) / 12) ** 2 + ((w - 29) / 15) ** 2 < 1
    assert (whole != expected).mean() < 0.001


@pytest.mark.parametrize("conspicuity", [(1.03, 1.10), (1.12, 1.30)])
def test_masses_have_the_contrast_that_was_asked_for_before_they_are_imaged(conspicuity):
    for breast in breasts(12, conspicuity=conspicuity):
        assert conspicuity[0] <= breast.mass.contrast <= conspicuity[1]
        attenuation, mask = tissue(breast, "CC", GRID)
        inner = ndimage.binary_erosion(mask)
        if inner.sum() > 20:
            assert attenuation[inner].mean() / GLAND == pytest.approx(breast.mass.contrast, abs=0.02)


def test_denser_classes_have_more_glands():
    breast = draw_breast(np.random.SeedSequence(3), GRID, Population(normal=1))
    shares = []
    for density in (1, 2, 3, 4):
        attenuation, _ = tissue(replace(breast, density=density), "CC", GRID)
        inside = ndimage.binary_erosion(attenuation > 0.9 * FAT, iterations=2)
        shares.append(float((attenuation[inside] > (FAT + GLAND) / 2).mean()))
    assert shares == sorted(shares)
    np.testing.assert_allclose(shares, GLAND_SHARE, atol=0.12)


def test_the_muscle_is_in_the_upper_corner_of_oblique_views_only():
    for breast in breasts(4, normal=1, densities=(1.0, 0.0, 0.0, 0.0)):
        for name, brighter in (("CC", False), ("MLO", True)):
            attenuation, _ = tissue(breast, name, GRID)
            view = breast.views[name]
            row = int((view.middle - 0.75 * view.half_width) / GRID.spacing[1])
            below = int((view.middle + 0.75 * view.half_width) / GRID.spacing[1])
            corner, mirrored = (attenuation[14:18, r : r + 4, :4].mean() for r in (row, below))
            assert (corner > 1.2 * mirrored) == brighter


def test_the_mass_is_seen_in_its_slice():
    """Brighter than around it in most fatty breasts; the contrast through the slices falls off."""
    seen = []
    for breast in breasts(12, densities=(1.0, 0.0, 0.0, 0.0)):
        volume, mask = make_view(breast, "CC", GRID)
        focus = int(mask.sum(axis=(1, 2)).argmax())
        core = mask[focus] == 1
        ring = ndimage.binary_dilation(core, iterations=6) & ~ndimage.binary_dilation(core, iterations=3)
        seen.append(volume[focus][core].mean() - volume[focus][ring].mean())
    assert np.median(seen) > 0.1
    assert np.median(seen) < 0.6, "not trivially bright"


@pytest.mark.parametrize(
    "grid",
    [
        Grid((20, 64, 48), (3.0, 2.5, 2.5)),
        Grid((33, 131, 97), (2.0, 1.25, 1.25)),
        Grid((30, 200, 150), (1.5, 0.8, 0.8)),
    ],
)
def test_other_grids(grid):
    breast = draw_breast(np.random.SeedSequence(1), grid)
    for name in VIEWS:
        volume, mask = make_view(breast, name, grid, Acquisition(method="sart", iterations=2))
        assert volume.shape == mask.shape == grid.shape
        assert mask.any()
        assert np.isfinite(volume).all()


def test_the_same_mass_on_a_finer_grid_has_the_same_volume():
    coarse, fine = Grid(), Grid((64, 256, 192), (1.0, 0.625, 0.625))
    breast = draw_breast(np.random.SeedSequence(2), coarse)
    volumes = [tissue(breast, "CC", g)[1].sum() * np.prod(g.spacing) for g in (coarse, fine)]
    assert volumes[0] == pytest.approx(volumes[1], rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid((32, 128), (2.0, 1.0, 1.0)), "three sizes"),
        (lambda: Grid((4, 128, 96)), "at least 8 voxels"),
        (lambda: Grid(spacing=(0.0, 1.0, 1.0)), "three positive numbers"),
        (lambda: Grid(spacing=(0.1, 1.0, 1.0)), "take more or larger voxels"),
        (lambda: Population(conspicuity=(1.3, 1.1)), "two rising numbers"),
        (lambda: Population(conspicuity=(0.9, 1.1)), "from 1 to 3"),
        (lambda: Population(densities=(0.0, 0.0, 0.0, 0.0)), "shares of ACR"),
        (lambda: Population(densities=(1.0, -1.0, 1.0, 1.0)), "shares of ACR"),
        (lambda: Population(normal=1.5), "normal is 1.5"),
        (lambda: tissue(draw_breast(np.random.SeedSequence(0)), "LM", GRID), "choose one of CC, MLO"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_everything_drawn_is_recorded():
    """The same record gives the same pixels; nothing is drawn elsewhere."""
    breast = draw_breast(np.random.SeedSequence(9), GRID)
    copy = replace(breast, views={k: ViewAnatomy(**vars(v)) for k, v in breast.views.items()})
    np.testing.assert_array_equal(make_view(breast, "MLO", GRID)[0], make_view(copy, "MLO", GRID)[0])
