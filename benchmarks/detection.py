"""3D non-maximum suppression against MONAI's, and RoIAlign in 3D against a loop over regions.

Run: .venv/bin/python benchmarks/detection.py [--counts 5000 20000] [--thresholds 0.5] [--rounds 3] [--threads 1]

Boxes are spread over a volume of 64 x 512 x 512 voxels or gathered in 60 clusters with 5 % or 10 % of jitter, which
leaves few or many; both sides must keep the same boxes in the same order before they are timed. RoIAlign takes 32 boxes
of 6 to 30 voxels of the feature map per side; the loop samples region after region by ``grid_sample``, and both
must agree in values and gradients first. All sides take turns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from monai.data.box_utils import non_max_suppression
from race import arguments, prepare, print_table, race
from torch import Tensor
from torch.nn.functional import grid_sample

from medseg.detection.nms import nms_3d
from medseg.detection.roi_align import roi_align_3d

VOLUME = (64, 512, 512)

REGIONS, SAMPLES = 32, 2

#: Feature map (C, D, H, W) and output size: box and mask branch of the full network, box branch of the reduced one.
ROI_CASES = [
    ((128, 32, 64, 64), (3, 7, 7)),
    ((128, 32, 64, 64), (7, 14, 14)),
    ((32, 32, 48, 48), (4, 5, 5)),
]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 20000], help="boxes")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.5], help="IoU thresholds")
    parser.add_argument("--cuda", action="store_true", help="run RoIAlign on CUDA")
    options = parser.parse_args()
    prepare(options.threads)
    cases = [(n, name, t) for n in options.counts for name in LAYOUTS for t in options.thresholds]
    header = ["boxes", "layout", "threshold", "kept", "MONAI s", "medseg s", "MONAI / medseg"]
    print_table(header, (suppression(*case, options.rounds) for case in cases))
    print()
    header = ["features", "output", "loop s", "medseg s", "loop / medseg", "loop + backward s", "medseg s", "ratio"]
    device = "cuda" if options.cuda else "cpu"
    print_table(header, (alignment(*case, device, options.rounds) for case in ROI_CASES))


def spread(count: int, rng: np.random.Generator) -> Tensor:
    return corners(rng.uniform(0, VOLUME, (count, 3)), rng.uniform(10, 40, (count, 3)))


def clusters(jitter: float) -> Callable[[int, np.random.Generator], Tensor]:
    def boxes(count: int, rng: np.random.Generator) -> Tensor:
        places, sizes = rng.uniform(0, VOLUME, (60, 3)), rng.uniform(10, 40, (60, 3))
        owner = rng.integers(0, 60, count)
        centres = places[owner] + jitter * sizes[owner] * rng.standard_normal((count, 3))
        return corners(centres, sizes[owner] * np.exp(jitter * rng.standard_normal((count, 3))))

    return boxes


def corners(centres: np.ndarray, sizes: np.ndarray) -> Tensor:
    return torch.tensor(np.concatenate([centres - sizes / 2, centres + sizes / 2], 1), dtype=torch.float32)


LAYOUTS = {"spread": spread, "60 clusters, 5 %": clusters(0.05), "60 clusters, 10 %": clusters(0.1)}


def suppression(count: int, layout: str, threshold: float, rounds: int) -> list[str]:
    """A row of the table of non-maximum suppression."""
    rng = np.random.default_rng(0)
    boxes, scores = LAYOUTS[layout](count, rng), torch.from_numpy(rng.random(count)).float()
    kept = nms_3d(boxes, scores, threshold)
    if not torch.equal(kept, non_max_suppression(boxes, scores, threshold)):
        raise SystemExit(f"{count} boxes, {layout}, {threshold}: the lists differ; there is nothing to time")
    sides = {
        "theirs": lambda: non_max_suppression(boxes, scores, threshold),
        "ours": lambda: nms_3d(boxes, scores, threshold),
    }
    took = race(sides, rounds)
    theirs, ours = took["theirs"].wall, took["ours"].wall
    row = [f"{count:,}", layout, f"{threshold:g}", f"{len(kept):,}"]
    return [*row, f"{theirs:.3f}", f"{ours:.4f}", f"{theirs / ours:.1f}"]


def alignment(shape: tuple[int, ...], size: tuple[int, int, int], device: str, rounds: int) -> list[str]:
    """A row of the table of RoIAlign: forward alone, and with the gradient of the features."""
    rng = np.random.default_rng(0)
    features = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    centres = rng.uniform(0.2, 0.8, (REGIONS, 3)) * shape[1:]
    boxes = torch.cat([torch.zeros(REGIONS, 1), corners(centres, rng.uniform(6, 30, (REGIONS, 3)))], 1).to(device)

    def forward(align: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return finished(align(features, boxes, size))

        return run

    def both(align: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: finished(torch.autograd.grad(align(features, boxes, size).square().sum(), features)[0])

    sides = {"loop": loop_over_regions, "ours": roi_align_3d}
    for kind in (forward, both):
        results = [kind(align)() for align in sides.values()]
        if not torch.allclose(*results, atol=1e-4 * float(results[0].abs().max()), rtol=0):
            raise SystemExit(f"{shape}, {size}: values or gradients differ; there is nothing to time")
    row = [" x ".join(map(str, shape)), " x ".join(map(str, size))]
    for kind in (forward, both):
        took = race({name: kind(align) for name, align in sides.items()}, rounds)
        loop, ours = took["loop"].wall, took["ours"].wall
        row += [f"{loop:.4f}", f"{ours:.4f}", f"{loop / ours:.1f}"]
    return row


def finished(values: Tensor) -> Tensor:
    if values.is_cuda:
        torch.cuda.synchronize()
    return values


def loop_over_regions(features: Tensor, boxes: Tensor, size: tuple[int, int, int]) -> Tensor:
    """RoIAlign region by region: all samples by ``grid_sample``, then their means."""
    extent = torch.tensor(features.shape[2:], device=boxes.device)
    results = []
    for box in boxes:
        axes, inside = [], []
        for i, cells in enumerate(size):
            step = (torch.arange(cells * SAMPLES, device=boxes.device) + 0.5) / (cells * SAMPLES)
            position = box[1 + i] - 0.5 + (box[4 + i] - box[1 + i]) * step
            inside.append(((position >= -1) & (position <= extent[i])).float())
            axes.append(2 * position.clamp(min=0).minimum(extent[i] - 1) / (extent[i] - 1) - 1)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1)[None]
        image = int(box[0])
        values = grid_sample(features[image : image + 1], grid, align_corners=True, padding_mode="border")
        values = values * torch.einsum("d,h,w->dhw", *inside)
        results.append(torch.nn.functional.avg_pool3d(values, SAMPLES)[0])
    return torch.stack(results)


if __name__ == "__main__":
    main()
