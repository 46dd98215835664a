"""MRC volumes for MONAI's ``LoadImaged`` and ``SaveImaged``; see :mod:`medseg.io.mrc`, which needs no MONAI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader, ImageWriter
from monai.utils import MetaKeys, SpaceKeys, convert_data_type, ensure_tuple

from medseg.io.mrc import SUFFIXES, Spacing, Volume, read_mrc, write_mrc

__all__ = ["MRCReader", "MRCWriter"]


class MRCReader(ImageReader):
    """Reads MRC volumes for ``LoadImaged``: arrays (D, H, W) in z, y, x order, without a channel.

    The affine maps these indices to x, y, z in Angstrom, so that geometry survives in other formats.

    Args:
        size: side that every volume must have; ``None`` for any.
    """

    def __init__(self, size: int | None = None, **_: Any) -> None:
        super().__init__()
        self.size = size

    def verify_suffix(self, filename: str | Path | Sequence[str | Path]) -> bool:
        """Whether all file names end as MRC files do."""
        return all(str(name).lower().endswith(SUFFIXES) for name in ensure_tuple(filename))

    def read(self, data: str | Path | Sequence[str | Path], **_: Any) -> tuple[str | Path, ...]:
        """The files to read. ``LoadImage`` drops an error of this step and tries other readers."""
        paths: tuple[str | Path, ...] = ensure_tuple(data)
        return paths

    def get_data(self, img: Sequence[str | Path]) -> tuple[Volume, dict[str, Any]]:
        """The array, several files stacked in front, and its metadata; see :func:`read_mrc` for the errors."""
        volumes = [read_mrc(path, self.size) for path in img]
        volume, spacing = volumes[0]
        affine = np.zeros((4, 4))
        affine[[2, 1, 0, 3], [0, 1, 2, 3]] = [*spacing, 1.0]
        meta = {
            MetaKeys.AFFINE: affine,
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(volume.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: "no_channel" if len(img) == 1 else 0,
            MetaKeys.SPACE: SpaceKeys.RAS,
        }
        return (volume if len(img) == 1 else np.stack([v for v, _ in volumes])), meta


class MRCWriter(ImageWriter):
    """Writes masks and volumes for ``SaveImaged`` with the voxel size that they were read with."""

    def __init__(self, output_dtype: Any = np.float32, **kwargs: Any) -> None:
        super().__init__(output_dtype=output_dtype, **kwargs)
        self.spacing: Spacing = (1.0, 1.0, 1.0)

    def set_data_array(self, data_array: Any, channel_dim: int | None = 0, **_: Any) -> None:
        """Take an array (1, D, H, W), or (D, H, W) if ``channel_dim`` is ``None``."""
        array = convert_data_type(data_array, np.ndarray)[0]
        self.data_obj = array if channel_dim is None else np.squeeze(array, axis=channel_dim)

    def set_metadata(self, meta_dict: Mapping[str, Any] | None, **_: Any) -> None:
        """Take the voxel size from the affine."""
        affine = np.asarray((meta_dict or {}).get(MetaKeys.AFFINE, np.eye(4)), dtype=float).reshape(-1, 4, 4)[0]
        z, y, x = np.linalg.norm(affine[:3, :3], axis=0)
        self.spacing = (float(z), float(y), float(x))

    def write(self, filename: str | Path, verbose: bool = False, **_: Any) -> None:
        """Write the file whole or not at all."""
        super().write(filename, verbose=verbose)
        write_mrc(filename, np.asarray(self.data_obj, dtype=self.output_dtype), self.spacing)
