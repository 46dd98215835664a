"""Breast tomosynthesis views as volumes (D, H, W): DICOM multi-frame objects, series of single frames, NIfTI, NRRD.

Own reading, because the common ones fail silently on such objects: ITK takes 1 mm where measures are missing or frames
are out of order, reads a truncated file without a word and does not turn MONOCHROME1 over; MONAI's PydicomReader gives
an identity affine.

NIfTI and NRRD arrays are (column, row, slice) on disk, see :mod:`medseg.io.tomosynthesis_nifti`.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.resampling import resample_slices, resampled_affine, resampling_matrix
from medseg.io.tomosynthesis_file import naming_file, read_dicom_header
from medseg.io.tomosynthesis_header import read_frames, view_of
from medseg.io.tomosynthesis_nifti import NIFTI, NRRD, read_volume_header, read_volume_slices, write_nifti
from medseg.io.tomosynthesis_view import (
    Affine,
    Spacing,
    View,
    Volume,
    laterality_contradiction,
    laterality_of_image,
)

log = logging.getLogger(__name__)

DICOM = (".dcm", ".dicom", ".ima")

#: What the single frames of one view have in common.
SERIES = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID", "ImageLaterality", "ViewPosition")

#: Digital Mammography X-Ray Image Storage, for presentation and for processing.
MAMMOGRAMS = ("1.2.840.10008.5.1.4.1.1.1.2", "1.2.840.10008.5.1.4.1.1.1.2.1")

__all__ = [
    "View",
    "find_views",
    "laterality_contradiction",
    "laterality_of_image",
    "read_header",
    "read_view",
    "resampling_matrix",
    "write_nifti",
]


def read_header(path: str | Path | Sequence[str | Path], spacing: Spacing | None = None) -> View:
    """Read what one view's header says, without its pixels, and check that it makes a volume.

    Frames out of spatial order are sorted along their normal (a remark says so); a steadily falling order is kept.
    Slice distances come from the positions; they may differ by 1 %.

    Args:
        path: a DICOM multi-frame object, a NIfTI (.nii, .nii.gz) or NRRD file, or a folder or list of the single frames
            of one view.
        spacing: (d, h, w) in mm, for what the file lacks (missing, zero or negative); it never overrides.

    Returns:
        The view; ``remarks`` tell what was odd.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no such view; the message names the file and the fix.
    """
    if spacing is not None and (len(spacing) != 3 or not all(0 < s < np.inf for s in spacing)):
        raise ValueError(f"spacing is {spacing}; give three positive numbers (slice, row, column) in mm")
    if isinstance(path, (str, Path)):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        if path.is_file() and path.name.lower().endswith(NIFTI + NRRD):
            return read_volume_header(path, spacing)
        files = [file for file in sorted(path.iterdir()) if _is_dicom(file)] if path.is_dir() else [path]
    else:
        files = [Path(file) for file in path]
    if not files:
        raise ValueError(f"{path} holds no DICOM files")
    return view_of([read_dicom_header(file) for file in files], files, spacing)


def find_views(
    folder: str | Path, pattern: str = "**/*", spacing: Spacing | None = None
) -> tuple[list[View], list[str]]:
    """Find every view below a folder; any mix of patients, studies and formats.

    Single frames are put together by series. Files that are neither DICOM (by ending or content), NIfTI nor NRRD are
    passed over, as are DICOM objects without an image (reports, segmentations, directories) and 2D mammograms, which
    lie in the same studies; the log has a line for each.

    Args:
        folder: folder to search.
        pattern: glob below it.
        spacing: as in :func:`read_header`.

    Returns:
        The views, by name, and one message for each file (or series) that should be a view and cannot be used.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    views: list[View] = []
    problems: list[str] = []
    series: dict[tuple[str, ...], list[tuple[Any, Path]]] = defaultdict(list)
    for file in sorted(folder.glob(pattern)):
        if not file.is_file() or file.name.startswith("."):
            continue
        try:
            if file.name.lower().endswith(NIFTI + NRRD):
                views.append(read_volume_header(file, spacing))
            elif _is_dicom(file) and not _is_other_object(file):
                header = read_dicom_header(file)
                if int(header.get("NumberOfFrames") or 1) > 1:
                    views.append(view_of([header], [file], spacing))
                else:
                    with naming_file(str(file)):
                        series[tuple(str(header.get(key, "")) for key in SERIES)].append((header, file))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    for members in series.values():
        if len(members) == 1 and members[0][0].get("SOPClassUID") in MAMMOGRAMS:
            log.warning("%s passed over: a 2D mammogram", members[0][1])
            continue
        try:
            views.append(view_of([header for header, _ in members], [file for _, file in members], spacing))
        except ValueError as error:
            problems.append(str(error))
    names = Counter(view.name for view in views)
    views = [replace(v, title=str(Path(v.files[0]).with_suffix(""))) if names[v.name] > 1 else v for v in views]
    return sorted(views, key=lambda view: view.name), problems


def read_view(view: View, spacing: Spacing | None = None) -> tuple[Volume, Affine]:
    """Read a view's voxels, MONOCHROME1 turned over and rescaled, at the wanted spacing.

    Frames are read and resampled one by one (:func:`medseg.io.resampling.resampling_matrix`): no more than the result
    and a few frames are in memory.

    Args:
        view: from :func:`read_header` or :func:`find_views`.
        spacing: (d, h, w) in mm; as stored by default.

    Returns:
        float32 volume (D, H, W), and its affine, voxel centre (d, h, w, 1) to mm in RAS.

    Raises:
        ValueError: if pixels cannot be decoded, or hold NaN or infinite values.
        OSError: if the file cannot be read.
    """
    wanted = view.spacing if spacing is None else spacing
    volume = resample_slices(_slices(view), view.shape, view.spacing, wanted)
    return volume, resampled_affine(view.affine, view.spacing, wanted)


def _is_dicom(file: Path) -> bool:
    if file.name.upper() == "DICOMDIR" or not file.is_file():
        return False
    if file.suffix.lower() in DICOM:
        return True
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def _is_other_object(file: Path) -> bool:
    """Reports, segmentations and the like, which lie beside images in many studies."""
    import pydicom

    try:
        header = pydicom.dcmread(file, specific_tags=["Modality", "Rows", "SOPClassUID"], stop_before_pixels=True)
        other = header.get("Modality") == "SEG" or ("SOPClassUID" in header and "Rows" not in header)
    except Exception:  # damaged: the reader says how
        return False
    if other:
        log.info("%s passed over: no image but %s", file, header.get("Modality", "another object"))
    return other


def _slices(view: View) -> Iterator[npt.NDArray[np.float32]]:
    """Slices (H, W) in order, checked for values that are no numbers."""
    slices = read_frames(view) if view.frames else read_volume_slices(Path(view.files[0]))
    count = 0
    for image in slices:
        if not np.isfinite(image).all():
            raise ValueError(f"{view.name} holds NaN or infinite values in slice {count + 1}")
        count += 1
        yield image
    if count != view.shape[0]:
        raise ValueError(f"{view.name} has {count} of {view.shape[0]} slices; copy or export it again")
