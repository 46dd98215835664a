"""MRC volumes of electron microscopy as arrays.

Arrays are (D, H, W): z, y, x, as in `mrcfile` and in the papers; voxel sizes are in Angstrom in the same order.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import numpy.typing as npt
from mrcfile.mrcinterpreter import MrcInterpreter

from medseg.io.files import write_atomically

Volume = npt.NDArray[np.float32]
Spacing = tuple[float, float, float]

SUFFIXES = (".mrc", ".rec", ".map", ".ccp4", ".mrc.gz", ".map.gz", ".ccp4.gz")

__all__ = ["SUFFIXES", "Spacing", "Volume", "read_mrc", "write_mrc"]


def read_mrc(path: str | Path, size: int | None = None) -> tuple[Volume, Spacing]:
    """Read one volume, whatever order its header stores the axes in.

    Args:
        path: an MRC2014 or CCP4 file, plain or compressed with gzip or bzip2.
        size: side that the volume must have, e.g. 32.

    Returns:
        The volume (D, H, W), and its voxel size (z, y, x) in Angstrom; 1 where the header says nothing (0).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no MRC file, is cut off, holds no single 3D volume, has impossible axes in its header, NaN
            or infinite values, or another size than ``size``.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with mrcfile.open(path, permissive=False) as file:
            data, axes = np.asarray(file.data), tuple(int(file.header[k]) for k in ("maps", "mapr", "mapc"))
            cell, steps = file.header.cella, [int(file.header[k]) for k in ("mz", "my", "mx")]
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no readable MRC file, or is cut off: {error}") from error
    if data.ndim != 3 or np.iscomplexobj(data):
        raise ValueError(
            f"{path} holds {data.ndim}D {data.dtype} data; one real 3D volume is needed (one subtomogram a file)"
        )
    if sorted(axes) != [1, 2, 3]:
        raise ValueError(
            f"{path}: the header's axis order MAPC, MAPR, MAPS is {axes[2]}, {axes[1]}, {axes[0]}, which is no order "
            "of x, y, z; write the file anew with MAPC, MAPR, MAPS = 1, 2, 3"
        )
    # section, row, column hold the axes `axes` (3 is z): put them in the order z, y, x
    volume = np.array(np.transpose(data, [axes.index(a) for a in (3, 2, 1)]), dtype=np.float32, order="C")
    if size is not None and volume.shape != (size,) * 3:
        raise ValueError(
            f"{path} is {' x '.join(map(str, volume.shape))}; the network takes {size} x {size} x {size} voxels: crop "
            "or bin it to that"
        )
    if not np.isfinite(volume).all():
        raise ValueError(f"{path} holds NaN or infinite values")
    lengths = [float(cell[k]) / max(m, 1) for k, m in zip("zyx", steps, strict=True)]
    return volume, (lengths[0] or 1.0, lengths[1] or 1.0, lengths[2] or 1.0)


def write_mrc(path: str | Path, volume: npt.NDArray[Any], voxel_size: float | Sequence[float]) -> None:
    """Write one volume whole or not at all; equal volumes give equal bytes.

    Args:
        path: file to write.
        volume: (D, H, W); boolean and 8-bit volumes up to 127 are written as int8 (mode 0), all others as float32
            (mode 2).
        voxel_size: in Angstrom, one number or (z, y, x).

    Raises:
        ValueError: if it is no 3D volume.
        OSError: if the file cannot be written.
    """
    if volume.ndim != 3:
        raise ValueError(f"{path}: an MRC volume has 3 axes, this array has the shape {volume.shape}")
    small = volume.dtype.itemsize == 1 and bool((volume <= 127).all())  # int8 would turn 255 into -1
    z, y, x = np.broadcast_to(np.asarray(voxel_size, dtype=float), 3).tolist()
    buffer = io.BytesIO()
    file = MrcInterpreter()  # on a stream, as its documentation says: the file itself is written in one go below
    file._create_default_attributes()
    file._iostream = buffer
    file.set_data(np.ascontiguousarray(volume, dtype=np.int8 if small else np.float32))
    file.set_volume()
    file.voxel_size = (x, y, z)
    file.header.label[0] = b"written by medseg"  # in place of the time of day
    file.flush()
    content = buffer.getvalue()
    write_atomically(Path(path), content)
