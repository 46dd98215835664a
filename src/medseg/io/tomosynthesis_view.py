"""What the header of one breast tomosynthesis view says, and whether its pixels agree with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[np.float32]
Affine = npt.NDArray[np.float64]
Spacing = tuple[float, float, float]

#: From DICOM's patient coordinates (LPS) to MONAI's and NIfTI's (RAS), and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

__all__ = [
    "LPS_TO_RAS",
    "Affine",
    "Spacing",
    "View",
    "Volume",
    "affine_of",
    "laterality_contradiction",
    "laterality_of_image",
    "spacing_of",
]


@dataclass(frozen=True, eq=False)
class View:
    """One tomosynthesis view: everything but its pixels."""

    files: tuple[str, ...]  # one multi-frame object, NIfTI or NRRD; or single frames, sorted along the normal
    shape: tuple[int, int, int]  # (D, H, W): slices, rows, columns as stored
    affine: Affine  # 4 x 4, voxel centre (d, h, w, 1) -> patient coordinates in mm, RAS
    laterality: str = ""  # "L", "R" or "" where nothing says it
    view: str = ""  # "CC", "MLO", the meaning of another code, or ""
    patient: str = ""
    study: str = ""
    series: str = ""
    sop_instance: str = ""
    frames: tuple[tuple[int, int], ...] = ()  # DICOM: of each slice its file (index) and its stored frame, from 0
    remarks: tuple[str, ...] = ()  # what was odd, but usable
    title: str = ""  # instead of the folder's name, where several series of single frames lie in one folder

    @property
    def spacing(self) -> Spacing:
        """Voxel size (d, h, w) in mm."""
        return spacing_of(self.affine)

    @property
    def name(self) -> str:
        """The file, or the folder of single frames: no two views that are found together have one name."""
        if self.title:
            return self.title
        return self.files[0] if len(self.files) == 1 else str(Path(self.files[0]).parent)

    @property
    def breast(self) -> str:
        """``PATIENT-L`` or ``PATIENT-R``; empty if the patient or the laterality is unknown."""
        return f"{self.patient}-{self.laterality}" if self.patient and self.laterality else ""


def spacing_of(affine: Affine) -> Spacing:
    """Voxel size (d, h, w) in mm of an affine, without the last digits, which the decimals of a header make up."""
    d, h, w = np.linalg.norm(affine[:3, :3], axis=0).round(9).tolist()
    return d, h, w


def affine_of(row: Any, column: Any, origin: Any, step: Any, pixel: tuple[float, float]) -> Affine:
    """The affine of a stack of DICOM frames.

    Args:
        row: (3,) unit direction in which a row's pixels follow each other (increasing w), LPS.
        column: (3,) unit direction of increasing h, LPS.
        origin: (3,) centre of the first slice's first pixel, mm, LPS.
        step: (3,) from one slice to the next, mm, LPS.
        pixel: distance of rows (h) and of columns (w), mm.

    Returns:
        4 x 4: voxel centre (d, h, w, 1) to mm, RAS.
    """
    lps = np.eye(4)
    lps[:3, 0] = step
    lps[:3, 1] = np.asarray(column, float) * pixel[0]
    lps[:3, 2] = np.asarray(row, float) * pixel[1]
    lps[:3, 3] = origin
    return LPS_TO_RAS @ lps


def laterality_of_image(volume: npt.NDArray[Any]) -> str:
    """On which side the chest wall is: the brighter of the first and the last column.

    This is the rule by which the owners of the public BCS-DBT data tell left from right, with two guards: the darkest
    value of the two columns is no tissue, and a difference below 10 % decides nothing.

    Args:
        volume: (D, H, W), higher is denser.

    Returns:
        ``"left"`` (low w), ``"right"`` (high w), or ``""`` where both sides are about equal.
    """
    first, last = (np.asarray(volume[..., w], np.float64) for w in (0, -1))
    air = min(first.min(), last.min())
    low, high = first.mean() - air, last.mean() - air
    if abs(low - high) <= 0.1 * max(low, high):
        return ""
    return "left" if low > high else "right"


def laterality_contradiction(view: View, volume: npt.NDArray[Any]) -> str | None:
    """Say what is wrong if the header's laterality does not fit the image.

    In the standard display a left breast has its chest wall at the low columns, a right breast at the high ones. An
    oblique view whose orientation is that of an oblique plane says more: the normal of a left breast's plane runs from
    upper right to lower left, and the chest wall is at the plane's posterior end, however the pixels are stored. A
    cranio-caudal plane is the same for both breasts, so there only the display's rule remains.

    Args:
        view: from :func:`medseg.io.tomosynthesis.read_header`.
        volume: the view's voxels (D, H, W) in any spacing, axes as stored.

    Returns:
        The message, with the file and the fix, or ``None``; also ``None`` without a laterality, and where the image
        does not tell.
    """
    side = laterality_of_image(volume)
    if not view.laterality or not side:
        return None
    axes = (LPS_TO_RAS @ view.affine)[:3, :3] / np.asarray(view.spacing)
    posterior, normal = axes[1, 2], np.cross(axes[:, 2], axes[:, 1])
    oblique = normal[0] * normal[2]  # left: lateral (+x) goes with caudal (-z)
    shown = f"{view.name}: the header says {'left' if view.laterality == 'L' else 'right'} breast"
    if abs(oblique) > 0.1 and abs(posterior) > 0.5:
        if (oblique < 0) != (view.laterality == "L"):
            return f"{shown}, but its orientation is that of the other breast's oblique view; correct the laterality"
        if (posterior > 0) == (side == "left"):
            return (
                f"{shown} with the chest wall at the {'high' if side == 'left' else 'low'} columns, but the image has "
                f"it at the {'low' if side == 'left' else 'high'} ones; correct the laterality, or flip the image"
            )
    elif (side == "left") != (view.laterality == "L"):
        return (
            f"{shown}, but the chest wall is at the {'low' if side == 'left' else 'high'} columns, as of a "
            f"{side} breast in standard display; correct the laterality, or turn the image by 180 degrees"
        )
    return None
