"""Phantom views of a breast: bright inside, dark outside, chest wall on either side, with a skin of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import generate_uid

from medseg.io.tomosynthesis import read_header
from medseg.io.tomosynthesis_dicom import write_tomosynthesis
from medseg.io.tomosynthesis_nifti import write_nifti

SHAPE, SPACING = (8, 40, 32), (2.0, 1.0, 1.0)


@dataclass(frozen=True)
class PhantomView:
    """Files of one view and what is in them, as stored."""

    image: Path
    label: Path
    stored: np.ndarray
    mask: np.ndarray

    @property
    def item(self) -> dict[str, str]:
        return {"image": str(self.image), "label": str(self.label)}


def half_disc(shape: tuple[int, int, int] = SHAPE, margin: float = 3.0) -> np.ndarray:
    """(H, W): breast with its chest wall at low columns."""
    h, w = np.mgrid[: shape[1], : shape[2]]
    rows = shape[1] / 2
    return ((h - rows + 0.5) / (rows - margin)) ** 2 + (w / (shape[2] - margin)) ** 2 < 1


@pytest.fixture
def make_view(tmp_path) -> Callable[..., PhantomView]:
    """Writes a DICOM view and its mask. Boxes of masses are given as stored; a right breast is mirrored."""

    def make(
        *boxes: tuple[int, ...],
        name: str = "v",
        laterality: str = "L",
        view: str = "CC",
        patient: str = "P1",
        mirrored: bool | None = None,
    ) -> PhantomView:
        inside = half_disc()
        if (laterality == "R") if mirrored is None else mirrored:
            inside = inside[:, ::-1]
        rng = np.random.default_rng(sum(map(ord, name)))
        stored = np.where(inside, 400 + 60 * rng.random(SHAPE), 20).astype(np.uint16)
        mask = np.zeros(SHAPE, np.uint8)
        for number, (d0, h0, w0, d1, h1, w1) in enumerate(boxes, start=1):
            mask[d0:d1, h0:h1, w0:w1] = number
        stored[mask > 0] += 300
        image, label = tmp_path / f"{name}.dcm", tmp_path / f"{name}_mask.nii.gz"
        study = generate_uid(entropy_srcs=[patient])  # one of both views
        write_tomosynthesis(
            image, stored, SPACING, laterality=laterality, view=view, patient=patient, uid_seed=name, study_uid=study
        )
        write_nifti(label, mask, read_header(image).affine)
        return PhantomView(image, label, stored, mask)

    return make
