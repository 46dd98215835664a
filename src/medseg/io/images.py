"""Reading and writing single 2D images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medseg.io.files import write_atomically

__all__ = ["read_grey", "write_png"]


def read_grey(path: str | Path) -> npt.NDArray[np.float32]:
    """Read a 2D image as grey values, by the same rule as ``transforms/fluorescence.yaml::load``.

    PNG, TIFF, JPEG and DICOM through ITK, 8 or 16 bit. Colour is averaged over its channels, alpha is dropped, and a
    DICOM's rescale slope and intercept are applied (ITK also turns MONOCHROME1 into MONOCHROME2).

    Args:
        path: file to read.

    Returns:
        Grey values (H, W) in the file's own scale.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read or is not one 2D image; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            _refuse_truncated(path)
        image = _reader()(str(path))  # (W, H) or (W, H, C); ITK gives a DICOM's frames one more axis after H
    except Exception as error:  # the readers raise whatever their libraries raise
        raise ValueError(f"{path} cannot be read as an image: {_first_line(error)}") from error
    array = np.asarray(image)
    if len(image.meta["spatial_shape"]) == 3:
        if array.shape[2] != 1:
            raise ValueError(f"{path} holds {array.shape[2]} frames; split it into one 2D image per file")
        array = array[:, :, 0]
    if array.ndim == 2:
        array = array[..., None]
    channels = array.shape[-1]
    return np.asarray(array[..., : channels - (channels - 1) % 2].mean(axis=-1).T, dtype=np.float32)


def _refuse_truncated(path: Path) -> None:
    """ITK fills what is missing of a JPEG or PNG with grey; Pillow raises."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()


@functools.lru_cache(maxsize=1)
def _reader() -> Any:
    """The reader that the bundles' transforms use."""
    from monai.transforms import LoadImage

    return LoadImage(reader="ITKReader", image_only=True)


def write_png(path: Path, image: npt.NDArray[Any]) -> None:
    """Write an image (H, W) or (H, W, 3) as PNG; a crash or a full disk leaves no half-written file.

    Args:
        path: file to write.
        image: uint8 or uint16 grey values, or uint8 RGB.
    """
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # ITK puts its reason on one line among many, and lists every pixel type it knows below.
    return next((line for line in lines if "rror" in line), lines[0] if lines else type(error).__name__)[:300]
