"""An 8-way search over 1,000 subtomograms against a pairwise one that encodes the support again for every target.

Run: .venv/bin/python benchmarks/search.py [--targets 1000] [--naive 64] [--channels 16] [--stem-stride 2] [--threads 1]

Both sides score the same random volumes with the same random weights, and the scores are checked to agree first. The
pairwise side is timed on fewer targets (its time per target is constant); both take turns. The CRF is left out on both
sides: it costs the same per target.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

from medseg.io.mrc import write_mrc
from medseg.io.mrc_monai import MRCReader
from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.tasks.cryoet_one_shot.search import OneShotSearch
from medseg.tasks.cryoet_one_shot.support import SupportSet

WAYS, SIZE = 8, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("targets", 1000), ("naive", 64), ("channels", 16), ("stem-stride", 2), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = COSNet(options.channels, stem_stride=options.stem_stride).eval()
    support = torch.randn(WAYS, 1, SIZE, SIZE, SIZE)
    targets = torch.randn(options.targets, 1, SIZE, SIZE, SIZE)
    with torch.no_grad(), TemporaryDirectory() as folder:
        for i, volume in enumerate(support):
            write_mrc(Path(folder, f"structure{i}.mrc"), volume[0].numpy(), 10.0)
        support_set = SupportSet(
            folder, Compose([LoadImaged("image", MRCReader()), EnsureChannelFirstd("image")]), SIZE
        )
        expected = pairwise(network, support, targets[:4])
        torch.testing.assert_close(search(network, support_set, targets[:4]), expected, rtol=1e-4, atol=1e-5)
        ours, naive = [], []
        for _ in range(options.rounds + 1):  # the first round warms up
            ours.append(seconds(search, network, support_set, targets) / len(targets))
            naive.append(seconds(pairwise, network, support, targets[: options.naive]) / options.naive)
    fast, slow = (statistics.median(times[1:]) for times in (ours, naive))
    print(f"{WAYS} ways, {options.channels} channels, stem stride {options.stem_stride}, {options.threads} thread(s)")
    print(f"{'':<34} {'targets':>8} {'ms/target':>10} {'targets/s':>10}")
    print(f"{'medseg: everything encoded once':<34} {len(targets):>8} {1e3 * fast:>10.1f} {1 / fast:>10.1f}")
    print(f"{'pairwise: support encoded again':<34} {options.naive:>8} {1e3 * slow:>10.1f} {1 / slow:>10.1f}")
    print(f"ratio {slow / fast:.1f}")


def search(network: COSNet, support_set: SupportSet, targets: torch.Tensor) -> torch.Tensor:
    """Scores (N, n) as ``inference.yaml`` computes them, masks included."""
    finder = OneShotSearch(network, support_set)
    batches = DataLoader(Dataset(targets), batch_size=32)
    return torch.cat([finder(batch)["match"] for batch in batches])


def pairwise(network: COSNet, support: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Scores (N, n) of a loop over targets: the support set and the target in one batch, then the match."""
    scores = []
    for target in targets:
        features, _ = network.embed(torch.cat([support, target[None]]))
        scores.append(network.match(features[:WAYS], features[WAYS:])[0])
    return torch.stack(scores)


def seconds(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
