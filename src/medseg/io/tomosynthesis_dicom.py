"""Writing a volume as a DICOM Breast Tomosynthesis Image (Supplement 125; PS3.3 A.55), valid for ``dciodvfy``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import medseg
from medseg.io.tomosynthesis_view import Spacing

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.13.1.3"

VIEW_CODES = {"CC": ("399162004", "cranio-caudal"), "MLO": ("399368009", "medio-lateral oblique")}

#: BI-RADS density 1 to 4 (a to d), DICOM context group 6000.
DENSITY_CODES = (
    ("129716005", "Almost entirely fat"),
    ("129717001", "Scattered fibroglandular densities"),
    ("129718006", "Heterogeneously dense"),
    ("129719003", "Extremely dense"),
)

IMAGE_TYPE = ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "NONE"]

__all__ = ["plane_directions", "write_tomosynthesis"]


@dataclass(frozen=True)
class _Acquisition:
    """What is written about a view besides its voxels."""

    laterality: str  # "L" or "R"
    view: str  # "CC" or "MLO"
    patient: str
    age: int | None
    density: int | None
    accession: str
    date: str
    description: str
    uid_seed: str | None
    study_uid: str


def plane_directions(laterality: str, view: str) -> npt.NDArray[np.float64]:
    """Directions of w, h and d (rows of the array) in patient coordinates, LPS: those of the standard display.

    A left breast has its chest wall at w = 0 (w runs to anterior), a right one at the other end (w runs to posterior).
    Rows run from lateral to medial in the cranio-caudal view, and in the oblique one from upper lateral to lower medial
    at 45 degrees. Slices follow the beam, from the tube to the detector: w, h, d is a right-handed system.
    """
    side = 1.0 if laterality == "L" else -1.0  # +x is the patient's left
    row = np.array([0.0, -side, 0.0])
    slant = np.sqrt(0.5)
    column = np.array([-side, 0.0, 0.0]) if view == "CC" else np.array([-side * slant, 0.0, -slant])
    return np.stack([row, column, np.cross(row, column)])


def write_tomosynthesis(
    path: str | Path,
    volume: npt.NDArray[np.uint16],
    spacing: Spacing,
    *,
    laterality: str,
    view: str,
    patient: str,
    age: int | None = None,
    density: int | None = None,
    accession: str = "",
    date: str = "20200101",
    description: str = "medseg",
    uid_seed: str | None = None,
    study_uid: str = "",
) -> Path:
    """Write a view as one multi-frame object, uncompressed, whole or not at all.

    Equal arguments with a ``uid_seed`` give equal bytes. The volume must be in the standard display (see
    :func:`plane_directions`); its centre is placed 80 mm to the side of the breast and 60 mm in front of the origin.

    Args:
        path: file to write.
        volume: (D, H, W) uint16, higher is denser; 10 bits are declared as stored, more if the values need them.
        spacing: (d, h, w) in mm.
        laterality: ``L`` or ``R``.
        view: ``CC`` or ``MLO``.
        patient: identity, also the name.
        age: years.
        density: BI-RADS category 1 to 4 (a to d), kept in the acquisition context.
        accession: accession number.
        date: YYYYMMDD, of study and content.
        description: of the series.
        uid_seed: the same seed (and view) gives the same UIDs; they are random by default.
        study_uid: made from seed and patient by default: with a seed, one study for all views of a patient.

    Returns:
        ``path``.

    Raises:
        ValueError: if volume, spacing, laterality, view, age or density are impossible.
        OSError: if the file cannot be written.
    """
    acquisition = _Acquisition(
        laterality, view, patient, age, density, accession, date, description, uid_seed, study_uid
    )
    path = Path(path)
    _check(path, volume, spacing, acquisition)
    data = _identity(path, volume, spacing, acquisition)
    _image(data, volume)
    _frames(data, volume.shape[0], spacing, acquisition)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:  # not through bytes in memory: a native view has half a gigabyte
        data.save_as(unfinished, enforce_file_format=True)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _check(path: Path, volume: npt.NDArray[Any], spacing: Spacing, acquisition: _Acquisition) -> None:
    if volume.ndim != 3 or volume.dtype != np.uint16 or volume.shape[0] < 2 or 0 in volume.shape:
        raise ValueError(
            f"{path}: a view is uint16 (D, H, W) with D of at least 2, this is {volume.dtype} {volume.shape}; scale it"
        )
    if len(spacing) != 3 or not all(0 < s < np.inf for s in spacing):
        raise ValueError(f"{path}: spacing is {spacing}; give three positive numbers (d, h, w) in mm")
    if acquisition.laterality not in ("L", "R") or acquisition.view not in VIEW_CODES:
        raise ValueError(
            f"{path}: laterality {acquisition.laterality!r} and view {acquisition.view!r}; choose L or R, and CC or MLO"
        )
    if acquisition.age is not None and not 0 <= acquisition.age <= 120:
        raise ValueError(f"{path}: age is {acquisition.age}; give years from 0 to 120")
    if acquisition.density is not None and acquisition.density not in (1, 2, 3, 4):
        raise ValueError(f"{path}: density is {acquisition.density}; BI-RADS has 1 to 4")


def _code(value: str, meaning: str, scheme: str = "SCT") -> Any:
    return _item(CodeValue=value, CodingSchemeDesignator=scheme, CodeMeaning=meaning)


def _item(**attributes: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    for key, value in attributes.items():
        setattr(item, key, value)
    return item


def _uid(seed: str | None, *parts: Any) -> Any:
    from pydicom.uid import generate_uid

    return generate_uid(entropy_srcs=[seed, *map(str, parts)] if seed is not None else None)


def _identity(path: Path, volume: npt.NDArray[Any], spacing: Spacing, acquisition: _Acquisition) -> Any:
    """Patient, study, series, frame of reference, equipment, breast view, SOP common."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    seed, patient, date = acquisition.uid_seed, acquisition.patient, acquisition.date
    one = (patient, acquisition.laterality, acquisition.view, volume.shape, spacing)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SpecificCharacterSet = "ISO_IR 192"
    data.SOPClassUID, data.SOPInstanceUID = SOP_CLASS, _uid(seed, "instance", *one)
    data.PatientName = patient if "^" in patient else f"{patient}^"  # one without a caret is of a retired form
    data.PatientID, data.PatientSex, data.PatientBirthDate = patient, "F", ""
    if acquisition.age is not None:
        data.PatientAge = f"{acquisition.age:03d}Y"
    data.StudyInstanceUID = acquisition.study_uid or _uid(seed, "study", patient)
    data.StudyID, data.AccessionNumber, data.ReferringPhysicianName = "1", acquisition.accession, ""
    data.SeriesInstanceUID, data.SeriesNumber, data.InstanceNumber = _uid(seed, "series", *one), 1, 1
    data.SeriesDescription, data.Modality = acquisition.description, "MG"
    data.StudyDate = data.SeriesDate = data.ContentDate = date
    data.StudyTime = data.SeriesTime = data.ContentTime = "120000"
    data.FrameOfReferenceUID, data.PositionReferenceIndicator = _uid(seed, "frame", *one), ""
    data.Manufacturer, data.ManufacturerModelName = "medseg", "medseg simulate"
    data.DeviceSerialNumber, data.SoftwareVersions = "1", medseg.__version__
    value, meaning = VIEW_CODES[acquisition.view]
    data.ViewCodeSequence = [_code(value, meaning)]
    data.ViewCodeSequence[0].ViewModifierCodeSequence = []
    data.BreastImplantPresent = "NO"
    data.AcquisitionContextSequence = []
    if acquisition.density is not None:
        data.AcquisitionContextSequence = [
            _item(
                ValueType="CODE",
                ConceptNameCodeSequence=[_code("129715009", "Breast composition")],
                ConceptCodeSequence=[_code(*DENSITY_CODES[acquisition.density - 1])],
            )
        ]
    return data


def _image(data: Any, volume: npt.NDArray[np.uint16]) -> None:
    """Image pixel and X-ray 3D image modules."""
    data.ImageType = IMAGE_TYPE
    data.PixelPresentation, data.VolumetricProperties = "MONOCHROME", "VOLUME"
    data.VolumeBasedCalculationTechnique, data.ContentQualification = "NONE", "RESEARCH"
    data.BurnedInAnnotation, data.LossyImageCompression, data.PresentationLUTShape = "NO", "00", "IDENTITY"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.NumberOfFrames, data.Rows, data.Columns = volume.shape
    data.BitsAllocated, data.BitsStored = 16, max(10, int(volume.max()).bit_length())
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, 0
    data.add_new("PixelData", "OW", np.ascontiguousarray(volume, "<u2").tobytes())


def _frames(data: Any, count: int, spacing: Spacing, acquisition: _Acquisition) -> None:
    """Shared and per-frame functional groups, and the dimensions."""
    directions = plane_directions(acquisition.laterality, acquisition.view)
    top, dimensions = 2**data.BitsStored - 1, _uid(acquisition.uid_seed, "dimensions", data.SOPInstanceUID)
    size = np.array([data.Columns - 1, data.Rows - 1, count - 1]) * (spacing[2], spacing[1], spacing[0])
    centre = np.array([80.0 if acquisition.laterality == "L" else -80.0, -60.0, 0.0])
    origin = centre - size / 2 @ directions
    measures = _item(PixelSpacing=[_ds(spacing[1]), _ds(spacing[2])], SliceThickness=_ds(spacing[0]))
    measures.SpacingBetweenSlices = _ds(spacing[0])
    shared = _item(
        PixelMeasuresSequence=[measures],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=[_ds(v) for v in directions[:2].ravel()])],
        FrameAnatomySequence=[
            _item(FrameLaterality=acquisition.laterality, AnatomicRegionSequence=[_code("76752008", "Breast")])
        ],
        PixelValueTransformationSequence=[_item(RescaleIntercept=0, RescaleSlope=1, RescaleType="US")],
        FrameVOILUTSequence=[_item(WindowCenter=(top + 1) / 2, WindowWidth=top + 1)],
    )
    data.SharedFunctionalGroupsSequence = [shared]
    data.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=dimensions)]
    data.DimensionOrganizationType = "3D"
    data.DimensionIndexSequence = [
        _item(DimensionOrganizationUID=dimensions, DimensionIndexPointer=tag, FunctionalGroupPointer=0x00209111)
        for tag in (0x00209056, 0x00209057)  # StackID, InStackPositionNumber in FrameContentSequence
    ]
    data.PerFrameFunctionalGroupsSequence = [
        _item(
            FrameContentSequence=[_item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])],
            PlanePositionSequence=[
                _item(ImagePositionPatient=[_ds(v) for v in origin + k * spacing[0] * directions[2]])
            ],
            XRay3DFrameTypeSequence=[
                _item(
                    FrameType=IMAGE_TYPE,
                    PixelPresentation="MONOCHROME",
                    VolumetricProperties="VOLUME",
                    VolumeBasedCalculationTechnique="NONE",
                )
            ],
        )
        for k in range(count)
    ]


def _ds(value: float) -> str:
    """A number as DICOM writes decimals: 16 characters at most."""
    from pydicom.valuerep import format_number_as_ds

    return str(format_number_as_ds(float(value) + 0.0))  # + 0.0 turns -0 into 0
