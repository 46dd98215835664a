"""DenseCRF3D against pydensecrf2: seconds from probabilities and image to marginals, and the error of both.

Two labels, 4 iterations, symmetric normalisation, building included, one thread. Checked first, on 12^3 voxels: the
distance of both to mean-field over all pairs in float64.

Run: .venv/bin/python benchmarks/crf.py [--rounds 5] [--sizes 32 64 96] [--cuda]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from race import arguments, prepare, print_table, race

Array = npt.NDArray[np.float32]

ITERATIONS = 4

NAMES = ("smoothness_weight", "smoothness_sigma", "appearance_weight", "appearance_sigma", "intensity_sigma")

#: in this order; the intensity sigma for 0-255
SETS = {
    "released": (10.0, 10.0, 30.0, 100.0, 50.0),
    "sharp": (3.0, 3.0, 3.0, 3.0, 10.0),
    "mild": (0.5, 1.0, 1.0, 3.0, 20.0),
}


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96], help="voxels per side")
    parser.add_argument("--cuda", action="store_true", help="time CUDA too")
    options = parser.parse_args()
    prepare(options.threads)
    print_table(["12^3, marginals", "largest error: medseg", "pydensecrf2"], map(errors, SETS))
    print()
    header = ["set", "voxels", "pydensecrf2 s", "medseg s", "medseg / pydensecrf2", "of the shortest"]
    rows = [times(name, size, options.rounds, options.cuda) for name in SETS for size in options.sizes]
    print_table(header + (["CUDA s", "CPU / CUDA"] if options.cuda else []), rows)


def errors(name: str) -> list[str]:
    """Largest difference to mean-field over all pairs of 12^3 voxels."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "crf"))  # the oracle of the tests
    from brute_force import mean_field

    probabilities, image = ball(12)
    expected = mean_field(probabilities, image, dict(zip(NAMES, SETS[name], strict=True)), ITERATIONS, "symmetric")
    found = [side(probabilities, image, SETS[name])() for side in (medseg_side, pydensecrf_side)]
    distances = [float(np.abs(np.asarray(marginals).reshape(expected.shape) - expected).max()) for marginals in found]
    if distances[0] > 0.02:
        raise SystemExit(f"{name}: medseg's marginals are {distances[0]:.3f} off; there is nothing to time")
    return [name, *(f"{distance:.1e}" for distance in distances)]


def times(name: str, size: int, rounds: int, cuda: bool) -> list[str]:
    probabilities, image = ball(size)
    sides = {"theirs": pydensecrf_side, "ours": medseg_side}
    if cuda:
        sides["cuda"] = partial(medseg_side, device="cuda")
    took = race({key: side(probabilities, image, SETS[name]) for key, side in sides.items()}, rounds)
    theirs, ours = took["theirs"], took["ours"]
    row = [name, f"{size}^3", f"{theirs.wall:.3f}", f"{ours.wall:.3f}"]
    row += [f"{ours.wall / theirs.wall:.2f}", f"{ours.min_wall / theirs.min_wall:.2f}"]
    return row + ([f"{took['cuda'].wall:.4f}", f"{ours.wall / took['cuda'].wall:.0f}"] if cuda else [])


def ball(size: int) -> tuple[Array, Array]:
    """Noisy probabilities (2, D, H, W) and a noisy image (D, H, W) of a bright ball, intensities 0..255."""
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, size)
    inside = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 0.35
    image = (80 + 90 * inside + 25 * rng.standard_normal(inside.shape)).clip(0, 255)
    image.flat[:2] = 0, 255
    foreground = 1 / (1 + np.exp(1 - 2 * inside - 1.5 * rng.standard_normal(inside.shape)))
    return np.stack([1 - foreground, foreground]).astype(np.float32), image.astype(np.float32)


def medseg_side(
    probabilities: Array, image: Array, values: tuple[float, ...], device: str = "cpu"
) -> Callable[[], object]:
    import torch

    from medseg.crf import DenseCRF3D

    crf = DenseCRF3D(*values, iterations=ITERATIONS).to(device)
    inputs = torch.from_numpy(probabilities)[None].to(device), torch.from_numpy(image)[None, None].to(device)

    @torch.no_grad()
    def run() -> object:
        marginals = crf(*inputs)
        if device != "cpu":
            torch.cuda.synchronize()
        return marginals

    return run


def pydensecrf_side(probabilities: Array, image: Array, values: tuple[float, ...]) -> Callable[[], object]:
    from pydensecrf import densecrf, utils

    smooth_weight, smooth_sigma, weight, sigma, intensity_sigma = values

    def run() -> object:
        crf = densecrf.DenseCRF(image.size, len(probabilities))
        crf.setUnaryEnergy(-np.log(np.maximum(probabilities, 1e-4)).reshape(len(probabilities), -1))
        position = utils.create_pairwise_gaussian(sdims=3 * (smooth_sigma,), shape=image.shape)
        crf.addPairwiseEnergy(position, compat=smooth_weight)
        both = utils.create_pairwise_bilateral(sdims=3 * (sigma,), schan=(intensity_sigma,), img=image[None], chdim=0)
        crf.addPairwiseEnergy(both, compat=weight)
        return crf.inference(ITERATIONS)

    return run


if __name__ == "__main__":
    main()
