from __future__ import annotations

import numpy as np
import pytest

from medseg.calibration import expected_calibration_error, reliability_bins, reliability_figure, reliability_table


def test_ece_by_hand():
    # 4 values of 0.9 of which 3 are true, 4 of 0.2 of which none is: (4 * 0.15 + 4 * 0.2) / 8
    bins = reliability_bins([0.9] * 4 + [0.2] * 4, [1, 1, 1, 0, 0, 0, 0, 0], bins=10)
    assert expected_calibration_error(bins) == pytest.approx(0.175)
    table = reliability_table(bins)
    assert table["count"][9] == 4
    assert table["true"] == [0] * 9 + [3]
    assert table["probability"][2] == pytest.approx(0.8)


def test_ece_against_a_loop():
    rng = np.random.default_rng(0)
    p, y = rng.random(5000), rng.random(5000) < 0.3
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (p >= low) & (p < low + 1 / 15)
        if inside.any():
            expected += inside.mean() * abs(p[inside].mean() - y[inside].mean())
    assert expected_calibration_error(reliability_bins(p, y)) == pytest.approx(expected, abs=1e-6)


def test_calibrated_probabilities_have_none_and_bins_add_up():
    rng = np.random.default_rng(0)
    p = rng.random((200, 200))
    y = rng.random(p.shape) < p
    assert expected_calibration_error(reliability_bins(p, y)) < 0.01
    halves = reliability_bins(p[:100], y[:100]) + reliability_bins(p[100:], y[100:])
    np.testing.assert_allclose(halves, reliability_bins(p, y))


def test_edges_and_errors():
    assert reliability_bins([0.0, 1.0], [0, 1])[0].tolist() == [1, *[0] * 13, 1]
    assert np.isnan(expected_calibration_error(reliability_bins([], [])))
    with pytest.raises(ValueError, match="missing a sigmoid"):
        reliability_bins([3.0], [1])
    with pytest.raises(ValueError, match=r"\[nan, nan\]"):
        reliability_bins([np.nan], [1])
    with pytest.raises(ValueError, match="2 probabilities for 1"):
        reliability_bins([0.1, 0.2], [1])


def test_the_figure_names_the_models():
    figure = reliability_figure({"unet": reliability_bins([0.2, 0.8], [0, 1])})
    assert "unet (ECE 0.2000)" in [t.get_text() for t in figure.axes[0].get_legend().get_texts()]
