"""Simulated subtomograms with exact masks: complexes in random poses among neighbours, imaged like cryo-ET does it.

The paper (section 3.1) projects packed volumes of 22 complexes over a tilt range, applies the optics (CTF, MTF) and
noise (SNR infinity, 1000 and 0.5), back-projects, and cuts out 5,835 subtomograms of 32 x 32 x 32. It names neither
defocus nor tilt range nor resolution: those defaults are ours. Each subtomogram is simulated in a box of its own, 1.5
times its side, with one to three neighbours outside the sphere of the complex in the middle.

Everything random is drawn in one step per subtomogram from ``SeedSequence((seed, index))``: the same index has the same
pose, neighbours and defocus at every SNR. Neighbours come from the complex's own side of the split, so no unseen class
is ever in a training volume.

    medseg simulate cryoet_one_shot --out data --count 5835 --style inf --style 1000 --style 0.5
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from medseg.io.datalist import write_datalist
from medseg.io.files import write_csv
from medseg.io.mrc import write_mrc
from medseg.progress import track
from medseg.tasks.cryoet_one_shot.catalogue import catalogue
from medseg.tasks.cryoet_one_shot.complexes import Complex, density, download_models, read_folder
from medseg.tasks.cryoet_one_shot.scene import Mask, Physics, Volume, check_physics, draw_scene, render

#: Subtomograms that a worker process makes before it reports.
CHUNK = 16

#: Index, a volume for each SNR, mask.
Made = tuple[int, list[Volume], Mask]

__all__ = ["self_test_case", "simulate"]


@dataclass(frozen=True)
class _Job:
    """What every subtomogram of one call shares; goes to the worker processes."""

    out: Path
    complexes: tuple[Complex, ...]
    train_classes: int
    seed: int
    snrs: tuple[float, ...]
    physics: Physics

    def name(self, index: int, snr: float) -> str:
        """File name of a subtomogram and of its mask: class, number within the class, SNR."""
        classes = len(self.complexes)
        return f"{self.complexes[index % classes].name}_{index // classes:04d}_snr{snr:g}.mrc"

    def side(self, number: int) -> range:
        """The classes on the same side of the split as class ``number``."""
        trained = number < self.train_classes
        return range(self.train_classes) if trained else range(self.train_classes, len(self.complexes))


def simulate(
    out: Path,
    count: int,
    seed: int = 0,
    style: Sequence[str] = ("inf",),
    size: int = 32,
    *,
    models: str = "",
    pdb_ids: str = "",
    train_classes: int = 14,
    folds: int = 5,
    voxel_size: float = 10.0,
    resolution: float = 30.0,
    neighbours: int = 3,
    method: str = "tilt_series",
    max_tilt: float = 60.0,
    tilt_step: float = 3.0,
    ctf: str = "flipped",
    defocus: float = 5.0,
    defocus_range: float = 0.5,
    voltage: float = 300.0,
    spherical_aberration: float = 2.7,
    amplitude_contrast: float = 0.07,
    mtf: bool = True,
    workers: int = 2,
) -> Path:
    """Write ``count`` subtomograms and masks per SNR, and the ``datalist.json`` that lists them.

    Also written: ``templates/<class>.mrc`` (density of each class, not rotated, Da per cubic Angstrom) and
    ``classes.csv``. Protein is bright. The same arguments give the same bytes, whatever ``workers`` is.

    Args:
        out: folder to write to.
        count: subtomograms per style, dealt evenly to the classes; at least one each.
        seed: seed of everything that is drawn. (The synthetic catalogue does not depend on it.)
        style: signal-to-noise ratios as text, ``inf`` or a positive number; the paper has inf, 1000 and 0.5. SNR is
            var(signal) / var(noise) over the whole noise-free tilt series, in the part of the images that is cut out.
        size: side of the subtomograms in voxels, at least 16 and even (the paper: 32).
        models: folder of atomic models (PDB, mmCIF, also .gz), one class each, in the order of their names.
        pdb_ids: identifiers with commas, fetched from the wwPDB archive into ``out/models``. Both empty: the synthetic
            catalogue of 22 complexes.
        train_classes: the first so many classes are trained on, the rest (at least 2) is the test part.
        folds: the subtomograms of each training class are dealt to so many folds in turn.
        voxel_size: Angstrom.
        resolution: of the density, in Angstrom.
        neighbours: largest number of neighbours; from 1 to so many are drawn for each subtomogram, 0 gives none.
        method: ``tilt_series``, or ``analytic``: missing wedge and MTF as one filter, without CTF and noise, about
            twice as fast.
        max_tilt: tilts go from minus this to this, in degrees.
        tilt_step: degrees.
        ctf: ``flipped`` (phases corrected, as before any averaging), ``raw`` or ``none``.
        defocus: underfocus in micrometres.
        defocus_range: each subtomogram's defocus lies within so much of ``defocus``, in micrometres.
        voltage: kV.
        spherical_aberration: mm.
        amplitude_contrast: in [0, 1].
        mtf: apply the detector's transfer function.
        workers: processes; with more than one, a script must call this under ``if __name__ == "__main__":``.

    Returns:
        Path of the data list. Items carry ``class``, ``style`` (``snr-inf``, ...), ``mass_kda`` and
        ``radius_of_gyration`` (Angstrom), training items their ``fold``.

    Raises:
        ValueError: on a number out of range, a model that does not fit the box, or a folder of other data.
        FileNotFoundError: if ``models`` is no folder.
        ConnectionError: if ``pdb_ids`` cannot be fetched.
    """
    physics = Physics(
        size, voxel_size, resolution, neighbours, method, max_tilt, tilt_step, ctf, defocus, defocus_range, voltage,
        spherical_aberration, amplitude_contrast, mtf,
    )  # fmt: skip
    snrs = _parse_styles(style, method)
    check_physics(physics)
    for name, value in {"folds": folds, "workers": workers}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    _refuse_other_data(out)
    complexes = _complexes(models, pdb_ids, out, cell=resolution / 7.5)
    _check_classes(complexes, count, train_classes, physics)
    job = _Job(out, complexes, train_classes, seed, snrs, physics)
    for index, volumes, mask in track(_make_all(job, count, workers), "simulate cryoet_one_shot", total=count):
        for snr, volume in zip(snrs, volumes, strict=True):
            write_mrc(out / "subtomograms" / job.name(index, snr), volume, voxel_size)
            write_mrc(out / "masks" / job.name(index, snr), mask, voxel_size)
    _write_classes(job)
    training, test = _items(job, count, folds)
    names = [c.name for c in complexes]
    return write_datalist(
        out / "datalist.json",
        training,
        test,
        name="cryoet_one_shot (simulated)",
        description=f"medseg simulate cryoet_one_shot: {', '.join(_style(s) for s in snrs)}, {method}, {size} voxels "
        f"of {voxel_size:g} Angstrom, {len(complexes)} classes, seed {seed}",
        labels={"0": "background", "1": "complex"},
        classes={"training": names[:train_classes], "test": names[train_classes:]},
    )


def self_test_case(folder: Path) -> None:
    """Write the one tiny case that a packed bundle carries: a target and two structures to compare it with.

    Args:
        folder: empty folder; ``target.mrc`` and ``support/<class>.mrc`` are written to it.
    """
    physics = Physics(method="analytic")
    complexes = catalogue()
    pool = range(len(complexes) - 8, len(complexes))
    first, second = pool[1], pool[5]
    files = {"target": (first, 0), f"support/{complexes[first].name}": (first, 1)}
    files[f"support/{complexes[second].name}"] = (second, 2)
    for name, (number, index) in files.items():
        scene = draw_scene(complexes, number, pool, np.random.SeedSequence((0, index)), physics)
        volumes, _ = render(complexes, number, scene, physics)
        write_mrc(folder / f"{name}.mrc", volumes[0], physics.voxel_size)


def _make(job: _Job, indices: range) -> list[Made]:
    """The subtomograms of a few indices. They are written elsewhere: writing needs packages that load slowly."""
    made = []
    for index in indices:
        number = index % len(job.complexes)
        seed = np.random.SeedSequence((job.seed, index))
        scene = draw_scene(job.complexes, number, job.side(number), seed, job.physics)
        made.append((index, *render(job.complexes, number, scene, job.physics, job.snrs)))
    return made


def _make_all(job: _Job, count: int, workers: int) -> Iterator[Made]:
    """All subtomograms in order, made in processes of their own where that pays."""
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


def _items(job: _Job, count: int, folds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    training, test = [], []
    for snr in job.snrs:
        for index in range(count):
            number, within = index % len(job.complexes), index // len(job.complexes)
            item = {
                "image": f"subtomograms/{job.name(index, snr)}",
                "label": f"masks/{job.name(index, snr)}",
                "class": job.complexes[number].name,
                "style": _style(snr),
                "mass_kda": round(job.complexes[number].mass_kda, 1),
                "radius_of_gyration": round(job.complexes[number].radius_of_gyration, 1),
            }
            if number < job.train_classes:
                training.append({**item, "fold": within % folds})
            else:
                test.append(item)
    return training, test


def _write_classes(job: _Job) -> None:
    """Write ``classes.csv`` and the density of every class."""
    rows = []
    for number, item in enumerate(job.complexes):
        part = "training" if number < job.train_classes else "test"
        sizes = {"mass_kda": f"{item.mass_kda:.1f}", "radius_of_gyration": f"{item.radius_of_gyration:.1f}"}
        rows.append({"class": item.name, "part": part, **sizes, "symmetry": item.symmetry, "source": item.source})
        shape = (job.physics.size,) * 3
        template = density(item.points, item.masses, shape, job.physics.voxel_size, job.physics.resolution)
        write_mrc(job.out / "templates" / f"{item.name}.mrc", template, job.physics.voxel_size)
    write_csv(job.out / "classes.csv", rows)


def _complexes(models: str, pdb_ids: str, out: Path, cell: float) -> tuple[Complex, ...]:
    if models and pdb_ids:
        raise ValueError("models and pdb_ids are both given; keep one, or put all files into one folder")
    if models:
        return tuple(read_folder(Path(models).expanduser(), cell))
    if pdb_ids:
        return tuple(download_models([n for n in pdb_ids.split(",") if n.strip()], out / "models", cell))
    return catalogue()


def _parse_styles(style: Sequence[str], method: str) -> tuple[float, ...]:
    snrs = []
    for text in style:
        try:
            snr = float(str(text).removeprefix("snr-"))
        except ValueError:
            snr = np.nan
        if not snr > 0:
            raise ValueError(f"unknown style {text!r}; a style is a signal-to-noise ratio: inf or a positive number")
        snrs.append(snr)
    if not snrs:
        raise ValueError("no style is given; a style is a signal-to-noise ratio: inf or a positive number")
    if len(set(snrs)) != len(snrs):
        raise ValueError(f"a style is named twice: {', '.join(map(str, style))}")
    if method == "analytic" and snrs != [np.inf]:
        raise ValueError("method analytic has no noise: only style inf; use method tilt_series for other SNRs")
    return tuple(snrs)


def _check_classes(complexes: Sequence[Complex], count: int, train_classes: int, physics: Physics) -> None:
    if not 2 <= train_classes <= len(complexes) - 2:
        raise ValueError(
            f"train_classes is {train_classes} of {len(complexes)} classes; both sides need at least 2: choose 2 to "
            f"{len(complexes) - 2}"
            if len(complexes) >= 4
            else f"there are {len(complexes)} classes; training and test need at least 2 each, so give 4 models or more"
        )
    if count < len(complexes):
        raise ValueError(f"count is {count}; ask for at least 1 subtomogram for each of the {len(complexes)} classes")
    room = (physics.size / 2 - 1.5) * physics.voxel_size
    for item in complexes:
        if item.reach > room:
            raise ValueError(
                f"{item.name} reaches {item.reach:.0f} Angstrom from its centre, and a box of {physics.size} voxels of "
                f"{physics.voxel_size:g} Angstrom has room for {room:.0f}; take voxel_size >= "
                f"{item.reach / (physics.size / 2 - 1.5):.1f}, or a larger size"
            )


def _refuse_other_data(out: Path) -> None:
    if (out / "datalist.json").exists() and "(simulated)" not in (out / "datalist.json").read_text(encoding="utf-8"):
        raise ValueError(f"{out / 'datalist.json'} was not written by a simulation; choose another --out")


def _style(snr: float) -> str:
    return f"snr-{snr:g}"
