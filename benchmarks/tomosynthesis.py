"""A whole tomosynthesis view (60 slices of 2457 x 1890) through the reduced network: seconds by stage, and peak memory.

Each side is a process of its own, from the DICOM file to boxes in voxels of the file and masks on its grid; starting
Python, importing and building the network count in the memory, not in the seconds. All sides have the demo's layers at
1.0 x 0.424 x 0.424 mm with the same random weights (seed 0), and patches of 64 x 256 x 256; the ten best masks are
drawn. Seconds are of CPU time, which with one thread is the wall time of a quiet machine; wall time is there too.

- medseg: frames are read and binned one by one, the breast region is found (``LoadViewd``), patches with an overlap of
  25 % go over the rectangle around the breast where at least 2 % is breast (``PatchDetection``), weighted box
  clustering, masks pasted in their boxes.
- unskipped: the same with ``skip_below=None``: all of the picture. What the breast region is worth.
- naive: as a newcomer would write it. ``pydicom.dcmread(...).pixel_array`` as a whole, then as float32, shrunk by
  torch's ``interpolate`` (area), scaled by its percentiles; one patch at a time on a grid with an overlap of
  50 % over all of the picture; NMS over all boxes; masks by ``interpolate`` (trilinear) to the size
  of their boxes.
- naive_25: the same with an overlap of 25 %: the ratio that the denser grid has no part in.

Run: .venv/bin/python benchmarks/tomosynthesis.py [--rounds 1] [--sides medseg naive] [--view FILE]
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from race import arguments, prepare, print_table

SPACING = (1.0, 0.424, 0.424)
PATCH = (64, 256, 256)
MASKS = 10

OVERLAP = 0.25
SIDES = ("medseg", "unskipped", "naive", "naive_25")
STAGES = ("read", "detect", "masks")

#: In a process of its own: its memory is none of the sides'.
SIMULATE = """
import sys
from pathlib import Path
from medseg.tasks.dbt_mass.simulate import benchmark_view
benchmark_view(Path(sys.argv[1]))
"""

Labels = npt.NDArray[np.uint8]


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--view", type=Path, help="DICOM file to use instead of a simulated one")
    parser.add_argument("--one", choices=SIDES, help="this side alone, in this process, as JSON")
    options = parser.parse_args()
    prepare(options.threads)
    if options.one:
        print(json.dumps(run(options.one, options.view)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        view = options.view or Path(temporary) / "view.dcm"
        if options.view is None:
            subprocess.run([sys.executable, "-c", SIMULATE, str(view)], check=True)
        words = [sys.executable, __file__, "--threads", str(options.threads), "--view", str(view), "--one"]
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
        for _ in range(options.rounds):
            for side, runs in found.items():
                done = subprocess.run([*words, side], check=True, stdout=subprocess.PIPE, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    show(found)


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    """One row per side: medians over the rounds, the highest memory, and the time as a multiple of medseg's."""
    seconds = {s: [statistics.median(r[stage] for r in runs) for stage in STAGES] for s, runs in found.items()}
    first = sum(next(iter(seconds.values())))
    rows = [
        [side, *(f"{value:.1f}" for value in seconds[side]), f"{sum(seconds[side]):.1f}",
         f"{sum(seconds[side]) / first:.2f}",
         f"{statistics.median(r['wall'] for r in runs):.1f}", str(runs[0]["patches"]), str(runs[0]["boxes"]),
         f"{max(r['gigabytes'] for r in runs):.2f}"]
        for side, runs in found.items()
    ]  # fmt: skip
    header = [
        "side",
        *(f"{stage} s" for stage in STAGES),
        "all s",
        f"/ {next(iter(found))}",
        "wall s",
        "patches",
        "boxes",
    ]
    print_table([*header, "peak GB"], rows)


def run(side: str, view: Path) -> dict[str, Any]:
    """One side: seconds by stage, patches, boxes and peak memory."""
    network = reduced_network()
    if side.startswith("naive"):
        result = naive(view, network, OVERLAP if side == "naive_25" else 0.5)
    else:
        result = medseg_side(view, network, 0.02 if side == "medseg" else None)
    return {**result, "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def reduced_network() -> Any:
    """The demo's layers on this benchmark's grid."""
    import torch
    from monai.bundle import ConfigParser

    torch.manual_seed(0)
    parser = ConfigParser()
    parser.read_config([f"bundles/dbt_mass/configs/{name}.yaml" for name in ("train", "demo")])
    parser.update({"spacing": list(SPACING)})
    return parser.get_parsed_content("network_def").eval()


def medseg_side(view: Path, network: Any, skip_below: float | None) -> dict[str, Any]:
    import torch

    from medseg.detection.patches import PatchDetection, paste_masks
    from medseg.io.tomosynthesis import read_header
    from medseg.tasks.dbt_mass.views import LoadViewd, boxes_to_grid

    inferer = PatchDetection(PATCH, OVERLAP, skip_below)
    seconds: dict[str, Any] = {}
    with torch.no_grad():
        with timed(seconds, "read"):
            header = read_header(view)
            image = LoadViewd(["image"], SPACING)({"image": header})["image"]
        with timed(seconds, "detect"):
            found = inferer(image[None], network)
        with timed(seconds, "masks"):
            boxes = boxes_to_grid(found["boxes"][0].numpy(), np.asarray(image.affine), header.affine)
            labels: Labels = np.zeros(header.shape, np.uint8)
            pasted = paste_masks(torch.from_numpy(boxes[:MASKS]).float(), found["masks"][0, :MASKS], header.shape)
            for number, (where, mask) in enumerate(pasted, start=1):
                labels[where][mask.numpy() > 0.5] = number
    patches = len(inferer.starts(image[0].as_tensor()))
    return {**seconds, "patches": patches, "boxes": len(boxes)}


def naive(view: Path, network: Any, overlap: float) -> dict[str, Any]:
    import pydicom
    import torch
    from torch.nn import functional

    from medseg.detection.nms import nms_3d

    seconds: dict[str, Any] = {}
    with torch.no_grad():
        with timed(seconds, "read"):
            data = pydicom.dcmread(view)
            native = data.pixel_array.astype(np.float32)
            pixel = data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing
            plane = [round(n * float(p) / s) for n, p, s in zip(native.shape[1:], pixel, SPACING[1:], strict=True)]
            shape = (len(native), *plane)
            volume = functional.interpolate(torch.from_numpy(native)[None, None], shape, mode="area")[0, 0]
            low, high = np.percentile(volume.numpy(), [1, 99])
            volume = ((volume - low) / (high - low)).clamp(0.01, 1.5)
        with timed(seconds, "detect"):
            boxes, scores, masks, patches = patch_loop(volume, network, overlap)
            kept = nms_3d(boxes, scores, 0.2)
            boxes, masks = boxes[kept], masks[kept]
        with timed(seconds, "masks"):
            scale = [n / s for n, s in zip(native.shape, shape, strict=True)]
            boxes = boxes * torch.tensor([*scale, *scale])
            labels: Labels = np.zeros(native.shape, np.uint8)
            for number, (box, mask) in enumerate(zip(boxes[:MASKS], masks[:MASKS], strict=True), start=1):
                first, last = box[:3].round().int().tolist(), box[3:].round().int().tolist()
                size = [max(1, b - a) for a, b in zip(first, last, strict=True)]
                inside = functional.interpolate(mask[None, None], size, mode="trilinear")[0, 0].numpy() > 0.5
                part = labels[tuple(slice(a, a + n) for a, n in zip(first, size, strict=True))]
                part[inside[: part.shape[0], : part.shape[1], : part.shape[2]]] = number
    return {**seconds, "patches": patches, "boxes": len(boxes)}


def patch_loop(volume: Any, network: Any, overlap: float) -> tuple[Any, Any, Any, int]:
    """Boxes, scores and masks of all patches, and how many there were."""
    import torch
    from torch.nn import functional

    corners = []
    for length, patch in zip(volume.shape, PATCH, strict=True):
        step, last = int(patch * (1 - overlap)), max(0, length - patch)
        corners.append([*range(0, last, step), last])
    boxes, scores, masks = [], [], []
    for corner in product(*corners):
        patch = volume[tuple(slice(c, c + n) for c, n in zip(corner, PATCH, strict=True))]
        short = [n - had for n, had in zip(PATCH, patch.shape, strict=True)]
        patch = functional.pad(patch, (0, short[2], 0, short[1], 0, short[0]))
        found = network(patch[None, None])[0]
        boxes.append(found.boxes + torch.tensor([*corner, *corner]))
        scores.append(found.scores)
        masks.append(found.masks)
    return torch.cat(boxes), torch.cat(scores), torch.cat(masks), len(boxes)


@contextmanager
def timed(seconds: dict[str, Any], stage: str) -> Iterator[None]:
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    seconds[stage] = time.process_time() - cpu
    seconds["wall"] = seconds.get("wall", 0.0) + time.perf_counter() - wall


if __name__ == "__main__":
    main()
