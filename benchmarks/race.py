"""The harness that the benchmarks share: candidates take turns, and CPU time counts beside wall time.

The first round only warms caches. In every round each candidate runs once, so that a busy neighbour slows all of them
alike; the median of the rounds is reported. Whether the candidates agree is the caller's to check beforehand.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name")

#: Bundles and their macros are read from here.
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Result:
    """Seconds that one candidate took, over all rounds but the first.

    Attributes:
        cpu: median CPU time, of all threads together.
        wall: median wall time.
        min_cpu: shortest CPU time.
        min_wall: shortest wall time.
    """

    cpu: float
    wall: float
    min_cpu: float
    min_wall: float


def race(
    candidates: Mapping[Name, Callable[[], object]],
    rounds: int = 3,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[Name, Result]:
    """Time candidates in turn.

    Args:
        candidates: what to run, by name.
        rounds: rounds that count; one more is run before them.
        cpu_clock: CPU seconds so far, of this process by default.

    Returns:
        The seconds of each candidate.
    """
    cpu: dict[Name, list[float]] = {name: [] for name in candidates}
    wall: dict[Name, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            gc.collect()
            cpu_before, wall_before = cpu_clock(), time.perf_counter()
            run()
            cpu_after, wall_after = cpu_clock(), time.perf_counter()
            if turn:
                cpu[name].append(cpu_after - cpu_before)
                wall[name].append(wall_after - wall_before)
    return {
        name: Result(statistics.median(cpu[name]), statistics.median(wall[name]), min(cpu[name]), min(wall[name]))
        for name in candidates
    }


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Options that every benchmark has: ``--rounds`` and ``--threads``."""
    parser = argparse.ArgumentParser(
        description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rounds", type=_positive, default=rounds, help="rounds that count, after one to warm up")
    parser.add_argument("--threads", type=_positive, default=1, help="threads of torch, on every side of the race")
    return parser


def prepare(threads: int) -> None:
    """Give every candidate the same threads, here and in child processes, and go where bundles are run from."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)
    os.chdir(ROOT)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table: the first column to the left, numbers to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        first, *others = (f"{cell:{'>' if n else '<'}{widths[n]}}" for n, cell in enumerate(line))
        print("| " + " | ".join([first, *others]) + " |")
        if i == 0:
            print("|" + "|".join("-" * (width + 1) + (":" if n else "-") for n, width in enumerate(widths)) + "|")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value
