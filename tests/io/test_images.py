"""Reading by file format, with files made on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from io_formats import write_dicom
from PIL import Image

from medseg.io.files import write_atomically
from medseg.io.images import read_grey, write_png

GREY = np.zeros((40, 60), np.uint8)
GREY[5:10, 20:50] = 200
GREY[30, 3] = 77
RGB = np.stack([GREY, GREY // 2, GREY // 4], axis=-1)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_files_keep_their_values_and_axes(tmp_path, suffix, dtype):
    array = GREY.astype(dtype) * (1 if dtype == np.uint8 else 300)
    Image.fromarray(array).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_grey(tmp_path / f"a.{suffix}"), array)


def test_colour_is_averaged_and_alpha_dropped(tmp_path):
    alpha = np.full_like(GREY, 255)
    for name, array in {"rgb": RGB, "rgba": np.dstack([RGB, alpha])}.items():
        Image.fromarray(array).save(tmp_path / f"{name}.png")
        np.testing.assert_allclose(read_grey(tmp_path / f"{name}.png"), RGB.mean(-1), atol=1e-4)
    Image.fromarray(np.dstack([GREY, alpha])).save(tmp_path / "la.png")
    np.testing.assert_array_equal(read_grey(tmp_path / "la.png"), GREY)


def test_jpeg(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_grey(tmp_path / "a.jpg") - GREY).mean() < 3


def test_dicom(tmp_path):
    write_dicom(tmp_path / "a.dcm", GREY.astype(np.uint16) * 100)
    np.testing.assert_array_equal(read_grey(tmp_path / "a.dcm"), GREY.astype(np.float32) * 100)
    write_dicom(tmp_path / "slope", GREY, RescaleSlope=2, RescaleIntercept=-10)
    np.testing.assert_array_equal(read_grey(tmp_path / "slope"), GREY * 2.0 - 10)
    write_dicom(tmp_path / "inverted.dcm", 255 - GREY, "MONOCHROME1")
    np.testing.assert_array_equal(read_grey(tmp_path / "inverted.dcm"), GREY)
    write_dicom(tmp_path / "rgb.dcm", RGB, "RGB")
    np.testing.assert_allclose(read_grey(tmp_path / "rgb.dcm"), RGB.mean(-1), atol=1e-4)


def test_what_is_no_single_image_is_refused_by_name(tmp_path):
    write_dicom(tmp_path / "movie.dcm", np.stack([GREY] * 3), frames=3)
    with pytest.raises(ValueError, match=r"movie.dcm holds 3 frames"):
        read_grey(tmp_path / "movie.dcm")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"broken.png cannot be read"):
        read_grey(tmp_path / "broken.png")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60), dtype=np.uint8)
    for suffix in ("png", "jpg", "tif"):
        Image.fromarray(noise).save(tmp_path / f"whole.{suffix}")
        content = (tmp_path / f"whole.{suffix}").read_bytes()
        (tmp_path / f"half.{suffix}").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"half.{suffix} cannot be read"):
            read_grey(tmp_path / f"half.{suffix}")
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_grey(tmp_path / "absent.png")


def test_png_round_trip(tmp_path):
    write_png(tmp_path / "new" / "a.png", RGB)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), RGB)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "a.json"
    write_atomically(target, b"old")

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert target.read_text() == "old"
