"""Tomosynthesis views as NIfTI and NRRD: arrays (column, row, slice), as every converter from DICOM writes them.

In memory they become (slice, row, column). What these formats cannot say (patient, laterality, view) is taken from
names that end like ``PATIENT_LCC.nii.gz``.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.files import write_atomically
from medseg.io.tomosynthesis_view import Affine, Spacing, View, affine_of

NIFTI, NRRD = (".nii.gz", ".nii"), (".nrrd", ".nhdr")

_NAME = re.compile(r"^(?:(?P<patient>.*)[_\-. ])?(?P<side>[LR])[_\-]?(?P<view>CC|MLO)$", re.IGNORECASE)

#: Signs that take the named space of an NRRD file to RAS.
_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}

__all__ = ["NIFTI", "NRRD", "read_volume_header", "read_volume_slices", "write_nifti"]


def read_volume_header(path: Path, spacing: Spacing | None = None) -> View:
    """The header of a NIfTI or NRRD file as a view.

    Args:
        path: file to read.
        spacing: (d, h, w) in mm, if the file has no usable voxel size.

    Raises:
        ValueError: if it is no single 3D grey volume, is cut off or has no voxel size; the message names the file.
    """
    remarks: list[str] = []
    shape, affine = _nrrd_header(path) if path.name.lower().endswith(NRRD) else _nifti_header(path)
    if len(shape) != 3 or min(shape) < 2:
        raise ValueError(
            f"{path} is {' x '.join(map(str, shape[::-1]))} (column, row, slice); one 3D volume of several slices is "
            "needed"
        )
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not (sizes > 0).all():
        said = "voxel size " + " x ".join(f"{s:g}" for s in sizes) + " mm"
        if spacing is None:
            raise ValueError(f"{path} has the {said}; pass spacing=(slice, row, column) in mm (--file_spacing)")
        remarks.append(f"{said} in the header; {' x '.join(f'{s:g}' for s in spacing)} mm as given")
        affine = affine_of((1, 0, 0), (0, 1, 0), (0, 0, 0), (0, 0, spacing[0]), spacing[1:])
    stem = path.name[: -len(next(end for end in NIFTI + NRRD if path.name.lower().endswith(end)))]
    match = _NAME.match(stem)
    remarks += (
        ["laterality, view and patient are those of the file's name"]
        if match
        else ["laterality missing: of no use for counting by breast", "view (CC, MLO) missing"]
    )
    return View(
        files=(str(path),),
        shape=(shape[0], shape[1], shape[2]),
        affine=affine,
        laterality=match["side"].upper() if match else "",
        view=match["view"].upper() if match else "",
        patient=(match["patient"] or "") if match else stem,
        remarks=tuple(remarks),
    )


def _nifti_header(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape (d, h, w) and affine."""
    import nibabel as nib
    from nibabel.openers import ImageOpener

    try:
        image = nib.load(path)
        shape, affine = tuple(int(n) for n in image.shape), np.array(image.affine, np.float64)
        kind, offset = image.get_data_dtype(), image.dataobj.offset
        with ImageOpener(path) as file:  # as stored: loading turns a voxel size of 0 into 1
            zooms = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    except Exception as error:  # nibabel raises many kinds
        raise ValueError(f"{path} is no readable NIfTI file: {error}") from error
    if kind.kind not in "biuf":
        raise ValueError(f"{path} is a colour or complex image ({kind}); a grey one is needed")
    needed, there = offset + int(np.prod(shape)) * kind.itemsize, path.stat().st_size
    if path.suffix == ".nii" and there < needed:
        raise ValueError(f"{path} is cut off: {there:,} of {needed:,} bytes; copy it again")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if not image.header["sform_code"] and not image.header["qform_code"] and not (zooms > 0).all():
        affine[:3, :3] = np.diag(zooms)
    return shape[::-1], affine[:, [2, 1, 0, 3]]


def _nrrd_header(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape (d, h, w) and affine; no voxel size in the header makes an affine of zeros."""
    with path.open("rb") as file:
        if not file.readline().startswith(b"NRRD"):
            raise ValueError(f"{path} is no NRRD file")
        lines = iter(lambda: file.readline().decode("utf-8", "replace").strip(), "")
        pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith("#")]
    fields = {key.strip().lower(): value.strip() for key, value in pairs}
    try:
        shape = tuple(int(n) for n in fields["sizes"].split())
        steps, origin = np.zeros((3, 3)), np.zeros(3)
        if "space directions" in fields:
            triples = re.findall(r"\(([^)]*)\)", fields["space directions"])
            steps = np.array([[float(v) for v in triple.split(",")] for triple in triples])
            origin = np.array([float(v) for v in fields.get("space origin", "(0,0,0)").strip("()").split(",")])
        elif "spacings" in fields:
            steps = np.diag([float(v) for v in fields["spacings"].split()])
        if len(shape) != 3:
            return shape[::-1], np.eye(4)
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = steps.T[:, ::-1], origin
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: its NRRD header cannot be understood: {error}") from error
    signs = _SPACES.get(fields.get("space", "lps").lower())
    if signs is None:
        raise ValueError(f"{path} is in the space {fields['space']}; one of RAS, LAS and LPS is needed")
    return shape[::-1], np.diag([*signs, 1.0]) @ affine


def read_volume_slices(path: Path) -> Iterator[npt.NDArray[np.float32]]:
    """The slices (H, W) of a NIfTI or NRRD volume in stored order.

    Raises:
        ValueError: if the values cannot be read, e.g. because a compressed file is cut off.
    """
    try:
        if path.name.lower().endswith(NRRD):
            import itk

            yield from np.asarray(itk.array_from_image(itk.imread(str(path)))).astype(np.float32, copy=False)
            return
        import nibabel as nib

        values: Any = nib.load(path, keep_file_open=True).dataobj  # an open file: gzip is unpacked once, forwards
        rest = (0,) * (len(values.shape) - 3)
        for k in range(values.shape[2]):
            yield np.asarray(values[(slice(None), slice(None), k, *rest)]).T.astype(np.float32, copy=False)
    except Exception as error:  # the readers raise whatever their libraries raise
        raise ValueError(f"{path} cannot be read, or is cut off: {error}") from error


def write_nifti(path: str | Path, volume: npt.NDArray[Any], affine: Affine) -> None:
    """Write a volume as NIfTI, whole or not at all; equal volumes give equal bytes.

    Args:
        path: file to write, ``.nii`` or ``.nii.gz``.
        volume: (D, H, W); stored as (W, H, D), as other programs expect it.
        affine: voxel centre (d, h, w, 1) to mm, RAS.
    """
    import nibabel as nib

    array = volume.astype(np.uint8) if volume.dtype == bool else volume
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])
    image.header.set_xyzt_units("mm")
    content = image.to_bytes()
    write_atomically(Path(path), gzip.compress(content, 3, mtime=0) if Path(path).suffix == ".gz" else content)
