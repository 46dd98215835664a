"""Masses as DICOM SEG: read back with pydicom and highdicom, each frame compared with the source frame it points to."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest

from medseg.io.dicom_seg import write_dicom_seg
from medseg.io.tomosynthesis import find_views, read_header, write_nifti
from medseg.io.tomosynthesis_dicom import write_tomosynthesis

SHAPE, SPACING = (6, 17, 13), (1.5, 0.25, 0.5)


@pytest.fixture
def mask() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:6, 3:7] = 4
    mask[2:5, 8:12, 2:5] = 9
    return mask


def written(folder: Path, order: list[int] | None = None, laterality: str = "L", view: str = "MLO") -> Path:
    """A view, its frames stored in another order if wanted."""
    volume = np.random.default_rng(0).integers(0, 900, SHAPE).astype(np.uint16)
    path = write_tomosynthesis(
        folder / "view.dcm", volume, SPACING, laterality=laterality, view=view, patient="P1", uid_seed="s"
    )
    if order:
        data = pydicom.dcmread(path)
        pixels = data.pixel_array
        data.PerFrameFunctionalGroupsSequence = [data.PerFrameFunctionalGroupsSequence[k] for k in order]
        data.add_new("PixelData", "OW", pixels[order].tobytes())
        data.save_as(path)
    return path


def frames_of(path: Path) -> dict[tuple[int, int], np.ndarray]:
    """Pixels by segment and referenced frame of the source (from 1)."""
    data = pydicom.dcmread(path)
    pixels = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    found = {}
    for group, frame in zip(data.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        segment = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[segment, int(source.ReferencedFrameNumber)] = frame
    return found


@pytest.mark.parametrize("order", [None, [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
@pytest.mark.parametrize("laterality", ["L", "R"])
def test_every_frame_points_to_the_source_frame_it_was_drawn_on(tmp_path, mask, order, laterality):
    view = read_header(written(tmp_path, order, laterality))
    path = write_dicom_seg(tmp_path / "out" / "seg.dcm", mask, view)
    frames = frames_of(path)
    expected = {
        (number, view.frames[d][1] + 1): mask[d] == value
        for number, value in ((1, 4), (2, 9))
        for d in range(len(mask))
        if (mask[d] == value).any()
    }
    assert set(frames) == set(expected)
    for key, frame in frames.items():
        np.testing.assert_array_equal(frame, expected[key])
    # and each lies where its source frame lies
    data, source = pydicom.dcmread(path), pydicom.dcmread(view.files[0])
    for group in data.PerFrameFunctionalGroupsSequence:
        number = int(group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber)
        theirs = source.PerFrameFunctionalGroupsSequence[number - 1].PlanePositionSequence[0]
        np.testing.assert_allclose(
            np.array(group.PlanePositionSequence[0].ImagePositionPatient, float),
            np.array(theirs.ImagePositionPatient, float),
            atol=1e-9,
        )


def test_object_says_whose_masses_found_by_what(tmp_path, mask):
    view = read_header(written(tmp_path))
    path = write_dicom_seg(
        tmp_path / "seg.dcm", mask, view, algorithm="mask_rcnn_3d", labels={4: "Mass 0.93"}, uid_seed="a"
    )
    data = highdicom.seg.segread(path)
    assert (data.PatientID, data.StudyInstanceUID, data.FrameOfReferenceUID != "") == ("P1", view.study, True)
    assert data.SegmentationType == "BINARY"
    assert list(data.segment_numbers) == [1, 2]
    assert [data.get_segment_description(k).segment_label for k in (1, 2)] == ["Mass 0.93", "Mass 2"]
    first = data.get_segment_description(1)
    assert first.segmented_property_type.value == "4147007"
    assert first.algorithm_identification[0].AlgorithmName == "mask_rcnn_3d"
    volume = data.get_volume(segment_numbers=[2], combine_segments=True, relabel=True)
    assert int((volume.array > 0).sum()) == int((mask == 9).sum())
    place = np.argwhere(volume.array > 0)[0]  # the same point of the patient, by its affine and by ours
    lps = (volume.affine @ [*place, 1])[:3] * [-1, -1, 1]
    index = np.linalg.inv(view.affine) @ [*lps, 1]
    assert mask[tuple(index[:3].round().astype(int))] == 9
    again = write_dicom_seg(tmp_path / "again.dcm", mask, view, uid_seed="a")
    assert pydicom.dcmread(again).SOPInstanceUID == data.SOPInstanceUID


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy (Debian package dicom3tools) is not installed")
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_dciodvfy_finds_no_fault(tmp_path, mask, view):
    path = write_dicom_seg(tmp_path / "seg.dcm", mask, read_header(written(tmp_path, view=view)))
    said = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
    assert (said.stdout + said.stderr).strip() == "Segmentation"


def test_empty_mask_writes_nothing(tmp_path, mask):
    view = read_header(written(tmp_path))
    assert write_dicom_seg(tmp_path / "seg.dcm", mask * 0, view) is None
    assert not (tmp_path / "seg.dcm").exists()


def test_misfits_are_refused(tmp_path, mask):
    view = read_header(written(tmp_path))
    with pytest.raises(ValueError, match="native grid"):
        write_dicom_seg(tmp_path / "seg.dcm", mask[1:], view)
    write_nifti(tmp_path / "a.nii", mask, view.affine)
    with pytest.raises(ValueError, match=r"a\.nii is no DICOM view"):
        write_dicom_seg(tmp_path / "seg.dcm", mask, read_header(tmp_path / "a.nii"))
    data = pydicom.dcmread(view.files[0])
    del data.FrameOfReferenceUID
    data.save_as(view.files[0])
    with pytest.raises(ValueError, match=r"view\.dcm: its header has not what"):
        write_dicom_seg(tmp_path / "seg.dcm", mask, view)
    assert not (tmp_path / "seg.dcm").exists()


def test_a_spacing_given_by_hand_is_written(tmp_path, mask):
    path = written(tmp_path)
    data = pydicom.dcmread(path)
    del data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    data.save_as(path)
    seg = pydicom.dcmread(write_dicom_seg(tmp_path / "seg.dcm", mask, read_header(path, (1.5, 0.2, 0.3))))
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert [float(v) for v in measures.PixelSpacing] == [0.2, 0.3]


def test_single_frames_are_named_by_their_file(tmp_path, mask):
    data = pydicom.dcmread(written(tmp_path))
    pixels, files = data.pixel_array, []
    for k in (2, 0, 5, 1, 4, 3):
        one = pydicom.dcmread(tmp_path / "view.dcm", stop_before_pixels=True)
        one.ImagePositionPatient = one.PerFrameFunctionalGroupsSequence[k].PlanePositionSequence[0].ImagePositionPatient
        groups = one.SharedFunctionalGroupsSequence[0]
        one.ImageOrientationPatient = groups.PlaneOrientationSequence[0].ImageOrientationPatient
        one.PixelSpacing, one.SliceThickness = groups.PixelMeasuresSequence[0].PixelSpacing, "1.5"
        del one.PerFrameFunctionalGroupsSequence, one.SharedFunctionalGroupsSequence, one.NumberOfFrames
        one.SOPClassUID, one.SOPInstanceUID = pydicom.uid.CTImageStorage, f"1.2.3.{k}"
        one.file_meta.MediaStorageSOPClassUID, one.file_meta.MediaStorageSOPInstanceUID = one.SOPClassUID, f"1.2.3.{k}"
        one.add_new("PixelData", "OW", pixels[k].tobytes())
        one.save_as(tmp_path / f"{k}.dcm")
        files.append(tmp_path / f"{k}.dcm")
    view = read_header(files)
    seg = pydicom.dcmread(write_dicom_seg(tmp_path / "seg.dcm", mask, view))
    found = seg.pixel_array
    assert len(found) == 5
    for group, frame in zip(seg.PerFrameFunctionalGroupsSequence, found, strict=True):
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        d = [Path(file).stem for file in view.files].index(source.split(".")[-1])
        value = (4, 9)[group.SegmentIdentificationSequence[0].ReferencedSegmentNumber - 1]
        np.testing.assert_array_equal(frame, mask[d] == value)


def test_a_segmentation_beside_a_view_is_no_view(tmp_path, mask):
    write_dicom_seg(tmp_path / "seg.dcm", mask, read_header(written(tmp_path)))
    views, problems = find_views(tmp_path)
    assert [Path(view.name).name for view in views] == ["view.dcm"]
    assert problems == []
