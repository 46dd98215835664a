"""Make masks and a data list from the tables of the public BCS-DBT data (Buda et al. 2021).

The release has DICOM views and CSV tables keyed by PatientID, StudyUID and View: file paths, labels (Normal,
Actionable, Benign, Cancer) and boxes, which are drawn on one slice (counted from 0) and say nothing about depth.

A box holds for the image in standard display. Where the image's chest wall is on the other side than the view's name
says, the owners' reader turns the image by 180 degrees before it draws; here the box is turned back instead, so that
the mask fits the file as it is stored.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.datalist import write_datalist
from medseg.io.files import read_csv
from medseg.io.tomosynthesis import View, read_header, write_nifti
from medseg.io.tomosynthesis_header import read_frames
from medseg.progress import track

Key = tuple[str, str, str]
Row = dict[str, str]
Spacing = tuple[float, float, float]

KEYS = ("PatientID", "StudyUID", "View")
TABLES = {
    "paths": (*KEYS,),
    "boxes": (*KEYS, "Slice", "X", "Y", "Width", "Height"),
    "labels": (*KEYS, "Normal"),
}
MARK = "dbt_mass (BCS-DBT)"

__all__ = ["box_mask", "import_bcs_dbt"]


@dataclass
class _Listed:
    """One view of the tables."""

    key: Key
    file: Path
    boxes: list[Row] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # of each box: table and line, for messages

    @property
    def laterality(self) -> str:
        return self.key[2][:1].upper()

    @property
    def name(self) -> str:
        return "_".join((self.key[0], self.key[1][-12:], self.key[2]))


def import_bcs_dbt(
    source: Path,
    out: Path,
    *,
    spacing: Spacing | None = None,
    depth_mm: float | None = None,
    normal_views: bool = True,
    folds: int = 5,
    test_share: float = 0.0,
    seed: int = 0,
) -> Path:
    """Write a mask for every usable view and ``datalist.json``; images stay where they are.

    A view with boxes gets one filled box per mass, numbered from 1 in the order of the table (a later one lies over an
    earlier). The release does not say which boxes of two views show one mass: those of one number are taken for one. A
    view without a box gets an empty mask if the label table calls it normal, or if there is no label table; others
    (actionable, or a biopsy seen in another view only) are left out: nobody says whether they show a mass.

    Items carry ``patient``, ``breast`` (``P-L``), ``laterality``, ``view``, ``study``, ``mass`` (the mask's values with
    commas), ``mass_type`` (``mass`` or ``distortion``), ``histology``, ``truth`` (``box``); ``none`` where no mass is.

    Args:
        source: folder with ``*paths*.csv``, ``*boxes*.csv``, perhaps ``*labels*.csv`` (several of each are joined) and
            the DICOM files at the paths that the first one gives.
        out: folder to write ``masks/`` and ``datalist.json`` to.
        spacing: (d, h, w) in mm, for files whose header has none.
        depth_mm: depth of every mass in mm, centred on its slice; by default the mean of its width and height.
        normal_views: also write the normal views.
        folds: patients are dealt to so many folds, those with masses and those without each in turn.
        test_share: share of the patients, dealt likewise, that make the test part.
        seed: of the dealing.

    Returns:
        Path of the data list.

    Raises:
        FileNotFoundError: if a table or DICOM files are missing; all missing files are named.
        ValueError: if a table lacks columns, a row makes no sense or a file cannot be used; the message names table
            and line, or the file.
    """
    if folds < 1 or not 0 <= test_share < 1 or (depth_mm is not None and not 0 < depth_mm < np.inf):
        raise ValueError(f"folds {folds}, test_share {test_share}, depth_mm {depth_mm}: one of them is impossible")
    listed = out / "datalist.json"
    if listed.exists() and MARK not in listed.read_text(encoding="utf-8"):
        raise ValueError(f"{listed} was not written by this converter; choose another folder")
    views, left_out = _listed(source, normal_views)
    parts = _deal(views, folds, test_share, seed)
    items: list[dict[str, Any]] = []
    for one in track(views, "convert"):
        items.append(_convert(one, out, spacing, depth_mm))
    training = [{**item, "fold": parts[item["patient"]]} for item in items if parts[item["patient"]] >= 0]
    return write_datalist(
        listed,
        training,
        [item for item in items if parts[item["patient"]] < 0],
        name=MARK,
        description=f"boxes of {source.name} as masks; depth is a guess; {left_out} views without a box left out",
        labels={"0": "background", "1": "mass"},
    )


def _listed(source: Path, normal_views: bool) -> tuple[list[_Listed], int]:
    """The views to convert, all of whose files exist, and how many are left out."""
    paths, boxes, labels = (_table(source, kind) for kind in TABLES)
    normal = {_key(row) for row, _ in labels if row["Normal"].strip() in ("1", "1.0")}
    views: dict[Key, _Listed] = {}
    for row, where in paths:
        key = _key(row)
        if key[2][:1] not in ("l", "r") or key in views:
            raise ValueError(
                f"{where}: view {row['View']!r} of {key[0]} is listed twice, or begins with neither l nor r"
            )
        views[key] = _Listed(key, _file(source, row))
    for row, where in boxes:
        if _key(row) not in views:
            raise ValueError(f"{where}: no file path for {', '.join(_key(row))}; add its row to the table of paths")
        views[_key(row)].boxes.append(row)
        views[_key(row)].where.append(where)
    chosen = [one for one in views.values() if one.boxes or (normal_views and (one.key in normal or not labels))]
    missing = [str(one.file) for one in chosen if not one.file.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} files of {source} are missing:\n" + "\n".join(missing))
    if not chosen:
        raise ValueError(f"{source}: the tables list no view with a box, and no normal one")
    return chosen, sum(not one.boxes and one.key not in normal for one in views.values()) if labels else 0


def _table(source: Path, kind: str) -> list[tuple[Row, str]]:
    """All rows of one kind of table, each with table and line."""
    files = sorted(source.glob(f"*{kind}*.csv"))
    if not files and kind != "labels":
        raise FileNotFoundError(f"{source} has no *{kind}*.csv; put the tables of BCS-DBT beside its folders")
    rows = []
    for file in files:
        try:
            content = read_csv(file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no CSV table in UTF-8: {error}") from error
        lacking = [column for column in TABLES[kind] if content and content[0].get(column) is None]
        if lacking:
            raise ValueError(f"{file} has no column {', '.join(lacking)}; expected those of BCS-DBT")
        rows += [(row, f"{file}, line {number}") for number, row in enumerate(content, start=2)]
    return rows


def _key(row: Row) -> Key:
    return row["PatientID"].strip(), row["StudyUID"].strip(), row["View"].strip().lower()


def _file(source: Path, row: Row) -> Path:
    """Where a view's file is: the first of the listed paths that exists, with or without its first folder."""
    listed = [row[column].strip() for column in ("descriptive_path", "classic_path") if row.get(column)]
    tries = [source / path for path in listed] + [source.joinpath(*Path(path).parts[1:]) for path in listed]
    return next((path for path in tries if path.is_file()), tries[0] if tries else source / "(no path)")


def _deal(views: list[_Listed], folds: int, test_share: float, seed: int) -> dict[str, int]:
    """Fold of each patient; -1 is the test part."""
    with_mass: dict[str, bool] = defaultdict(bool)
    for one in views:
        with_mass[one.key[0]] |= bool(one.boxes)
    rng, parts = np.random.default_rng(seed), {}
    for kind in (True, False):
        patients = rng.permutation(sorted(p for p, mass in with_mass.items() if mass == kind)).tolist()
        tested = round(test_share * len(patients))
        parts.update({p: -1 if k < tested else (k - tested) % folds for k, p in enumerate(patients)})
    return parts


def _convert(one: _Listed, out: Path, spacing: Spacing | None, depth_mm: float | None) -> dict[str, Any]:
    """Write one view's mask; its item."""
    view = read_header(one.file, spacing)
    mask = np.zeros(view.shape, np.uint8)
    for number, (row, where) in enumerate(zip(one.boxes, one.where, strict=True), start=1):
        region = box_mask(row, view, one.laterality, where, depth_mm)
        mask[region] = number
    label = f"masks/{one.name}.nii.gz"
    write_nifti(out / label, mask, view.affine)
    classes = [row.get("Class", "").strip().lower() for row in one.boxes]
    distortions = [row.get("AD", "").strip() in ("1", "1.0", "True") for row in one.boxes]
    return {
        "image": os.path.relpath(one.file.resolve(), out.resolve()),
        "label": label,
        "patient": one.key[0],
        "breast": f"{one.key[0]}-{one.laterality}",
        "laterality": one.laterality,
        "view": one.key[2][1:].upper(),
        "study": one.key[1],
        "mass": ",".join(map(str, range(1, len(classes) + 1))) or "none",
        "histology": ("malignant" if "cancer" in classes else "benign") if classes else "none",
        "mass_type": ("distortion" if all(distortions) else "mass") if classes else "none",
        "truth": "box" if classes else "none",
    }


def box_mask(
    row: Row, view: View, laterality: str, where: str, depth_mm: float | None = None
) -> tuple[slice, slice, slice]:
    """The voxels (d, h, w) of one row of the box table, in the view as it is stored.

    Args:
        row: Slice (from 0), X, Y, Width, Height in pixels; VolumeSlices is checked if it is there.
        view: header of the view.
        laterality: ``L`` or ``R``, from the name of the view.
        where: table and line, for messages.
        depth_mm: as in :func:`import_bcs_dbt`.

    Raises:
        ValueError: if a number is missing, or the box lies outside the volume.
    """
    try:
        frame, x, y, width, height = (round(float(row[k])) for k in ("Slice", "X", "Y", "Width", "Height"))
        slices = round(float(row.get("VolumeSlices") or view.shape[0]))
    except ValueError as error:
        raise ValueError(f"{where}: Slice, X, Y, Width and Height must be numbers: {error}") from error
    depth, rows, columns = view.shape
    if slices != depth:
        raise ValueError(f"{where}: VolumeSlices is {slices}, {view.name} has {depth}; is it the right file?")
    if not 0 <= frame < depth or width < 1 or height < 1 or x < 0 or y < 0 or x >= columns or y >= rows:
        raise ValueError(
            f"{where}: box of {width} x {height} at x {x}, y {y}, slice {frame} is not inside {view.name} with "
            f"{columns} x {rows} pixels and {depth} slices"
        )
    width, height = min(width, columns - x), min(height, rows - y)
    place = [k for _, k in view.frames].index(frame) if view.frames and len(view.files) == 1 else frame
    if _turned(view, place, laterality):
        x, y = columns - x - width, rows - y - height
    step, down, across = view.spacing
    thick = max(1, round((depth_mm or (height * down + width * across) / 2) / step))
    first = place - (thick - 1) // 2
    return slice(max(first, 0), min(first + thick, depth)), slice(y, y + height), slice(x, x + width)


def _turned(view: View, place: int, laterality: str) -> bool:
    """Whether the owners' reader would turn this image: they compare the sums of its first and last column."""
    image: npt.NDArray[Any]
    if view.frames:
        file, frame = view.frames[place]
        image = next(read_frames(dataclasses.replace(view, files=(view.files[file],), frames=((0, frame),))))
    else:
        from medseg.io.tomosynthesis import read_view

        image = read_view(view)[0][place]
    right = float(image[:, 0].sum()) < float(image[:, -1].sum())
    return ("R" if right else "L") != laterality
