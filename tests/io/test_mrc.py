"""MRC files: written here and read back, and files of other programs made by hand with mrcfile."""

from __future__ import annotations

import bz2
import gzip
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, Flipd, LoadImaged, SaveImaged

from medseg.io.mrc import SUFFIXES, read_mrc, write_mrc
from medseg.io.mrc_monai import MRCReader, MRCWriter

SPACING = (1.5, 2.5, 13.25)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return np.random.default_rng(0).normal(3, 5, (4, 5, 6)).astype(np.float32)


@pytest.fixture
def by_hand(tmp_path: Path, volume: np.ndarray) -> Callable[..., Path]:
    """A file that mrcfile writes, with header fields and data of one's choice."""

    def write(data: np.ndarray = volume, name: str = "hand.mrc", **header: int) -> Path:
        with mrcfile.new(tmp_path / name, overwrite=True) as file:
            file.set_data(data)
            file.voxel_size = SPACING[::-1]  # mrcfile's order is x, y, z
            for key, value in header.items():
                file.header[key] = value
        return tmp_path / name

    return write


def test_round_trip_keeps_values_axes_and_voxel_size(tmp_path, volume):
    write_mrc(tmp_path / "new" / "a.mrc", volume, SPACING)
    read, spacing = read_mrc(tmp_path / "new" / "a.mrc", size=None)
    np.testing.assert_array_equal(read, volume)
    assert read.dtype == np.float32
    assert spacing == SPACING
    with mrcfile.open(tmp_path / "new" / "a.mrc") as file:  # and another program sees the same
        np.testing.assert_array_equal(file.data, volume)
        assert file.voxel_size.tolist() == SPACING[::-1]
        assert file.is_volume()
        assert file.validate()
    write_mrc(tmp_path / "b.mrc", volume.astype(np.float64)[:, ::-1], 10.0)
    np.testing.assert_array_equal(read_mrc(tmp_path / "b.mrc")[0], volume[:, ::-1])
    assert read_mrc(tmp_path / "b.mrc")[1] == (10.0, 10.0, 10.0)
    write_mrc(tmp_path / "c.mrc", volume, np.asarray(SPACING))
    assert read_mrc(tmp_path / "c.mrc")[1] == SPACING


def test_equal_volumes_give_equal_bytes(tmp_path, volume, monkeypatch):
    class Clock:
        hour = 0

        def now(self) -> datetime:
            self.hour += 1
            return datetime(2001, 1, 1, self.hour)

    monkeypatch.setattr("mrcfile.mrcobject.datetime", Clock())  # mrcfile labels a file with the time
    write_mrc(tmp_path / "a.mrc", volume, 10.0)
    write_mrc(tmp_path / "b.mrc", volume, (10.0, 10.0, 10.0))
    assert (tmp_path / "a.mrc").read_bytes() == (tmp_path / "b.mrc").read_bytes()
    write_mrc(tmp_path / "c.mrc", volume, (10.0, 10.0, 11.0))
    assert (tmp_path / "a.mrc").read_bytes() != (tmp_path / "c.mrc").read_bytes()


@pytest.mark.parametrize(
    ("dtype", "foreground", "mode"),
    [(bool, 1, 0), (np.int8, 1, 0), (np.int8, -7, 0), (np.uint8, 1, 0), (np.uint8, 255, 2), (np.int16, 300, 2)],
)
def test_masks_are_small_and_keep_their_values(tmp_path, dtype, foreground, mode):
    mask = np.zeros((3, 4, 5), dtype)
    mask[1:, 2, 3:] = foreground
    write_mrc(tmp_path / "mask.mrc", mask, 10.0)
    read, _ = read_mrc(tmp_path / "mask.mrc")
    np.testing.assert_array_equal(read, mask.astype(np.float32))
    with mrcfile.open(tmp_path / "mask.mrc") as file:
        assert file.header.mode == mode
        assert file.data.dtype == (np.int8 if mode == 0 else np.float32)


def test_compressed_files(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, SPACING)
    for compress, suffix in ((gzip.compress, "gz"), (bz2.compress, "bz2")):
        path = tmp_path / f"a.mrc.{suffix}"
        path.write_bytes(compress((tmp_path / "a.mrc").read_bytes()))
        read, spacing = read_mrc(path)
        np.testing.assert_array_equal(read, volume)
        assert spacing == SPACING


@pytest.mark.parametrize("order", [(1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1)])
def test_any_axis_order_of_the_header_becomes_z_y_x(by_hand, order):
    """``order`` is MAPC, MAPR, MAPS: which axis columns, rows and sections run along, 1 for x."""
    sizes = {1: 6, 2: 5, 3: 4}
    mapc, mapr, maps = order
    data = np.zeros((sizes[maps], sizes[mapr], sizes[mapc]), np.float32)
    expected = np.zeros((sizes[3], sizes[2], sizes[1]), np.float32)
    for section, row, column in np.ndindex(data.shape):
        place = {maps: section, mapr: row, mapc: column}
        value = 100 * place[3] + 10 * place[2] + place[1]
        data[section, row, column] = value
        expected[place[3], place[2], place[1]] = value
    # MX, MY, MZ and the cell belong to x, y, z whatever the order is
    header = {"mapc": mapc, "mapr": mapr, "maps": maps, "mx": sizes[1], "my": sizes[2], "mz": sizes[3]}
    path = by_hand(data, **header)
    with mrcfile.open(path, mode="r+") as file:
        file.header.cella = tuple(sizes[k] * SPACING[3 - k] for k in (1, 2, 3))
    read, spacing = read_mrc(path)
    np.testing.assert_array_equal(read, expected)
    assert read.flags.c_contiguous
    assert spacing == SPACING


def test_other_programs_bytes_and_empty_headers(by_hand, volume):
    big_endian = by_hand(volume.astype(">f4"), "big.mrc")
    np.testing.assert_array_equal(read_mrc(big_endian)[0], volume)
    integers = by_hand(np.arange(60, dtype=np.uint16).reshape(3, 4, 5) * 1000, "integers.mrc")
    assert read_mrc(integers)[0].max() == 59_000
    silent = by_hand(name="silent.mrc")
    with mrcfile.open(silent, mode="r+") as file:
        file.header.cella = (0, 0, 12)
    assert read_mrc(silent)[1] == (3.0, 1.0, 1.0), "1 where the header says nothing"


@pytest.mark.parametrize("axes", [(1, 1, 2), (0, 0, 0), (1, 2, 4), (-1, 2, 3)])
def test_an_impossible_axis_order_is_named(by_hand, axes):
    path = by_hand(**dict(zip(("mapc", "mapr", "maps"), axes, strict=True)))
    with pytest.raises(
        ValueError, match=f"MAPC, MAPR, MAPS is {', '.join(map(str, axes))}, which is no order"
    ) as error:
        read_mrc(path)
    assert str(path) in str(error.value)


def test_damaged_and_foreign_files_are_named(tmp_path, volume):
    write_mrc(tmp_path / "whole.mrc", volume, 10.0)
    content = (tmp_path / "whole.mrc").read_bytes()
    packed = gzip.compress(content)
    flipped = packed[:200] + bytes([255] * 8) + packed[208:]
    files = {
        "cut.mrc": content[:-100],
        "header.mrc": content[:500],
        "empty.mrc": b"",
        "text.mrc": b"this is a letter\n" * 200,
        "picture.mrc": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
        "cut.mrc.gz": packed[:-100],
        "flipped.mrc.gz": flipped,
        "checksum.mrc.gz": packed[:-8] + bytes(8),
    }
    for name, damaged in files.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="no readable MRC file, or is cut off") as error:
            read_mrc(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


def test_data_that_is_no_single_real_volume(by_hand):
    shapes = {
        "picture.mrc": np.zeros((5, 6), np.float32),
        "stack.mrc": np.zeros((2, 4, 5, 6), np.float32),
        "complex.mrc": np.zeros((4, 5, 6), np.complex64),
    }
    for name, data in shapes.items():
        path = by_hand(data, name)
        with pytest.raises(ValueError, match="one real 3D volume is needed") as error:
            read_mrc(path)
        assert str(path) in str(error.value)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:mrcfile", "ignore::RuntimeWarning:numpy")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(by_hand, volume, value):
    broken = volume.copy()
    broken[1, 2, 3] = value
    path = by_hand(broken)
    with pytest.raises(ValueError, match="holds NaN or infinite values") as error:
        read_mrc(path)
    assert str(path) in str(error.value)


def test_another_size_is_named_in_z_y_x(tmp_path, volume):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume, 10.0)
    with pytest.raises(ValueError, match="is 4 x 5 x 6; the network takes 32 x 32 x 32 voxels: crop") as error:
        read_mrc(path, size=32)
    assert str(path) in str(error.value)
    write_mrc(path, np.pad(volume, ((0, 2), (0, 1), (0, 0))), 10.0)
    assert read_mrc(path, size=6)[0].shape == (6, 6, 6)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "absent.mrc", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file") as error:
            read_mrc(path)
        assert str(path) in str(error.value)


def test_what_is_no_volume_is_not_written(tmp_path):
    for shape in ((5, 6), (1, 4, 5, 6), ()):
        with pytest.raises(ValueError, match=r"a.mrc: an MRC volume has 3 axes, this array has the shape \("):
            write_mrc(tmp_path / "a.mrc", np.zeros(shape), 1.0)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, volume, monkeypatch):
    path = tmp_path / "a.mrc"
    write_mrc(path, volume, 10.0)

    def full(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_mrc(path, volume + 1, 10.0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mrc"]
    np.testing.assert_array_equal(read_mrc(path)[0], volume)


def loaded(path: Path) -> MetaTensor:
    transform = Compose([LoadImaged("image", reader=MRCReader(), image_only=True), EnsureChannelFirstd("image")])
    return transform({"image": str(path)})["image"]


def test_monai_sees_z_y_x_and_their_voxel_sizes(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, SPACING)
    image = loaded(tmp_path / "a.mrc")
    assert image.shape == (1, 4, 5, 6)
    np.testing.assert_array_equal(image[0].numpy(), volume)
    assert image.pixdim.tolist() == list(SPACING)
    assert image.meta["filename_or_obj"] == str(tmp_path / "a.mrc")
    # the voxel (z, y, x) = (1, 2, 3) lies at x, y, z in Angstrom
    point = image.affine @ torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=image.affine.dtype)
    assert point.tolist() == [3 * SPACING[2], 2 * SPACING[1], 1 * SPACING[0], 1.0]


def test_the_reader_takes_mrc_names_and_stacks_files(tmp_path, volume):
    reader = MRCReader()
    assert all(reader.verify_suffix(f"x{suffix}") for suffix in (*SUFFIXES, ".MRC"))
    assert not reader.verify_suffix("x.nii.gz")
    assert not reader.verify_suffix(["x.mrc", "x.png"])
    for i in range(2):
        write_mrc(tmp_path / f"{i}.mrc", volume + i, SPACING)
    data, meta = reader.get_data(reader.read([tmp_path / "0.mrc", tmp_path / "1.mrc"]))
    np.testing.assert_array_equal(data, np.stack([volume, volume + 1]))
    assert meta["original_channel_dim"] == 0


def test_the_reader_refuses_another_size(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, SPACING)
    reader = MRCReader(size=8)
    with pytest.raises(ValueError, match=r"a.mrc is 4 x 5 x 6; the network takes 8 x 8 x 8"):
        reader.get_data(reader.read(tmp_path / "a.mrc"))


@pytest.mark.parametrize(("dtype", "mode"), [(np.int8, 0), (np.float32, 2)])
def test_monai_writes_with_the_voxel_size_and_the_type_asked_for(tmp_path, volume, dtype, mode):
    write_mrc(tmp_path / "in" / "sub" / "a.mrc", volume, SPACING)
    save = SaveImaged(
        "image", output_dir=tmp_path / "out", output_ext=".mrc", output_postfix="seg", separate_folder=False,
        data_root_dir=str(tmp_path / "in"), resample=False, output_dtype=dtype, print_log=False,
        writer="medseg.io.mrc_monai.MRCWriter",
    )  # fmt: skip
    image = loaded(tmp_path / "in" / "sub" / "a.mrc").round()
    save({"image": image})
    read, spacing = read_mrc(tmp_path / "out" / "sub" / "a_seg.mrc")
    np.testing.assert_array_equal(read, volume.round())
    assert spacing == pytest.approx(SPACING)
    with mrcfile.open(tmp_path / "out" / "sub" / "a_seg.mrc") as file:
        assert file.header.mode == mode


def test_a_flip_changes_no_voxel_size(tmp_path, volume):
    write_mrc(tmp_path / "a.mrc", volume, SPACING)
    flipped = Flipd("image", spatial_axis=[0, 2])({"image": loaded(tmp_path / "a.mrc")})["image"]
    writer = MRCWriter()
    writer.set_data_array(flipped)
    writer.set_metadata(flipped.meta)
    writer.write(tmp_path / "b.mrc")
    read, spacing = read_mrc(tmp_path / "b.mrc")
    np.testing.assert_array_equal(read, volume[::-1, :, ::-1])
    assert spacing == pytest.approx(SPACING)


def test_the_writer_takes_arrays_without_a_channel_and_without_metadata(tmp_path, volume):
    writer = MRCWriter(output_dtype=np.float32)
    writer.set_data_array(volume, channel_dim=None)
    writer.set_metadata(None)
    writer.write(tmp_path / "a.mrc")
    read, spacing = read_mrc(tmp_path / "a.mrc")
    np.testing.assert_array_equal(read, volume)
    assert spacing == (1.0, 1.0, 1.0)
