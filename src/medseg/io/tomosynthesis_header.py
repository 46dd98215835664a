"""DICOM headers of tomosynthesis: geometry, order of frames, laterality and view; and the frames by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.tomosynthesis_file import naming_file
from medseg.io.tomosynthesis_view import Spacing, View, affine_of

#: View codes in SNOMED CT, and in the older SRT form.
VIEWS = {"399162004": "CC", "R-10242": "CC", "399368009": "MLO", "R-10226": "MLO"}

TOLERANCE = 0.01  # slice distances may differ by this share (positions are rounded in many files)

__all__ = ["VIEWS", "frame_values", "read_frames", "view_of"]


def _macro(header: Any, name: str, frame: int, key: str) -> Any:
    """An attribute of a frame: from its functional groups, the shared ones, or the top level; ``None`` if nowhere."""
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or []
    groups = [per_frame[frame]] if frame < len(per_frame) else []
    groups += list(header.get("SharedFunctionalGroupsSequence") or [])
    for group in groups:
        items = group.get(name)
        if items and items[0].get(key) not in (None, ""):
            return items[0].get(key)
    value = header.get(key)
    return None if value in (None, "") else value


def view_of(headers: Sequence[Any], files: Sequence[Path], spacing: Spacing | None = None) -> View:
    """Put the geometry of one multi-frame object, or of a series of single frames, together.

    Args:
        headers: from :func:`medseg.io.tomosynthesis_file.read_dicom_header`, one or several.
        files: their paths.
        spacing: (d, h, w) in mm, used for what the headers lack (missing, zero or negative).

    Raises:
        ValueError: if the frames do not belong to one series or do not make a volume; the message names the file.
    """
    name = str(files[0]) if len(files) == 1 else str(files[0].parent)
    with naming_file(name):
        return _put_together(headers, files, name, spacing)


def _put_together(headers: Sequence[Any], files: Sequence[Path], name: str, spacing: Spacing | None) -> View:
    first = headers[0]
    _check_series(headers, files)
    stored = [(i, k) for i, header in enumerate(headers) for k in range(int(header.get("NumberOfFrames") or 1))]
    if len(stored) < 2:
        raise ValueError(f"{name} is one 2D image ({first.get('Modality', '?')}); a tomosynthesis view has many slices")
    remarks: list[str] = []
    pixel = _pixel_spacing(first, name, spacing, remarks)
    row, column, positions = _planes(headers, stored, name, spacing, remarks)
    order, step = _slices(np.cross(row, column), positions, name, spacing, remarks, len(files) > 1)
    if len(files) > 1:  # the view's files are in the order of its slices
        files, stored = [files[stored[k][0]] for k in order], [(i, 0) for i in range(len(order))]
    else:
        stored = [stored[k] for k in order]
    laterality, view = _laterality(first, remarks), _view(first, remarks)
    return View(
        files=tuple(str(file) for file in files),
        shape=(len(order), int(first.Rows), int(first.Columns)),
        affine=affine_of(row, column, positions[order[0]], step, pixel),
        laterality=laterality,
        view=view,
        patient=str(first.get("PatientID") or ""),
        study=str(first.get("StudyInstanceUID") or ""),
        series=str(first.get("SeriesInstanceUID") or ""),
        sop_instance=str(first.get("SOPInstanceUID") or ""),
        frames=tuple(stored),
        remarks=tuple(remarks),
    )


def _check_series(headers: Sequence[Any], files: Sequence[Path]) -> None:
    first = headers[0]
    for header, file in zip(headers[1:], files[1:], strict=True):
        for key in ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns"):
            if header.get(key) != first.get(key):
                raise ValueError(
                    f"{file} has {key} {header.get(key)}, {files[0].name} in the same view has {first.get(key)}; "
                    "one view is one series: give each its own folder, or read the folder as many views"
                )
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise ValueError(f"{file} is a whole multi-frame view among others; pass one file, not the folder")


def _pixel_spacing(header: Any, name: str, spacing: Spacing | None, remarks: list[str]) -> tuple[float, float]:
    """Distance of rows and of columns in mm."""
    value = _macro(header, "PixelMeasuresSequence", 0, "PixelSpacing")
    if value is None and header.get("ImagerPixelSpacing"):
        value = header.ImagerPixelSpacing
        remarks.append("pixel spacing at the detector (ImagerPixelSpacing): no other in the header")
    pair = [float(v) for v in value] if value is not None else []
    if len(pair) == 2 and all(0 < v < np.inf for v in pair):
        return pair[0], pair[1]
    said = f"pixel spacing {pair}" if pair else "no pixel spacing"
    if spacing is None:
        raise ValueError(f"{name} has {said} in its header; pass spacing=(slice, row, column) in mm (--file_spacing)")
    remarks.append(f"{said} in the header; {spacing[1]:g} x {spacing[2]:g} mm as given")
    return spacing[1], spacing[2]


def _planes(
    headers: Sequence[Any], stored: Sequence[tuple[int, int]], name: str, spacing: Spacing | None, remarks: list[str]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Directions of a row and of a column, and the position of each stored frame, LPS in mm."""
    tilts = [_macro(headers[i], "PlaneOrientationSequence", k, "ImageOrientationPatient") for i, k in stored]
    places = [_macro(headers[i], "PlanePositionSequence", k, "ImagePositionPatient") for i, k in stored]
    given = [np.size(tilt) == 6 and np.size(place) == 3 for tilt, place in zip(tilts, places, strict=True)]
    if not all(given):
        lacking = given.count(False)
        if spacing is None:
            raise ValueError(
                f"{name}: {lacking} of {len(stored)} frames have no position or orientation; if they are stored in "
                "order, pass spacing=(slice, row, column) in mm (--file_spacing)"
            )
        remarks.append(f"{lacking} frames have no position; taken in stored order, {spacing[0]:g} mm apart as given")
        z = np.arange(len(stored)) * spacing[0]
        return np.array([1.0, 0, 0]), np.array([0, 1.0, 0]), np.stack([0 * z, 0 * z, z], axis=1)
    directions = np.array(tilts, np.float64)
    row, column = directions[0, :3], directions[0, 3:]
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise ValueError(f"{name}: the frames do not lie parallel to each other; they are no volume")
    if abs(np.linalg.norm(row) - 1) > 1e-3 or abs(np.linalg.norm(column) - 1) > 1e-3 or abs(row @ column) > 1e-3:
        raise ValueError(f"{name}: ImageOrientationPatient {directions[0].tolist()} is no pair of right-angled axes")
    return row, column, np.array(places, np.float64)


def _slices(
    normal: npt.NDArray[np.float64],
    positions: npt.NDArray[np.float64],
    name: str,
    spacing: Spacing | None,
    remarks: list[str],
    single: bool,
) -> tuple[list[int], npt.NDArray[np.float64]]:
    """The frames in spatial order, and the step from one slice to the next, LPS in mm."""
    along = positions @ normal
    if np.ptp(along) < 1e-6 and spacing is not None:
        remarks.append(f"all frames at one position; taken in stored order, {spacing[0]:g} mm apart as given")
        return list(range(len(along))), normal * spacing[0]
    order = np.argsort(along, kind="stable")
    if (np.diff(along) < 0).all() and not single:
        order = order[::-1]  # the other way round is an order too: kept as stored
    elif (np.diff(along) <= 0).any() and not single:
        remarks.append("frames stored out of spatial order; sorted along their normal")
    gaps = np.abs(np.diff(along[order]))
    usual = float(np.median(gaps))
    if gaps.min() <= 1e-6:
        k = int(gaps.argmin())
        raise ValueError(
            f"{name}: frames {order[k] + 1} and {order[k + 1] + 1} lie at the same position; remove one, or if no "
            "position is right pass spacing=(slice, row, column) in mm (--file_spacing) with positions removed"
        )
    # a step between two slices that is off by more is a frame that is missing: no volume of equal steps
    if np.abs(gaps - usual).max() > max(TOLERANCE * usual, 0.02):
        k = int(np.abs(gaps - usual).argmax())
        raise ValueError(
            f"{name}: slices are {usual:g} mm apart, but {gaps[k]:g} mm between frames {order[k] + 1} and "
            f"{order[k + 1] + 1}; is a frame missing? Export the view again"
        )
    step = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
    shift = step - (step @ normal) * normal
    if np.linalg.norm(shift) > TOLERANCE * np.linalg.norm(step):
        remarks.append("slices are shifted against each other within their plane (a sheared volume)")
    return order.tolist(), step


def _laterality(header: Any, remarks: list[str]) -> str:
    value = _macro(header, "FrameAnatomySequence", 0, "FrameLaterality")
    value = str(value or header.get("ImageLaterality") or header.get("Laterality") or "").upper()
    if value in ("L", "R"):
        return value
    remarks.append(f"laterality {value or 'missing'}: of no use for counting by breast")
    return ""


def _view(header: Any, remarks: list[str]) -> str:
    codes = header.get("ViewCodeSequence") or []
    if codes:
        value = str(codes[0].get("CodeValue", ""))
        return VIEWS.get(value) or str(codes[0].get("CodeMeaning") or value)
    position = str(header.get("ViewPosition") or "")
    if not position:
        remarks.append("view (CC, MLO) missing")
    return position


def frame_values(header: Any, frame: int) -> tuple[float, float, float | None]:
    """Slope and intercept of a frame, and what stored values are subtracted from (MONOCHROME1), or ``None``."""
    slope = _macro(header, "PixelValueTransformationSequence", frame, "RescaleSlope")
    intercept = _macro(header, "PixelValueTransformationSequence", frame, "RescaleIntercept")
    invert = None
    if header.PhotometricInterpretation == "MONOCHROME1":
        invert = float(2**header.BitsStored - 1) if header.PixelRepresentation == 0 else -1.0
    return float(1 if slope is None else slope), float(intercept or 0), invert


def read_frames(view: View) -> Iterator[npt.NDArray[np.float32]]:
    """The slices of a DICOM view in spatial order, one at a time: MONOCHROME1 turned over, then rescaled."""
    import pydicom
    from pydicom.pixels import iter_pixels

    jobs = [(view.files[0], [k for _, k in view.frames])] if len(view.files) == 1 else [(f, [0]) for f in view.files]
    for file, frames in jobs:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        try:
            stored = iter_pixels(file, indices=frames, raw=True)
            for k, image in zip(frames, stored, strict=True):
                slope, intercept, invert = frame_values(header, k)
                values = image.astype(np.float32)
                if invert is not None:
                    values = np.float32(invert) - values
                yield values if (slope, intercept) == (1, 0) else values * np.float32(slope) + np.float32(intercept)
        except Exception as error:  # every decoder has its own kinds
            raise ValueError(f"{file}: its pixels cannot be decoded: {error}") from error
