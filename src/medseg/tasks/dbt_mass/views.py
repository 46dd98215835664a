"""Tomosynthesis views for the network: loaded on its grid, the breast found, the chest wall on the left."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, RandomizableTransform

from medseg.io.datalist import Item
from medseg.io.resampling import resampling_matrix
from medseg.io.tomosynthesis import View, laterality_contradiction, read_header, read_view
from medseg.tasks.dbt_mass.breast import breast_region, chest_wall_at_low_columns, normalise

Grid = npt.NDArray[np.float64]

__all__ = ["CheckView", "LoadViewd", "RandMassPatchd", "boxes_of", "boxes_to_grid", "masks_of", "numbers_of"]


class LoadViewd(MapTransform):
    """Loads a view and its masks on a grid of the given spacing: ``image`` (1, D, H, W), ``label`` of the same shape.

    The image is 0 outside of the breast (see :func:`medseg.tasks.dbt_mass.breast.normalise`), and turned so that the
    chest wall is at low columns, whichever breast it is. The label keeps the numbers that the masses have in the file.
    The affine of the image maps its indices (d, h, w) to RAS mm, so that every result finds its way back.

    Args:
        keys: ``image``, or ``image`` and ``label``.
        spacing: (d, h, w) in mm of the grid.
        file_spacing: (d, h, w) in mm for files that lack it; it never overrides what a file says.
        skin: see :func:`medseg.tasks.dbt_mass.breast.breast_region`.
        check_laterality: refuse an image whose chest wall is on the other breast's side.
        keep_errors: instead of raising leave the message under ``problem`` and an empty image, so that the other views
            of a folder are still processed.
    """

    def __init__(
        self,
        keys: Sequence[str],
        spacing: Sequence[float],
        file_spacing: Sequence[float] | None = None,
        skin: float = 3.0,
        check_laterality: bool = True,
        keep_errors: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.spacing = _three(spacing, "spacing")
        self.file_spacing = None if file_spacing is None else _three(file_spacing, "file_spacing")
        self.skin, self.check_laterality, self.keep_errors = skin, check_laterality, keep_errors

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Load one item."""
        item = dict(data)
        try:
            item["image"], flipped, view = self._image(item["image"])
            if "label" in self.keys and "label" in item:
                item["label"] = self._label(item["label"], item["image"], flipped, view)
        except (OSError, ValueError) as error:
            if not self.keep_errors:
                raise
            name = _name(data["image"])
            item["image"] = MetaTensor(torch.zeros(1, 1, 1, 1), meta={"filename_or_obj": name})
            item["problem"] = str(error)
        else:
            if self.keep_errors:
                item["problem"] = ""
        return item

    def _image(self, source: Any) -> tuple[MetaTensor, bool, View]:
        view = source if isinstance(source, View) else read_header(source, self.file_spacing)
        volume, affine = read_view(view, self.spacing)
        contradiction = laterality_contradiction(view, volume) if self.check_laterality else None
        if contradiction:
            raise ValueError(contradiction)
        region = breast_region(volume, self.spacing, self.skin)
        flipped = bool(region.any()) and not chest_wall_at_low_columns(region)
        if flipped:
            volume, region = volume[:, :, ::-1], region[:, ::-1]
            affine = affine @ flip_columns(volume.shape[2])
        try:
            volume = normalise(np.ascontiguousarray(volume), np.ascontiguousarray(region))
        except ValueError as error:
            raise ValueError(f"{view.name}: {error}") from error
        meta = {
            "filename_or_obj": view.name,
            "native_affine": view.affine.copy(),
            "native_shape": np.asarray(view.shape),
            "spatial_shape": np.asarray(volume.shape),
        }
        image = MetaTensor(torch.from_numpy(volume)[None], affine=torch.from_numpy(affine), meta=meta)
        return image, flipped, view

    def _label(self, path: str, image: MetaTensor, flipped: bool, view: View) -> torch.Tensor:
        header = read_header(path, self.file_spacing)
        problem = _other_grid(path, header, view.name, view, self.file_spacing is None)
        if problem:
            raise ValueError(problem)
        native, _ = read_view(header)
        label = np.zeros(image.shape[1:], np.uint8)
        for number in np.unique(native[native > 0]).astype(int).tolist():
            share = resampled(native == number, view.spacing, self.spacing)
            label[(share >= 0.5) | ((share > 0) & (share == share.max()))] = number  # a tiny mass keeps a voxel
        return torch.from_numpy(np.ascontiguousarray(label[:, :, ::-1]) if flipped else label)[None]


class RandMassPatchd(RandomizableTransform, MapTransform):
    """Cuts a patch out of an image and its label, at a mass in a given share of the draws.

    A mass of which less than a quarter is inside the patch is taken out of the label. Volumes smaller than the patch
    are padded with 0.

    Args:
        size: (d, h, w) of the patch.
        positive: share of the patches that are drawn around a mass, where there is one.
    """

    def __init__(self, size: Sequence[int], positive: float = 0.6) -> None:
        MapTransform.__init__(self, ["image", "label"])
        RandomizableTransform.__init__(self, 1.0)
        self.size, self.positive = tuple(int(s) for s in size), positive

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Cut one patch."""
        item = dict(data)
        image, label = item["image"], item["label"]
        corner = self._corner(label)
        where = (slice(None), *(slice(c, c + n) for c, n in zip(corner, self.size, strict=True)))
        cut, masks = image[where], label[where].clone()
        for value in numbers_of(masks):
            if int((masks == value).sum()) < 0.25 * int((label == value).sum()):
                masks[masks == value] = 0
        pad = [n for size, had in zip(self.size[::-1], cut.shape[:0:-1], strict=True) for n in (0, size - had)]
        item["image"] = torch.nn.functional.pad(cut, pad)
        item["label"] = torch.nn.functional.pad(masks, pad)
        return item

    def _corner(self, label: torch.Tensor) -> list[int]:
        shape = label.shape[1:]
        highest = [max(0, n - s) for n, s in zip(shape, self.size, strict=True)]
        boxes = boxes_of(label)
        draw = self.R.random_sample
        if not len(boxes) or draw() >= self.positive:
            return [int(draw() * (top + 1)) for top in highest]
        box = boxes[int(draw() * len(boxes))].tolist()
        corner = []
        for axis, size in enumerate(self.size):
            # the mass stays inside where it fits: jitter by up to half the patch minus half the mass
            room = max(0.0, size - (box[axis + 3] - box[axis])) / 2
            centre = (box[axis] + box[axis + 3]) / 2 + (2 * draw() - 1) * room
            corner.append(int(np.clip(round(centre - size / 2), 0, highest[axis])))
        return corner


class CheckView:
    """Checks an item of a data list from its headers: view, mask and what subgroups need.

    Args:
        file_spacing: as of :class:`LoadViewd`.
    """

    def __init__(self, file_spacing: Sequence[float] | None = None) -> None:
        self.file_spacing = None if file_spacing is None else _three(file_spacing, "file_spacing")

    def __call__(self, item: Item) -> str | None:
        """Say what is wrong with an item, with the file and the fix, or ``None``."""
        if not item.get("breast"):
            return f'{item["image"]} has no "breast"; give one name to all views of a breast, e.g. "P001-L"'
        if not item.get("patient"):
            return f'{item["image"]} has no "patient"; views of a patient must stay on one side of a split'
        try:
            image, mask = (read_header(item[key], self.file_spacing) for key in ("image", "label"))
        except (OSError, ValueError) as error:
            return str(error)
        return _other_grid(item["label"], mask, item["image"], image, self.file_spacing is None)


def resampled(
    mask: npt.NDArray[np.bool_], old: tuple[float, float, float], new: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """Share of each voxel of a grid of another spacing that a mask (D, H, W) covers."""
    share: npt.NDArray[Any] = mask.astype(np.float32)
    for axis in range(3):
        matrix, _ = resampling_matrix(mask.shape[axis], old[axis], new[axis])
        moved = np.moveaxis(share, axis, 0)
        flat = matrix @ moved.reshape(moved.shape[0], -1)
        share = np.moveaxis(np.asarray(flat).reshape(-1, *moved.shape[1:]), 0, axis)
    return share.astype(np.float32)


def boxes_of(label: torch.Tensor) -> torch.Tensor:
    """Boxes (n, 6) of the numbered masses of a label (1, D, H, W), in the order of their numbers."""
    found = []
    for value in numbers_of(label):
        places = torch.nonzero(label[0] == value)
        found.append(torch.cat([places.amin(dim=0), places.amax(dim=0) + 1]))
    empty = torch.zeros((0, 6), device=label.device)
    return torch.stack(found).float() if found else empty


def masks_of(label: torch.Tensor) -> torch.Tensor:
    """Masks (n, D, H, W) of the numbered masses of a label (1, D, H, W), in the order of their numbers."""
    values = numbers_of(label)
    return torch.stack([label[0] == v for v in values]) if values else label[:0].bool()


def boxes_to_grid(boxes: Grid, affine: Grid, other: Grid) -> Grid:
    """Boxes (n, 6) of one grid in the voxels of another one whose axes are parallel.

    Args:
        boxes: half-open edges in voxels of the first grid.
        affine: 4 x 4 of the first grid, from indices of voxel centres to mm.
        other: 4 x 4 of the second grid.
    """
    change = np.linalg.inv(np.asarray(other, float)) @ np.asarray(affine, float)
    corners = np.asarray(boxes, float).reshape(-1, 2, 3) - 0.5  # edges as indices: voxel 0 begins at -0.5
    moved = corners @ change[:3, :3].T + change[:3, 3] + 0.5
    return np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)


def flip_columns(width: int) -> Grid:
    """4 x 4 from the indices of a grid with its columns reversed to those before."""
    flip = np.eye(4)
    flip[2, 2], flip[2, 3] = -1, width - 1
    return flip


def numbers_of(label: torch.Tensor) -> list[int]:
    """Numbers of the masses of a label, rising."""
    highest = int(label.max()) if label.numel() else 0  # sorting all voxels for their few values takes 30 times as long
    return [value for value in range(1, highest + 1) if bool((label == value).any())]


def _three(values: Sequence[float], name: str) -> tuple[float, float, float]:
    found = [float(v) for v in values]
    if len(found) != 3 or min(found) <= 0:
        raise ValueError(f"{name} is {list(values)}; give three positive numbers in mm: slice, row, column distance")
    return found[0], found[1], found[2]


def _other_grid(mask: str, of_mask: View, view: str, of_view: View, known: bool) -> str | None:
    """What is wrong if a mask does not lie on its view's grid: another shape or, where it is known, another affine."""
    fix = "save it on the view's grid (`medseg.io.tomosynthesis.write_nifti` with the view's affine)"
    if of_mask.shape != of_view.shape:
        return f"mask {mask} is {of_mask.shape} and its view {view} {of_view.shape}; {fix}"
    if known and not np.allclose(of_mask.affine, of_view.affine, rtol=1e-3, atol=0.05):
        return f"mask {mask} lies elsewhere than its view {view} (their affines differ); {fix}"
    return None


def _name(source: Any) -> str:
    if isinstance(source, View):
        return source.name
    return str(source[0] if isinstance(source, (list, tuple)) else source)
