"""The self-test of a packed bundle: it segments a tiny case of its own and must give the masks that came with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from medseg.bundles.archive import RefusedError, extract, open_bundle

SELF_TEST = "self_test"

#: Overlap (Dice) that every label of every mask must reach. Other processors and versions round differently, which
#: moves single voxels at an outline; a GPU in bfloat16 moves a few more.
MIN_DICE = 0.98

#: Endings of masks.
MASKS = (".nii", ".nii.gz", ".png", ".tif", ".tiff", ".mrc")

__all__ = ["MIN_DICE", "SELF_TEST", "check_self_test", "is_empty", "run_inference"]


def check_self_test(path: Path) -> list[str]:
    """Run a bundle's self-test. Its configs are run: only for one that is trusted.

    Args:
        path: zip or folder. It is copied to a temporary folder and left as it is.

    Returns:
        A line for each mask that was compared.

    Raises:
        ValueError: if there is no self-test, it does not run, or a mask differs; the message says how much.
    """
    with tempfile.TemporaryDirectory(prefix="medseg-self-test-") as temporary:
        with open_bundle(path) as bundle:
            folder = Path(temporary, bundle.name)
            extract(bundle, folder)
        case, expected = folder / SELF_TEST / "input", folder / SELF_TEST / "expected"
        if not case.is_dir() or not expected.is_dir():
            raise ValueError(f"{path} has no self-test: {SELF_TEST}/input and {SELF_TEST}/expected are missing")
        run_inference(folder, case, Path(temporary, "masks"))
        return _compare(expected, Path(temporary, "masks"))


def run_inference(folder: Path, images: Path, masks: Path) -> None:
    """Run a bundle's own inference on the CPU and keep the masks.

    Args:
        folder: an unpacked bundle. Its config is run.
        images: folder to segment.
        masks: folder to write to; holds nothing but the masks in the end.

    Raises:
        ValueError: if it fails; the message has the last lines of its output.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "out")
        line = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
        line += ["--dataset_dir", str(images.resolve()), "--output_dir", str(out), "--device", "cpu"]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise ValueError(f"the bundle does not run:\n{tail}")
        # with medseg installed there are overlays/, tables and other forms of the masks as well
        for file in sorted(f for f in out.rglob("*") if f.is_file() and f.name.lower().endswith(MASKS)):
            if "overlays" not in file.relative_to(out).parts:
                target = masks / file.relative_to(out)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    if not masks.is_dir():
        raise ValueError("the bundle ran and wrote no mask")


def is_empty(mask: Path) -> bool:
    """Whether a mask has no label but the background."""
    return not _read(mask).any()


def _compare(expected: Path, masks: Path) -> list[str]:
    names = [sorted(f.relative_to(d).as_posix() for f in d.rglob("*") if f.is_file()) for d in (expected, masks)]
    if names[0] != names[1]:
        raise ValueError(f"the self-test wrote {', '.join(names[1]) or 'nothing'}, not {', '.join(names[0])}")
    lines = []
    for name in names[0]:
        dice = _worst_dice(_read(expected / name), _read(masks / name))
        if dice < MIN_DICE:
            raise ValueError(f"{name}: Dice {dice:.4f} with the expected mask; at least {MIN_DICE} is asked for")
        lines.append(f"{name}: Dice {dice:.4f}")
    return lines


def _read(path: Path) -> Any:
    import numpy as np

    if path.name.endswith((".nii", ".nii.gz")):
        import nibabel

        return np.asarray(nibabel.load(path).dataobj)
    if path.suffix.lower() in (".png", ".tif", ".tiff"):
        from PIL import Image

        with Image.open(path) as image:
            return np.asarray(image)
    if path.suffix.lower() == ".mrc":
        from medseg.io.mrc import read_mrc

        return read_mrc(path)[0]
    raise RefusedError(f"{path.name}: a self-test's masks are PNG, TIFF, NIfTI or MRC")


def _worst_dice(expected: Any, found: Any) -> float:
    """The smallest Dice over the labels that either mask has; 1 where both have none."""
    import numpy as np

    if expected.shape != found.shape:
        return 0.0
    labels = (set(np.unique(expected)) | set(np.unique(found))) - {0}
    scores = [
        2.0 * np.sum((expected == label) & (found == label)) / (np.sum(expected == label) + np.sum(found == label))
        for label in labels
    ]
    return float(min(scores, default=1.0))
