"""Where the children of a cross-validation run: on this machine, or on a Ray cluster.

An engine takes commands and yields them as they end. Whatever happens, no child outlives its engine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = ("local", "ray")

#: What a job's log has in front of each attempt.
ATTEMPT = "=== started"

__all__ = ["ATTEMPT", "ENGINES", "Ended", "Job", "run_local", "run_ray"]


@dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: for messages.
        command: makes the words of the command when its turn comes.
        log: file that its output is added to.
        cwd: folder to run in.
        ready: whether it may start yet.
    """

    name: str
    command: Callable[[], list[str]]
    log: Path
    cwd: Path
    ready: Callable[[], bool] = lambda: True


@dataclass(frozen=True)
class Ended:
    """How a job ended: its place in the list, its exit code and its seconds."""

    index: int
    returncode: int
    seconds: float


def run_local(jobs: Sequence[Job], parallel: int = 1) -> Generator[Ended, None, None]:
    """Run jobs on this machine.

    Args:
        jobs: what to run, started in this order.
        parallel: so many at a time. They share the CPU cores, and each gets one of the GPUs in turn.

    Yields:
        Each job as it ends.
    """
    running = _Running()
    slots: queue.Queue[dict[str, str]] = queue.Queue()
    for slot in _slots(parallel):
        slots.put(slot)

    def one(index: int) -> Ended:
        environment = slots.get()
        try:
            while not jobs[index].ready():
                if running.ended.wait(1.0):
                    return Ended(index, -signal.SIGTERM, 0.0)
            return _run(index, jobs[index].command(), jobs[index], environment, running)
        finally:
            slots.put(environment)

    pool = ThreadPoolExecutor(parallel)
    try:
        waiting = {pool.submit(one, i) for i in range(len(jobs))}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        running.end()
        pool.shutdown()


def run_ray(
    jobs: Sequence[Job], parallel: int | None = None, address: str | None = None
) -> Generator[Ended, None, None]:
    """Run jobs on a Ray cluster, one GPU each where there are GPUs.

    The checkout, the data, the output folder and the MLflow store must be reachable under the same names from every
    node, and medseg installed there.

    Args:
        jobs: what to run.
        parallel: at most so many at a time: without GPUs each takes that share of the CPU cores. ``None``: one core.
        address: of the cluster (``auto``, ``ray://host:10001``); ``None`` follows ``RAY_ADDRESS`` or starts one here.

    Yields:
        Each job as it ends.

    Raises:
        ValueError: if Ray is not installed.
        ConnectionError: if there is no cluster at ``address``.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anybody
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError("--engine ray needs Ray: pip install 'medseg[ray]'") from error
    own = not ray.is_initialized()
    if own:
        local = {} if address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
        ray.init(address=address, log_to_driver=False, logging_level="warning", **local)
    try:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        share = {"num_gpus": 1, "num_cpus": 1} if gpus else {"num_cpus": max(1, cpus // parallel) if parallel else 1}
        remote: Any = ray.remote(max_retries=0, **share)(_run_remotely)
        left = list(range(len(jobs)))
        waiting: dict[Any, int] = {}
        while left or waiting:
            while left and (parallel is None or len(waiting) < parallel):
                index = next((i for i in left if jobs[i].ready()), None)
                if index is None:
                    break
                left.remove(index)
                job = jobs[index]
                environment = {k: v for k, v in os.environ.items() if k.startswith(("MLFLOW_", "MEDSEG_"))}
                waiting[remote.remote(job.command(), str(job.log), str(job.cwd), environment)] = index
            if not waiting:
                time.sleep(1.0)
                continue
            done, _ = ray.wait(list(waiting), timeout=1.0)
            for reference in done:
                index = waiting.pop(reference)
                try:
                    returncode, seconds = ray.get(reference)
                except ray.exceptions.RayError as error:  # a node went away, or it lacks medseg
                    with jobs[index].log.open("a", encoding="utf-8") as log:
                        log.write(f"error: Ray: {str(error).strip().splitlines()[-1]}\n")
                    returncode, seconds = 1, 0.0
                yield Ended(index, returncode, seconds)
    finally:
        if own:
            ray.shutdown()


class _Running:
    """The processes of an engine. Once it has ended none is started any more."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._processes: set[subprocess.Popen[bytes]] = set()

    def start(self, command: list[str], **arguments: Any) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self.ended.is_set():
                return None
            process = subprocess.Popen(command, **arguments)
            self._processes.add(process)
            return process

    def end(self) -> None:
        """End what still runs: first as a scheduler would, so that it records itself as killed and can be resumed."""
        self.ended.set()
        with self._lock:
            processes = [p for p in self._processes if p.poll() is None]
        for process in processes:
            with contextlib.suppress(OSError):
                process.terminate()
        deadline = time.monotonic() + 60
        for process in processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _run(index: int, command: list[str], job: Job, environment: dict[str, str], running: _Running) -> Ended:
    started = time.perf_counter()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        log.write(f"\n{ATTEMPT} {time.strftime('%Y-%m-%d %H:%M:%S')}: {shlex.join(command)}\n".encode())
        log.flush()
        process = running.start(
            command, cwd=job.cwd, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,  # Ctrl-C reaches the engine alone, which then ends its children in order
        )  # fmt: skip
        returncode = -signal.SIGTERM if process is None else process.wait()
    return Ended(index, returncode, time.perf_counter() - started)


def _run_remotely(command: list[str], log: str, cwd: str, environment: dict[str, str]) -> tuple[int, float]:
    """On a Ray worker."""
    running = _Running()
    try:
        ended = _run(0, command, Job("", lambda: command, Path(log), Path(cwd)), environment, running)
    finally:
        running.end()
    return ended.returncode, ended.seconds


def _slots(parallel: int) -> list[dict[str, str]]:
    """Environment of each child that runs beside others: its share of the cores, its GPU."""
    gpus = _gpus()
    if parallel == 1:
        return [{}]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // parallel))}
    return [{**threads, **({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {})} for i in range(parallel)]


def _gpus() -> list[str]:
    """Ids of the GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [g for g in given.split(",") if g.strip()]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.split() if listed.returncode == 0 else []
