"""Simulated tomosynthesis views with exact masks: breasts with one mass, imaged over a small arc, as DICOM objects.

The paper has 364 breasts with one mass each (a training part of 201 and a test part of 163), CC and MLO views, imaged
over 20 degrees in 20 projections and reconstructed by SART. Phantoms are smaller and coarser, so that a network can be
trained on a CPU: 32 x 128 x 96 voxels of 2 x 1.25 x 1.25 mm by default, 64 x 160 x 120 mm. Masses have 10 to 55 mm; the
paper's largest of 140 mm would not fit. Attenuation of masses, as a multiple of that of glands, is an argument: nature
has about 1.03 to 1.10, where masses in dense breasts hardly show; the default of 1.12 to 1.30 can be learnt in minutes
and must be named beside every result.

Everything random is drawn in one step per breast from ``SeedSequence((seed, index))``.

    medseg simulate dbt_mass --out data --count 220
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.datalist import write_datalist
from medseg.progress import track
from medseg.tasks.dbt_mass.acquisition import Acquisition
from medseg.tasks.dbt_mass.phantom import VIEWS, Anatomy, Grid, Mask, Population, draw_breast, make_view

#: Breasts that a worker process makes before it reports.
CHUNK = 4

#: Largest stored value: 10 bits.
TOP = 1023

Stored = npt.NDArray[np.uint16]

#: Index, what was drawn, and by view the stored values and the mask, in standard display.
Made = tuple[int, Anatomy, dict[str, tuple[Stored, Mask]]]

__all__ = ["benchmark_view", "self_test_case", "simulate"]


@dataclass(frozen=True)
class _Job:
    """What every breast of one call shares; goes to the worker processes."""

    seed: int
    grid: Grid
    population: Population
    acquisition: Acquisition


def simulate(
    out: Path,
    count: int,
    seed: int = 0,
    style: Sequence[str] = ("standard",),
    size: int | None = None,
    *,
    conspicuity: str = "1.12,1.30",
    densities: str = "10,30,40,20",
    normal: float = 0.0,
    shape: str = "32,128,96",
    spacing: str = "2,1.25,1.25",
    angle: float = 20.0,
    projections: int = 20,
    noise: float = 0.02,
    method: str = "regularised",
    regularisation: float = 0.05,
    iterations: int = 4,
    relaxation: float = 0.5,
    test_share: float = 0.45,
    folds: int = 5,
    workers: int = 2,
) -> Path:
    """Write the CC and MLO views of ``count`` breasts, one of each patient, their masks and the ``datalist.json``.

    Views are DICOM Breast Tomosynthesis objects of 10 bits in standard display (chest wall at low columns for left
    breasts, at high ones for right breasts); masks are NIfTI of the same grid, 1 in the core of the mass without its
    spicules. The same arguments give the same bytes, whatever ``workers`` is; a larger ``count`` keeps the first ones.

    Args:
        out: folder to write to.
        count: breasts, each of another patient; two views each.
        seed: of everything that is drawn.
        style: only ``standard``; contrast and method have arguments of their own.
        size: not used, see ``shape``.
        conspicuity: smallest and largest attenuation of a mass as a multiple of glandular tissue.
        densities: shares of ACR density classes 1 to 4.
        normal: share of breasts without a mass; the paper has none.
        shape: slices, rows and columns.
        spacing: of them, in mm.
        angle: arc of the tube in degrees.
        projections: on that arc.
        noise: standard deviation as a part of that of the projections.
        method: ``regularised``, ``sart`` (the paper's) or ``backprojection``.
        regularisation: of ``regularised``.
        iterations: of ``sart``.
        relaxation: of ``sart``.
        test_share: share of patients in the test part (the paper: 163 of 364).
        folds: training patients are dealt to so many folds in turn.
        workers: processes; with more than one, a script must call this under ``if __name__ == "__main__":``.

    Returns:
        Path of the data list. Items carry ``patient``, ``breast`` (``P0001-L``), ``laterality``, ``view``, ``age``,
        ``density`` (ACR 1 to 4), ``mass`` (its label, 1), ``mass_type``, ``histology``, ``diameter_mm`` (longest, in
        this view) and ``contrast``; a breast without a mass has ``none`` or 0 there.

    Raises:
        ValueError: on a number out of range, or a folder of other data.
    """
    job = _Job(
        seed,
        Grid(_sizes(shape), _three(_numbers("spacing", spacing, 3))),
        Population(_two(_numbers("conspicuity", conspicuity, 2)), _numbers("densities", densities, 4), normal),
        Acquisition(angle, projections, noise, method, regularisation, iterations, relaxation),
    )
    _check(count, seed, style, size, test_share, folds, workers)
    _refuse_other_data(out)
    description = _description(job)
    training: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for index, breast, views in track(_make_all(job, count, workers), "simulate dbt_mass", total=count):
        items = _write(out, index, breast, views, job, description)
        # every n-th patient, so that a larger count keeps the parts
        if int((index + 1) * test_share + 1e-9) > int(index * test_share + 1e-9):
            test += items
        else:
            training += [{**item, "fold": len(training) // len(VIEWS) % folds} for item in items]
    return write_datalist(
        out / "datalist.json",
        training,
        test,
        name="dbt_mass (simulated)",
        description=description,
        labels={"0": "background", "1": "mass"},
    )


def self_test_case(folder: Path) -> None:
    """Write the one tiny case that a packed bundle carries: ``P0001_L_CC.dcm``, 32 x 64 x 48 voxels with a mass."""
    job = _Job(0, Grid((32, 64, 48), (2.0, 2.5, 2.5)), Population(), Acquisition())
    breast = replace(draw_breast(np.random.SeedSequence((0, 0)), job.grid, job.population), laterality="L")
    stored, _ = _stored(breast, "CC", job)
    _write_dicom(folder / "P0001_L_CC.dcm", stored, breast, "CC", job, "medseg self-test")


def benchmark_view(
    path: Path,
    seed: int = 0,
    shape: tuple[int, int, int] = (60, 2457, 1890),
    spacing: tuple[float, float, float] = (1.0, 0.106, 0.106),
    binning: int = 4,
) -> tuple[int, int, int, int, int, int]:
    """Write one view of the size that scanners deliver, in less than 4 GB of memory.

    The phantom is made on a grid ``binning`` times coarser in the plane and enlarged linearly, slice by slice.

    Args:
        path: DICOM file to write.
        seed: of everything that is drawn.
        shape: (D, H, W).
        spacing: (d, h, w) in mm.
        binning: 4 makes the phantom at 0.424 mm.

    Returns:
        The box of the mass: (d0, h0, w0, d1, h1, w1), half-open, in voxels of the file.
    """
    from medseg.io.resampling import resampling_matrix

    coarse = (shape[0], -(-shape[1] // binning), -(-shape[2] // binning))
    grid = Grid(coarse, (spacing[0], spacing[1] * binning, spacing[2] * binning))
    job = _Job(seed, grid, Population(), Acquisition())
    breast = replace(draw_breast(np.random.SeedSequence((seed, 0)), grid), laterality="L")
    volume, mask = make_view(breast, "CC", grid, job.acquisition)
    places = [np.flatnonzero(mask.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    rows, columns = (resampling_matrix(coarse[a], grid.spacing[a], spacing[a])[0][: shape[a]] for a in (1, 2))
    stored = np.empty(shape, np.uint16)
    for image, result in zip(volume, stored, strict=True):
        result[:] = np.rint(TOP * (columns @ (rows @ image).T).T)
    _write_dicom(path, stored, breast, "CC", replace(job, grid=Grid(shape, spacing)), "medseg benchmark")
    low = [int(p[0]) * s for p, s in zip(places, (1, binning, binning), strict=True)]
    high = [min((int(p[-1]) + 1) * s, n) for p, s, n in zip(places, (1, binning, binning), shape, strict=True)]
    return low[0], low[1], low[2], high[0], high[1], high[2]


def _stored(breast: Anatomy, view: str, job: _Job) -> tuple[Stored, Mask]:
    """Stored values and mask in standard display: a right breast looks the other way."""
    volume, mask = make_view(breast, view, job.grid, job.acquisition)
    stored = np.rint(TOP * volume).astype(np.uint16)
    return (stored, mask) if breast.laterality == "L" else (stored[..., ::-1], mask[..., ::-1])


def _make(job: _Job, indices: range) -> list[Made]:
    """A few breasts. They are written elsewhere: writing needs packages that load slowly."""
    made: list[Made] = []
    for index in indices:
        breast = draw_breast(np.random.SeedSequence((job.seed, index)), job.grid, job.population)
        made.append((index, breast, {view: _stored(breast, view, job) for view in VIEWS}))
    return made


def _make_all(job: _Job, count: int, workers: int) -> Iterator[Made]:
    """All breasts in order, made in processes of their own where that pays."""
    work = partial(_make, job)
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    if workers == 1 or len(chunks) <= 2:
        for chunk in chunks:
            yield from work(chunk)
        return
    # spawn, not fork: the caller may have threads (torch)
    with ProcessPoolExecutor(min(workers, len(chunks)), get_context("spawn")) as pool:
        try:
            waiting: deque[Future[list[Made]]] = deque()
            for chunk in chunks:
                waiting.append(pool.submit(work, chunk))
                if len(waiting) > 2 * workers:  # no more than this is kept in memory
                    yield from waiting.popleft().result()
            for future in waiting:
                yield from future.result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died. If this was called from a script, put the call under "
                '`if __name__ == "__main__":`, or pass workers=1'
            ) from error


def _write(
    out: Path, index: int, breast: Anatomy, views: dict[str, tuple[Stored, Mask]], job: _Job, description: str
) -> list[dict[str, Any]]:
    """Write both views of a breast; returns their items."""
    from medseg.io.tomosynthesis import read_header
    from medseg.io.tomosynthesis_nifti import write_nifti

    patient, mass, items = f"P{index + 1:04d}", breast.mass, []
    for view, (stored, mask) in views.items():
        name = f"{patient}_{breast.laterality}_{view}"
        file = out / "views" / f"{name}.dcm"
        _write_dicom(file, stored, breast, view, job, description, patient)
        write_nifti(out / "masks" / f"{name}.nii.gz", mask, read_header(file).affine)
        items.append(
            {
                "image": f"views/{name}.dcm",
                "label": f"masks/{name}.nii.gz",
                "patient": patient,
                "breast": f"{patient}-{breast.laterality}",
                "laterality": breast.laterality,
                "view": view,
                "age": breast.age,
                "density": breast.density,
                "mass": "1" if mass else "none",
                "mass_type": mass.kind if mass else "none",
                "histology": mass.histology if mass else "none",
                "diameter_mm": round(breast.views[view].mass_diameter, 1),
                "contrast": round(mass.contrast, 3) if mass else 0.0,
            }
        )
    return items


def _write_dicom(
    path: Path, stored: Stored, breast: Anatomy, view: str, job: _Job, description: str, patient: str = "P0001"
) -> None:
    from medseg.io.tomosynthesis_dicom import write_tomosynthesis

    write_tomosynthesis(
        path,
        stored,
        job.grid.spacing,
        laterality=breast.laterality,
        view=view,
        patient=patient,
        age=breast.age,
        density=breast.density,
        description="medseg simulate dbt_mass",
        uid_seed=description,  # names the seed and all settings
    )


def _description(job: _Job) -> str:
    """Every setting that the files depend on."""
    (low, high), grid, how = job.population.conspicuity, job.grid, job.acquisition
    detail = {
        "regularised": f"regularisation {how.regularisation:g}",
        "sart": f"{how.iterations} iterations, relaxation {how.relaxation:g}",
        "backprojection": "shift and add",
    }
    return (
        f"medseg simulate dbt_mass: masses of {low:g} to {high:g} times the attenuation of glands, "
        f"{' x '.join(map(str, grid.shape))} voxels of {' x '.join(f'{s:g}' for s in grid.spacing)} mm, "
        f"{how.projections} projections over {how.angle:g} degrees, noise {how.noise:g}, {how.method} "
        f"({detail[how.method]}), ACR shares {' '.join(f'{s:g}' for s in job.population.densities)}, "
        f"{job.population.normal:g} without a mass, seed {job.seed}"
    )


def _check(
    count: int, seed: int, style: Sequence[str], size: int | None, test_share: float, folds: int, workers: int
) -> None:
    for name, value in {"count": count, "folds": folds, "workers": workers}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share is {test_share}; it must be a share in [0, 1]")
    if tuple(style) != ("standard",):
        raise ValueError(f"style is {', '.join(style) or 'empty'}; there is only standard (see conspicuity and method)")
    if size is not None:
        raise ValueError("size is one number, and a view needs three: pass shape, e.g. --set shape=32,128,96")


def _refuse_other_data(out: Path) -> None:
    if (out / "datalist.json").exists() and "(simulated)" not in (out / "datalist.json").read_text(encoding="utf-8"):
        raise ValueError(f"{out / 'datalist.json'} was not written by a simulation; choose another --out")


def _numbers(name: str, text: str, count: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(map(np.isfinite, numbers)):
        raise ValueError(f"{name} is {text!r}; give {count} numbers with commas between them")
    return numbers


def _two(numbers: tuple[float, ...]) -> tuple[float, float]:
    return numbers[0], numbers[1]


def _three(numbers: tuple[float, ...]) -> tuple[float, float, float]:
    return numbers[0], numbers[1], numbers[2]


def _sizes(text: str) -> tuple[int, int, int]:
    d, h, w = _numbers("shape", text, 3)
    if any(n != int(n) for n in (d, h, w)):
        raise ValueError(f"shape is {text!r}; slices, rows and columns are whole numbers")
    return int(d), int(h), int(w)
