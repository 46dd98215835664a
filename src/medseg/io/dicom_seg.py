"""Masses as a DICOM Segmentation object that points to the frames of the view they were found in."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import medseg
from medseg.io.files import write_atomically
from medseg.io.tomosynthesis_view import View

__all__ = ["write_dicom_seg"]


def write_dicom_seg(
    path: str | Path,
    mask: npt.NDArray[Any],
    view: View,
    *,
    algorithm: str = "medseg dbt_mass",
    labels: dict[int, str] | None = None,
    uid_seed: str | None = None,
) -> Path | None:
    """Write instances as one binary segment each; slices without a mass are left out.

    The source's frames are named by their stored numbers, also where they were put into another order on reading.

    Args:
        path: file to write.
        mask: (D, H, W) in the view's native grid; 0 is background, each other value one mass.
        view: the DICOM view, from :func:`medseg.io.tomosynthesis.read_header`.
        algorithm: name of what found the masses.
        labels: of each value of the mask, at most 64 characters; ``Mass 1`` and so on by default.
        uid_seed: the same seed gives the same UIDs; random ones by default.

    Returns:
        ``path``, or ``None`` if the mask is empty: such an object is not allowed, and nothing is written.

    Raises:
        ValueError: if the mask does not fit the view, or the view is no DICOM object; the message names the file.
        OSError: if the file cannot be written, or the view's file not read.
    """
    import pydicom

    if not view.frames:
        raise ValueError(f"{view.name} is no DICOM view; a DICOM segmentation needs one to refer to")
    if mask.shape != view.shape:
        raise ValueError(f"{path}: the mask is {mask.shape}, {view.name} is {view.shape}; bring it to the native grid")
    values = [int(v) for v in np.unique(mask) if v != 0]
    if not values:
        return None
    if len(values) > 255:
        raise ValueError(f"{path}: {len(values)} masses in one view; at most 255 can be written")
    sources = [pydicom.dcmread(file, stop_before_pixels=True) for file in view.files]
    segments = [_segment(i + 1, (labels or {}).get(v, f"Mass {i + 1}"), algorithm) for i, v in enumerate(values)]
    logging.getLogger("highdicom").setLevel(logging.WARNING)  # it tells of every module that it copies
    data = _segmentation(sources, view, _planes(mask, view, values), segments, uid_seed)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    write_atomically(Path(path), buffer.getvalue())
    return Path(path)


def _planes(mask: npt.NDArray[Any], view: View, values: list[int]) -> npt.NDArray[np.uint8]:
    """The mask in the order in which the source stores its frames, its values numbered 1 to n."""
    order = [k for _, k in view.frames] if len(view.files) == 1 else list(range(len(view.files)))
    numbered = np.zeros((int(max(order)) + 1, *mask.shape[1:]), np.uint8)
    for d, k in enumerate(order):
        if mask[d].any():
            numbered[k] = np.searchsorted([0, *values], mask[d])
    return numbered


def _segment(number: int, label: str, algorithm: str) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentAlgorithmTypeValues, SegmentDescription
    from highdicom.sr import CodedConcept

    return SegmentDescription(
        segment_number=number,
        segment_label=label[:64],
        segmented_property_category=CodedConcept("49755003", "SCT", "Morphologically Altered Structure"),
        segmented_property_type=CodedConcept("4147007", "SCT", "Mass"),
        algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=AlgorithmIdentificationSequence(
            name=algorithm,
            version=medseg.__version__,
            family=CodedConcept("123110", "DCM", "Artificial Intelligence"),
        ),
        anatomic_regions=[CodedConcept("76752008", "SCT", "Breast")],
    )


def _segmentation(
    sources: list[Any], view: View, planes: npt.NDArray[np.uint8], segments: list[Any], seed: str | None
) -> Any:
    from highdicom import PixelMeasuresSequence
    from highdicom.seg import Segmentation
    from pydicom.uid import generate_uid

    series, instance = (
        generate_uid(entropy_srcs=None if seed is None else [seed, part, view.sop_instance])
        for part in ("series", "instance")
    )
    depth, height, width = view.spacing
    measures = PixelMeasuresSequence((height, width), slice_thickness=depth, spacing_between_slices=depth)
    for source in sources:  # copies of headers: one without measures was read with a spacing given by hand
        if source.get("SharedFunctionalGroupsSequence"):
            source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = measures
        else:
            source.PixelSpacing, source.SliceThickness = measures[0].PixelSpacing, measures[0].SliceThickness
    try:
        data = Segmentation(
            source_images=sources,
            pixel_array=planes,
            segmentation_type="BINARY",
            segment_descriptions=segments,
            series_instance_uid=series,
            series_number=100,
            sop_instance_uid=instance,
            instance_number=1,
            manufacturer="medseg",
            manufacturer_model_name="medseg dbt_mass",
            software_versions=medseg.__version__,
            device_serial_number="1",
            content_label="MASSES",
            content_description="Masses in breast tomosynthesis",
            series_description="Masses (medseg)",
        )
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{view.name}: its header has not what a DICOM segmentation takes over: {error}") from error
    return data
