"""Breast Tomosynthesis objects taken apart, for tests of readers and of what reads."""

from __future__ import annotations

from pathlib import Path

import pydicom


def shared(data: pydicom.Dataset) -> pydicom.Dataset:
    return data.SharedFunctionalGroupsSequence[0]


def single_frames(source: Path, folder: Path, order: list[int]) -> list[Path]:
    """Take a multi-frame object apart into a CT-like series, file k holding frame order[k]."""
    data, files = pydicom.dcmread(source), []
    pixels = data.pixel_array
    folder.mkdir(parents=True, exist_ok=True)
    for k, frame in enumerate(order):
        one = pydicom.dcmread(source, stop_before_pixels=True)
        groups = one.PerFrameFunctionalGroupsSequence[frame]
        one.ImagePositionPatient = groups.PlanePositionSequence[0].ImagePositionPatient
        one.ImageOrientationPatient = shared(one).PlaneOrientationSequence[0].ImageOrientationPatient
        one.PixelSpacing = shared(one).PixelMeasuresSequence[0].PixelSpacing
        one.ImageLaterality, one.ViewPosition = shared(one).FrameAnatomySequence[0].FrameLaterality, "CC"
        for key in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence", "NumberOfFrames"):
            delattr(one, key)
        del one.ViewCodeSequence
        one.SOPInstanceUID = f"{data.SOPInstanceUID[:50]}.{frame}"
        one.file_meta.MediaStorageSOPInstanceUID = one.SOPInstanceUID
        one.add_new("PixelData", "OW", pixels[frame].tobytes())
        one.save_as(folder / f"{k}.dcm")
        files.append(folder / f"{k}.dcm")
    return files
