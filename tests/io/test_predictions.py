from __future__ import annotations

import pytest

from medseg.io.predictions import PredictionReport, check_inputs


def test_the_output_folder_is_not_one_that_images_come_from(tmp_path):
    images = [str(tmp_path / "in" / "a.png"), str(tmp_path / "in" / "out" / "b.png")]
    weights = tmp_path / "model.pt"
    weights.touch()
    check_inputs(images, str(weights), str(tmp_path / "in"), str(tmp_path / "elsewhere"))
    for output in ("in", "in/out"):
        with pytest.raises(ValueError, match="images are taken from"):
            check_inputs(images, str(weights), str(tmp_path / "in"), str(tmp_path / output))


def test_nothing_to_do_and_nothing_to_do_it_with(tmp_path):
    with pytest.raises(ValueError, match="no images to segment"):
        check_inputs([], "model.pt", "in", "out")
    with pytest.raises(FileNotFoundError, match="train first"):
        check_inputs(["a.png"], str(tmp_path / "absent.pt"), "in", "out")


def test_an_interruption_blames_no_image(tmp_path):
    report = PredictionReport(str(tmp_path), ["a.png"], str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        report._fail(None, KeyboardInterrupt())
    with pytest.raises(ValueError, match=r"a.png could not be segmented: bad"):
        report._fail(None, RuntimeError("bad"))
