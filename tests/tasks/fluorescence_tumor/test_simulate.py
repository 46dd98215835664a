from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from skimage.filters import threshold_otsu

from medseg.io.datalist import check_binary_masks, load_datalist
from medseg.metrics import dice
from medseg.tasks.fluorescence_tumor.simulate import STYLES, render, simulate


@pytest.mark.parametrize("style", STYLES)
def test_a_threshold_does_not_find_the_tumour(style):
    """The truth is the tumour, not a threshold of the picture: mean over 24 images."""
    pictures = render(STYLES[style], 128, np.random.default_rng(11))
    scores, area = [], []
    for _ in range(24):
        image, mask = next(pictures)
        scores.append(dice(image > threshold_otsu(image), mask))
        area.append(mask.mean())
        assert image.dtype == np.uint8
        assert mask.any()
        assert np.percentile(image, 99) < 255, "saturated"
    assert np.mean(scores) < 0.75
    assert 0.01 < np.mean(area) < 0.3


def test_styles_differ_as_the_data_sets_do():
    from scipy import ndimage

    def lesions(style: str) -> float:
        pictures = render(STYLES[style], 128, np.random.default_rng(2))
        return float(np.mean([ndimage.label(next(pictures)[1])[1] for _ in range(6)]))

    assert lesions("abfm") > 4
    assert lesions("dthp") == 1


def test_the_list_is_valid_and_videos_stay_together(tmp_path):
    path = simulate(tmp_path, 24, seed=1, style=["abfm", "dthp", "dthl"], size=64)
    lists = load_datalist(path, tmp_path, check_binary_masks)  # refuses a video on two sides
    assert len(lists["training"]) + len(lists["test"]) == 72
    assert {i["fold"] for i in lists["training"]} == {0, 1, 2, 3, 4}
    tested = {i["style"] for i in lists["test"]}
    assert tested == {"abfm", "dthp", "dthl"}
    assert not [i for i in lists["training"] if i["style"] == "dthl"]
    frames = [i for i in lists["training"] if i["video"] == "dthp_0005"]
    assert len(frames) == 2
    first, second = (np.asarray(Image.open(f["image"])).astype(float) for f in frames)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.5  # one scene ...
    assert not np.array_equal(first, second)  # ... seen twice


def test_the_seed_decides_everything(tmp_path):
    for name, seed in {"a": 3, "b": 3, "c": 4}.items():
        simulate(tmp_path / name, 2, seed=seed, size=48)
    a, b, c = (np.asarray(Image.open(tmp_path / n / "images" / "abfm_0001.png")) for n in "abc")
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert json.loads((tmp_path / "a" / "datalist.json").read_text())["labels"] == {"0": "background", "1": "tumour"}


def test_a_list_that_no_simulation_wrote_is_kept(tmp_path):
    (tmp_path / "datalist.json").write_text('{"training": []}')
    with pytest.raises(ValueError, match="not written by a simulation"):
        simulate(tmp_path, 1, size=48)
    assert (tmp_path / "datalist.json").read_text() == '{"training": []}'


def test_adding_a_style_keeps_the_images_of_another(tmp_path):
    simulate(tmp_path / "one", 1, style=["dthl"], size=48)
    simulate(tmp_path / "two", 1, style=["abfm", "dthl"], size=48)
    one, two = ((tmp_path / n / "images" / "dthl_0000.png").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "at least 1"),
        ({"style": ["abfm", "xyz"]}, "unknown style xyz"),
        ({"style": []}, "unknown style"),
        ({"style": ["abfm", "abfm"]}, "named twice"),
        ({"size": 16}, "32 pixels"),
        ({"frames_per_video": 0}, "frames_per_video"),
        ({"test_fraction": 1.5}, "test_fraction"),
    ],
)
def test_bad_arguments(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"out": tmp_path / "x", "count": 1, **change})
    assert not (tmp_path / "x").exists()
