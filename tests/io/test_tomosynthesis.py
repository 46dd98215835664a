"""Tomosynthesis views: written here, read back by our own reader and by ITK; damaged and odd files made by hand."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import DigitalMammographyXRayImageStorageForPresentation as MAMMOGRAM
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from tomosynthesis_frames import shared, single_frames

from medseg.io.resampling import resample_slices, resampled_affine
from medseg.io.tomosynthesis import (
    find_views,
    laterality_contradiction,
    laterality_of_image,
    read_header,
    read_view,
    resampling_matrix,
    write_nifti,
)
from medseg.io.tomosynthesis_dicom import write_tomosynthesis

SPACING = (1.5, 0.25, 0.5)
VIEWS = list(itertools.product("LR", ("CC", "MLO")))


def breast(laterality: str = "L", shape: tuple[int, int, int] = (4, 12, 10)) -> np.ndarray:
    """Noise with tissue at the chest wall of the standard display."""
    volume = np.random.default_rng(0).integers(0, 40, shape).astype(np.uint16)
    volume[:, 2:-3, :5] += 500
    return volume if laterality == "L" else np.ascontiguousarray(volume[..., ::-1])


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A valid object, changed by a function of its dataset."""

    def make(
        change: Callable[[pydicom.Dataset], None] | None = None,
        name: str = "a.dcm",
        laterality: str = "L",
        view: str = "CC",
        patient: str = "P1",
    ) -> Path:
        path = write_tomosynthesis(
            tmp_path / name,
            breast(laterality),
            SPACING,
            laterality=laterality,
            view=view,
            patient=patient,
            uid_seed="t",
        )
        if change:
            data = pydicom.dcmread(path)
            change(data)
            data.save_as(path)
        return path

    return make


@pytest.mark.parametrize(("laterality", "view"), VIEWS)
def test_written_objects_are_read_back_with_all_that_was_given(tmp_path, laterality, view):
    volume = breast(laterality)
    path = write_tomosynthesis(
        tmp_path / "new" / "a.dcm", volume, SPACING, laterality=laterality, view=view, patient="P7", age=51, density=3
    )
    header = read_header(path)
    assert (header.shape, header.spacing, header.remarks) == (volume.shape, SPACING, ())
    assert (header.laterality, header.view, header.patient, header.breast) == (
        laterality,
        view,
        "P7",
        f"P7-{laterality}",
    )
    read, affine = read_view(header)
    np.testing.assert_array_equal(read, volume)
    assert read.dtype == np.float32
    np.testing.assert_allclose(affine, header.affine)
    data = pydicom.dcmread(path)
    assert (data.PatientAge, data.BitsStored, data.StudyInstanceUID) == ("051Y", 10, header.study)
    assert laterality_contradiction(header, read) is None
    assert list(tmp_path.rglob(".*")) == []


@pytest.mark.parametrize(("laterality", "view"), VIEWS)
def test_itk_sees_the_same_voxels_at_the_same_places(write, laterality, view):
    header = read_header(write(laterality=laterality, view=view))
    image = itk.imread(str(header.files[0]), itk.SS)
    own, _ = read_view(header)
    theirs = itk.array_from_image(image)
    # ITK sorts slices along its normal; ours keep a falling order: compare by place, voxel by voxel
    for index in [(0, 0, 0), (3, 0, 2), (1, 7, 0), (2, 4, 9)]:
        ras = header.affine @ [*index, 1.0]
        found = image.TransformPhysicalPointToIndex([-ras[0], -ras[1], ras[2]])
        assert theirs[found[2], found[1], found[0]] == own[index]
    np.testing.assert_allclose(sorted(image.GetSpacing()), sorted(SPACING), rtol=1e-6)


@pytest.mark.parametrize(("laterality", "view"), VIEWS)
def test_axes_are_those_of_the_body(write, laterality, view):
    axes = read_header(write(laterality=laterality, view=view)).affine[:3, :3]
    side = -1 if laterality == "L" else 1  # of the breast along x in RAS
    assert axes[1, 2] * -side > 0  # from the chest wall forwards in a left breast, backwards in a right one
    assert axes[0, 1] * -side > 0  # rows run from lateral to medial
    assert axes[2, 0] < 0  # slices from the tube down
    if view == "MLO":
        assert axes[2, 1] < 0
        assert axes[0, 0] * side > 0


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize(("laterality", "view"), VIEWS)
def test_dciodvfy_finds_no_fault(tmp_path, laterality, view):
    volume = breast(laterality)
    volume[0, 0, 0] = 4000 if view == "MLO" else 0
    path = write_tomosynthesis(
        tmp_path / "a.dcm", volume, SPACING, laterality=laterality, view=view, patient="P1", age=51, density=2
    )
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    assert said.returncode == 0
    assert (said.stdout + said.stderr).strip() == "BreastTomosynthesisImage"


def test_equal_arguments_and_seed_give_equal_bytes(tmp_path):
    for name, seed in (("a", "x"), ("b", "x"), ("c", "y"), ("d", None), ("e", None)):
        write_tomosynthesis(tmp_path / name, breast(), SPACING, laterality="L", view="CC", patient="P1", uid_seed=seed)
    a, b, c, d, e = ((tmp_path / name).read_bytes() for name in "abcde")
    assert a == b
    assert len({a, c, d, e}) == 4
    write_tomosynthesis(tmp_path / "f", breast(), SPACING, laterality="L", view="MLO", patient="P1", uid_seed="x")
    first, other = read_header(tmp_path / "a"), read_header(tmp_path / "f")
    assert first.study == other.study
    assert first.series != other.series


def test_impossible_arguments_are_refused_and_leave_no_file(tmp_path):
    good = {"laterality": "L", "view": "CC", "patient": "P1"}
    for change, says in [
        ({"laterality": "B"}, "laterality 'B'"),
        ({"view": "ML"}, "view 'ML'"),
        ({"age": 130}, "age is 130"),
        ({"density": 5}, "density is 5"),
    ]:
        with pytest.raises(ValueError, match=says):
            write_tomosynthesis(tmp_path / "a.dcm", breast(), SPACING, **{**good, **change})
    with pytest.raises(ValueError, match="float32"):
        write_tomosynthesis(tmp_path / "a.dcm", breast().astype(np.float32), SPACING, **good)
    with pytest.raises(ValueError, match="spacing is"):
        write_tomosynthesis(tmp_path / "a.dcm", breast(), (1.0, 0.0, 1.0), **good)
    assert list(tmp_path.iterdir()) == []


def test_monochrome1_is_turned_over_and_rescale_applied_per_frame(write):
    def change(data):
        data.PhotometricInterpretation = "MONOCHROME1"
        del shared(data).PixelValueTransformationSequence
        for k, group in enumerate(data.PerFrameFunctionalGroupsSequence):
            item = pydicom.Dataset()
            item.RescaleSlope, item.RescaleIntercept, item.RescaleType = 2, 5 + k, "US"
            group.PixelValueTransformationSequence = [item]

    read, _ = read_view(read_header(write(change)))
    np.testing.assert_array_equal(read, (1023.0 - breast()) * 2 + 5 + np.arange(4)[:, None, None])


def test_compressed_frames_are_decoded_and_counted(write):
    path = write(lambda data: data.compress(RLELossless))
    read, _ = read_view(read_header(path))
    np.testing.assert_array_equal(read, breast())
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"a\.dcm is cut off: 3 of 4 compressed frames"):
        read_header(path)
    path = write(lambda data: (data.compress(RLELossless), setattr(data, "NumberOfFrames", 5)))
    with pytest.raises(ValueError, match="cut off: 4 of 5 compressed frames"):
        read_header(path)


@pytest.mark.parametrize("order", [[1, 0, 2, 3], [2, 3, 0, 1], [3, 2, 1, 0]])
def test_frames_out_of_order_are_put_right(write, order):
    def change(data):
        groups = [data.PerFrameFunctionalGroupsSequence[k] for k in order]
        data.PerFrameFunctionalGroupsSequence = groups
        data.add_new("PixelData", "OW", data.pixel_array[order].tobytes())

    right = read_header(write())
    header = read_header(write(change, name="b.dcm"))
    read, affine = read_view(header)
    if order == [3, 2, 1, 0]:  # an order too: kept, the affine follows
        assert header.remarks == ()
        np.testing.assert_array_equal(read, breast()[::-1])
        np.testing.assert_allclose(affine[:, 0], -right.affine[:, 0], atol=1e-9)
        np.testing.assert_allclose(affine @ [3, 0, 0, 1], right.affine @ [0, 0, 0, 1], atol=1e-9)
    else:
        assert "out of spatial order" in header.remarks[0]
        assert [k for _, k in header.frames] == np.argsort(order).tolist()
        np.testing.assert_array_equal(read, breast())
        np.testing.assert_allclose(affine, right.affine, atol=1e-9)


def test_single_frames_make_the_same_volume(write, tmp_path):
    whole = read_header(write())
    files = single_frames(Path(whole.files[0]), tmp_path / "series", [2, 0, 3, 1])
    for source in (tmp_path / "series", files, files[::-1]):
        header = read_header(source)
        read, affine = read_view(header)
        np.testing.assert_array_equal(read, breast())
        np.testing.assert_allclose(affine, whole.affine, atol=1e-9)
        assert [Path(f).name for f in header.files] == ["1.dcm", "3.dcm", "0.dcm", "2.dcm"]
        assert (header.laterality, header.view, header.name) == ("L", "CC", str(tmp_path / "series"))
    with pytest.raises(ValueError, match=r"series: slices are .*is a frame missing"):
        read_header([files[0], files[1], files[2]])  # one is missing in the middle
    with pytest.raises(ValueError, match=r"0\.dcm is one 2D image"):
        read_header(files[0])


def test_two_series_in_one_view_are_refused_and_found_apart(write, tmp_path):
    single_frames(write(), tmp_path / "both", [0, 1, 2, 3])
    other = tmp_path / "other"
    single_frames(write(name="b.dcm", patient="P2", laterality="R"), other, [0, 1, 2, 3])
    for file in other.iterdir():
        file.rename(tmp_path / "both" / f"x{file.name}")
    with pytest.raises(ValueError, match=r"x0\.dcm has PatientID P2, 0\.dcm in the same view has P1"):
        read_header(tmp_path / "both")
    views, problems = find_views(tmp_path / "both")
    assert problems == []
    assert [(view.patient, len(view.files)) for view in views] == [("P1", 4), ("P2", 4)]


def measures(**values: object) -> Callable[[pydicom.Dataset], None]:
    def change(data: pydicom.Dataset) -> None:
        for key, value in values.items():
            setattr(shared(data).PixelMeasuresSequence[0], key, value)

    return change


@pytest.mark.parametrize("value", [[0, 0], [0.25, 0], [-0.25, 0.5], None])
def test_missing_zero_and_negative_spacing_ask_for_one(write, value):
    path = write(measures(PixelSpacing=value))
    with pytest.raises(ValueError, match=r"a\.dcm has (no )?pixel spacing.*pass spacing="):
        read_header(path)
    header = read_header(path, (9.0, 0.3, 0.4))
    assert header.spacing == (1.5, 0.3, 0.4)  # the positions know the distance of slices
    assert "as given" in header.remarks[0]


def test_positions_decide_over_slice_thickness(write):
    assert read_header(write(measures(SliceThickness=7, SpacingBetweenSlices=3))).spacing == SPACING


def test_frames_without_positions_need_a_spacing(write):
    def change(data):
        for group in data.PerFrameFunctionalGroupsSequence:
            del group.PlanePositionSequence

    path = write(change)
    with pytest.raises(ValueError, match=r"4 of 4 frames have no position.*pass spacing="):
        read_header(path)
    header = read_header(path, (2.0, 1.0, 1.0))
    assert header.spacing == (2.0, 0.25, 0.5)
    np.testing.assert_array_equal(read_view(header)[0], breast())


@pytest.mark.parametrize(("shift", "says"), [(0.5, "but 2 mm between"), (-1.5, "lie at the same position")])
def test_unequal_slice_distances_are_refused(write, shift, says):
    def change(data):
        place = data.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence[0]
        place.ImagePositionPatient[2] -= shift

    with pytest.raises(ValueError, match=says):
        read_header(write(change))
    if shift > 0:
        shift = 0.01
        assert read_header(write(change)).spacing == pytest.approx(SPACING, abs=0.01)


def test_broken_files_are_named_and_the_rest_is_found(write, tmp_path, caplog):
    write(name="good.dcm")
    cut = write(name="cut.dcm")
    cut.write_bytes(cut.read_bytes()[:-100])
    write(lambda data: delattr(data, "PixelData"), name="nothing.dcm")
    write(lambda data: setattr(data, "PhotometricInterpretation", "RGB"), name="colour.dcm")
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / "bad.nii").write_bytes(b"x" * 400)
    (tmp_path / "bad.nrrd").write_bytes(b"x" * 400)
    single_frames(write(name="source.dcm"), tmp_path / "one", [2])
    (mammogram,) = single_frames(tmp_path / "source.dcm", tmp_path / "two", [1])
    data = pydicom.dcmread(mammogram)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = MAMMOGRAM
    data.SeriesInstanceUID = "1.2.3"
    data.save_as(mammogram)
    views, problems = find_views(tmp_path)
    assert "two/0.dcm passed over: a 2D mammogram" in caplog.text
    assert [Path(view.name).name for view in views] == ["good.dcm", "source.dcm"]
    expected = {
        "cut.dcm is cut off: 860 of 960 bytes",
        "nothing.dcm has no pixel data",
        "colour.dcm is a colour image",
        "text.dcm is no DICOM file",
        "bad.nii is no readable NIfTI",
        "bad.nrrd is no NRRD",
        "0.dcm is one 2D image",
    }
    for says in expected:
        assert sum(says in problem for problem in problems) == 1, (says, problems)
    assert len(problems) == len(expected)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_views(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_header(tmp_path / "gone.dcm")
    with pytest.raises(ValueError, match="three positive numbers"):
        read_header(tmp_path / "good.dcm", (0.0, 1.0, 1.0))


def test_laterality_and_view_from_older_attributes(write):
    def old(data):
        code = data.ViewCodeSequence[0]
        code.CodeValue, code.CodingSchemeDesignator = "R-10226", "SRT"
        del shared(data).FrameAnatomySequence
        data.ImageLaterality = "R"

    header = read_header(write(old))
    assert (header.laterality, header.view) == ("R", "MLO")

    def none(data):
        del shared(data).FrameAnatomySequence, data.ViewCodeSequence

    header = read_header(write(none))
    assert (header.laterality, header.view, header.breast) == ("", "", "")
    assert any("laterality missing" in remark for remark in header.remarks)
    assert laterality_contradiction(header, breast()[..., ::-1]) is None


@pytest.mark.parametrize(("laterality", "view"), VIEWS)
def test_laterality_that_contradicts_the_image_is_told(write, laterality, view):
    header = read_header(write(laterality=laterality, view=view))
    volume = breast(laterality)
    assert laterality_of_image(volume) == ("left" if laterality == "L" else "right")
    assert laterality_contradiction(header, volume) is None
    assert "a.dcm: the header says" in str(laterality_contradiction(header, volume[..., ::-1]))
    wrong = dataclasses.replace(header, laterality="R" if laterality == "L" else "L")
    assert "correct the laterality" in str(laterality_contradiction(wrong, volume))
    assert laterality_of_image(np.ones((2, 3, 4))) == ""
    assert laterality_contradiction(header, np.ones((2, 3, 4))) is None


def test_an_oblique_view_stored_upside_down_is_no_contradiction(write):
    header = read_header(write(view="MLO"))
    turned = header.affine.copy()
    turned[:3, 1:3] *= -1
    assert laterality_contradiction(dataclasses.replace(header, affine=turned), breast()[:, ::-1, ::-1]) is None


@pytest.mark.parametrize("name", ["P_1_LCC.nii", "P_1-r_mlo.nii.gz", "P1.nii.gz"])
def test_nifti_keeps_values_and_places(tmp_path, write, name):
    affine = read_header(write(view="MLO")).affine
    write_nifti(tmp_path / name, breast(), affine)
    header = read_header(tmp_path / name)
    read, _ = read_view(header)
    np.testing.assert_array_equal(read, breast())
    np.testing.assert_allclose(header.affine, affine, atol=1e-5)
    expected = {"P_1_LCC.nii": ("P_1", "L", "CC"), "P_1-r_mlo.nii.gz": ("P_1", "R", "MLO"), "P1.nii.gz": ("P1", "", "")}
    assert (header.patient, header.laterality, header.view) == expected[name]
    assert nib.load(tmp_path / name).shape == breast().T.shape  # as other programs expect it


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 7, 2)])
def test_nifti_of_another_dimension_is_refused(tmp_path, shape):
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"a\.nii is .*; one 3D volume"):
        read_header(tmp_path / "a.nii")


def test_nifti_without_voxel_size_with_nan_or_cut_off(tmp_path):
    values = np.zeros((5, 6, 7), np.float32)
    image = nib.Nifti1Image(values, None)
    image.header["pixdim"][1:4] = 0
    nib.save(image, tmp_path / "zero.nii")
    with pytest.raises(ValueError, match=r"zero\.nii has the voxel size .*pass spacing="):
        read_header(tmp_path / "zero.nii")
    assert read_header(tmp_path / "zero.nii", (3.0, 2.0, 1.0)).spacing == (3.0, 2.0, 1.0)
    values[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii.gz")
    with pytest.raises(ValueError, match=r"nan\.nii\.gz holds NaN or infinite values in slice 4"):
        read_view(read_header(tmp_path / "nan.nii.gz"))
    for name in ("cut.nii", "cut.nii.gz"):
        write_nifti(tmp_path / name, np.random.default_rng(0).normal(size=(5, 60, 70)), np.eye(4))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-2000])
        with pytest.raises(ValueError, match="cut off"):
            read_view(read_header(tmp_path / name))


@pytest.mark.parametrize("compression", [False, True])
def test_nrrd_is_read_as_itk_writes_it(tmp_path, write, compression):
    image = itk.imread(str(write(view="MLO")), itk.SS)
    itk.imwrite(image, str(tmp_path / "P1_LMLO.nrrd"), compression=compression)
    header = read_header(tmp_path / "P1_LMLO.nrrd")
    read, affine = read_view(header)
    np.testing.assert_array_equal(read, itk.array_from_image(image))
    point = image.TransformIndexToPhysicalPoint([3, 4, 1])
    np.testing.assert_allclose((affine @ [1, 4, 3, 1])[:3], [-point[0], -point[1], point[2]], atol=1e-6)
    (tmp_path / "none.nrrd").write_bytes(
        b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 2 2 2\nencoding: raw\n\n12345678"
    )
    with pytest.raises(ValueError, match="voxel size 0 x 0 x 0 mm; pass spacing="):
        read_header(tmp_path / "none.nrrd")


def brute_force(size: int, old: float, new: float, new_size: int) -> np.ndarray:
    """Overlaps of the new voxels with the old ones, in mm, one by one; or linear weights by NumPy."""
    if new >= old:
        matrix = np.zeros((new_size, size))
        for j, i in itertools.product(range(new_size), range(size)):
            matrix[j, i] = max(0.0, min((j + 1) * new, (i + 1) * old) - max(j * new, i * old))
        return matrix / matrix.sum(axis=1, keepdims=True)
    centres = (np.arange(new_size) + 0.5) * new
    return np.stack([np.interp(centres, (np.arange(size) + 0.5) * old, row) for row in np.eye(size)], axis=1)


@given(st.integers(1, 40), st.floats(0.05, 5), st.floats(0.05, 5))
def test_resampling_weights_are_those_of_brute_force(size, old, new):
    matrix, new_size = resampling_matrix(size, old, new)
    assert matrix.shape == (new_size, size)
    assert abs(new_size * new - size * old) <= new / 2 + 1e-6 or new_size == 1
    np.testing.assert_allclose(matrix.toarray(), brute_force(size, old, new, new_size), atol=2e-6)


def test_resampling_keeps_edges_means_and_ramps(write):
    header = read_header(write())
    wanted = (3.0, 1.0, 1.0)
    coarse, affine = read_view(header, wanted)
    assert coarse.shape == (2, 3, 5)
    np.testing.assert_allclose(coarse, breast().reshape(2, 2, 3, 4, 5, 2).mean(axis=(1, 3, 5)), rtol=1e-5)
    for corner in itertools.product((0, 1), repeat=3):  # all outer corners stay, as sizes divide here
        native = np.array(corner) * header.shape - 0.5
        np.testing.assert_allclose(
            affine @ [*(np.array(corner) * coarse.shape - 0.5), 1], header.affine @ [*native, 1], atol=1e-9
        )
    ramp = np.arange(20.0, dtype=np.float32)[:, None, None] * np.ones((1, 3, 3), np.float32)
    fine = resample_slices(ramp, ramp.shape, (1.0, 1.0, 1.0), (0.5, 1.0, 1.0))
    np.testing.assert_allclose(fine[1:-1, 0, 0], np.arange(0.25, 19, 0.5), rtol=1e-6)
    assert resampled_affine(np.eye(4), (1, 1, 1), (2, 1, 1))[0, 3] == 0.5
    with pytest.raises(ValueError, match="must be positive"):
        resampling_matrix(5, 1.0, 0.0)


def test_a_view_is_never_whole_in_memory(tmp_path):
    shape = (60, 400, 300)
    path = write_tomosynthesis(
        tmp_path / "a.dcm", breast(shape=shape), (1.0, 0.1, 0.1), laterality="L", view="CC", patient="P"
    )
    header = read_header(path)
    read_view(header, (2.0, 0.4, 0.4))  # imports
    tracemalloc.start()
    try:
        volume, _ = read_view(header, (2.0, 0.4, 0.4))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert volume.shape == (30, 100, 75)
    assert peak < volume.nbytes + 8 * 400 * 300 * 4  # stored it would be 14.4 MB as uint16, 28.8 as float32


def test_objects_of_implicit_representation_are_counted_right(write, tmp_path):
    path = write()
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
    data.save_as(tmp_path / "implicit.dcm", implicit_vr=True, little_endian=True)
    np.testing.assert_array_equal(read_view(read_header(tmp_path / "implicit.dcm"))[0], breast())
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


@pytest.mark.filterwarnings("ignore")
def test_damaged_headers_are_told_by_name_and_nothing_else_is_raised(write, tmp_path):
    good, rng, messages = write().read_bytes(), np.random.default_rng(0), []
    for k in range(150):
        content = bytearray(good)
        for place in rng.integers(132, len(good), 3):
            content[place] = rng.integers(256)
        file = tmp_path / "damaged.dcm"
        file.write_bytes(content[: rng.integers(100, len(good))] if k % 5 == 0 else content)
        try:
            read_view(read_header(file))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all("damaged.dcm" in message for message in messages)
