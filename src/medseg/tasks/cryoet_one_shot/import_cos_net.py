"""Convert the arrays of the original authors' release into MRC files and a data list.

The release of Zhou et al. 2020 has three arrays: ``data.npy`` and ``data_seg.npy``, 22 classes x 1000 slots x 32 x 32 x
32, and ``cnt.npy``, 22 x 1, the number of slots of each class that are filled; the rest is empty. Classes 0 to 13 are
trained on, 14 to 21 are the unseen ones.

The release does not say which way its three spatial axes run (nor its voxel size): they are kept in the order in which
they are stored and written as z, y, x. Say so where you use rules that depend on the tilt axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.datalist import stray_values, write_datalist
from medseg.io.mrc import write_mrc
from medseg.progress import track

__all__ = ["import_cos_net"]


@dataclass(frozen=True)
class _Release:
    """The three arrays, opened but not read."""

    data: npt.NDArray[Any]  # (classes, slots, D, H, W)
    masks: npt.NDArray[Any]  # same shape
    counts: list[int]  # filled slots of each class
    source: Path


def import_cos_net(
    source: Path,
    out: Path,
    *,
    train_classes: int = 14,
    folds: int = 5,
    voxel_size: float = 10.0,
    names: str = "",
) -> Path:
    """Write every filled slot as ``subtomograms/<class>_<number>.mrc`` and its mask, and ``datalist.json``.

    Volumes are shifted and scaled to mean 0 and standard deviation 1; masks become 0 and 1. The arrays (12 GB as
    float64) are mapped, never loaded whole. All volumes are checked before the first file is written.

    Args:
        source: folder with ``data.npy``, ``data_seg.npy`` and ``cnt.npy``.
        out: folder to write to.
        train_classes: the first so many classes are trained on; the rest is the test part.
        folds: the volumes of each training class are dealt to so many folds in turn.
        voxel_size: Angstrom; not in the release, only written into the files.
        names: class names with commas; ``class_00`` and so on by default.

    Returns:
        Path of the data list.

    Raises:
        FileNotFoundError: if one of the three files is missing.
        ValueError: if arrays do not fit each other, a count is impossible, a class is empty (missing), a volume is
            constant or holds NaN, or a mask is not binary; the message names class and slot.
    """
    if not 0 < voxel_size < np.inf:
        raise ValueError(f"voxel_size is {voxel_size}; it must be a positive number of Angstrom")
    if folds < 1:
        raise ValueError(f"folds is {folds}; it must be at least 1")
    listed = out / "datalist.json"
    if listed.exists() and "(COS-Net release)" not in listed.read_text(encoding="utf-8"):
        raise ValueError(f"{listed} was not written by this converter; choose another folder")
    release = _open(source)
    if not 2 <= train_classes <= len(release.counts) - 2:
        raise ValueError(
            f"train_classes is {train_classes} of {len(release.counts)} classes; both sides need at least 2"
        )
    classes = _class_names(names, len(release.counts))
    slots = [(c, k) for c, filled in enumerate(release.counts) for k in range(filled)]
    for c, k in track(slots, "check"):
        _check_slot(release, c, k)
    training: list[dict[str, Any]] = []
    test: list[dict[str, Any]] = []
    for c, k in track(slots, "convert"):
        file = f"{classes[c]}_{k:04d}.mrc"
        volume = np.asarray(release.data[c, k], np.float64)
        normalised = (volume - volume.mean()) / volume.std()
        write_mrc(out / "subtomograms" / file, normalised.astype(np.float32), voxel_size)
        write_mrc(out / "masks" / file, (release.masks[c, k] > 0).astype(np.int8), voxel_size)
        item = {"image": f"subtomograms/{file}", "label": f"masks/{file}", "class": classes[c]}
        if c < train_classes:
            training.append({**item, "fold": k % folds})
        else:
            test.append(item)
    return write_datalist(
        listed,
        training,
        test,
        name="cryoet_one_shot (COS-Net release)",
        description=f"converted from {source.name}/data.npy, data_seg.npy and cnt.npy; axes kept as stored",
        labels={"0": "background", "1": "complex"},
        classes={"training": classes[:train_classes], "test": classes[train_classes:]},
    )


def _open(source: Path) -> _Release:
    """Map the arrays and check that they fit each other."""
    arrays = {}
    for name in ("data.npy", "data_seg.npy", "cnt.npy"):
        path = source / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; the release has data.npy, data_seg.npy and cnt.npy")
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is no readable NumPy array, or is cut off: {error}") from error
        if arrays[name].dtype.kind not in "biuf":
            raise ValueError(f"{path} holds {arrays[name].dtype}, not real numbers")
    data, masks, counts = arrays.values()
    if data.ndim != 5 or len(set(data.shape[2:])) != 1 or 0 in data.shape:
        raise ValueError(
            f"{source / 'data.npy'} has the shape {data.shape}; expected (classes, slots, n, n, n), in the release "
            "(22, 1000, 32, 32, 32)"
        )
    if masks.shape != data.shape:
        raise ValueError(
            f"{source / 'data_seg.npy'} has the shape {masks.shape}, data.npy {data.shape}; they must agree"
        )
    return _Release(data, masks, _counts(counts, data.shape, source / "cnt.npy"), source)


def _counts(counts: npt.NDArray[Any], shape: tuple[int, ...], path: Path) -> list[int]:
    classes, slots = shape[:2]
    if counts.shape not in ((classes, 1), (classes,)):
        raise ValueError(f"{path} has the shape {counts.shape}; expected ({classes}, 1), one count for each class")
    values = np.asarray(counts, np.float64).ravel()
    for c, value in enumerate(values):
        if not np.isfinite(value) or value != int(value) or not 0 <= value <= slots:
            raise ValueError(f"{path}: class {c} counts {value:g} of {slots} slots; a whole number from 0 is needed")
        if value == 0:
            raise ValueError(f"{path}: class {c} is missing (count 0); every class needs a volume")
    return [int(value) for value in values]


def _check_slot(release: _Release, c: int, k: int) -> None:
    """Refuse a volume or mask that cannot be trained on."""
    where = f"class {c}, slot {k}"
    volume, mask = release.data[c, k], release.masks[c, k]
    for name, array in (("data.npy", volume), ("data_seg.npy", mask)):
        if not np.isfinite(array).all():
            raise ValueError(f"{release.source / name}, {where} holds NaN or infinite values")
    if volume.min() == volume.max():
        raise ValueError(
            f"{release.source / 'data.npy'}, {where} is constant ({volume.flat[0]:g}): an empty slot? "
            f"cnt.npy says that class {c} has {release.counts[c]} filled ones"
        )
    stray = stray_values(mask)
    if stray:
        raise ValueError(
            f"{release.source / 'data_seg.npy'}, {where} is not binary (values {stray}); expected 0 and one other value"
        )


def _class_names(names: str, count: int) -> list[str]:
    if not names:
        return [f"class_{c:02d}" for c in range(count)]
    given = [name.strip() for name in names.split(",")]
    if len(given) != count or len(set(given)) != count or not all(given):
        raise ValueError(f"names gives {len(set(given) - {''})} different names; the release has {count} classes")
    if any(set(name) & set('/\\:*?"<>|') for name in given):
        raise ValueError(f"names become file names; leave out slashes and the like: {names}")
    return given
