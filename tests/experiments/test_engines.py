from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from medseg.experiments.engines import ATTEMPT, Job, _slots, run_local, run_ray


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, lambda: [sys.executable, "-c", code], folder / f"{name}.log", folder)


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    codes = ["print('one')", "import sys; print('two'); sys.exit(3)", "print('three')"]
    ended = list(run_local([job(tmp_path, str(i), code) for i, code in enumerate(codes)]))
    assert [(e.index, e.returncode) for e in ended] == [(0, 0), (1, 3), (2, 0)]
    logs = [(tmp_path / f"{i}.log").read_text().splitlines() for i in range(3)]
    assert [log[-1] for log in logs] == ["one", "two", "three"]
    assert all(log[1].startswith(ATTEMPT) for log in logs)


def test_jobs_run_at_the_same_time(tmp_path):
    # each waits for a file that the other writes
    code = "import pathlib, time; pathlib.Path('{0}').touch()\nwhile not pathlib.Path('{1}').exists(): time.sleep(0.05)"
    jobs = [job(tmp_path, "a", code.format("x", "y")), job(tmp_path, "b", code.format("y", "x"))]
    assert {e.returncode for e in run_local(jobs, parallel=2)} == {0}


def test_children_share_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert _slots(1) == [{}]
    assert [s["CUDA_VISIBLE_DEVICES"] for s in _slots(3)] == ["4", "7", "4"]
    assert _slots(3)[0]["OMP_NUM_THREADS"] == "4"


def test_no_child_outlives_the_engine(tmp_path):
    code = "import pathlib, os, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(600)"
    running = run_local([job(tmp_path, "quick", "pass"), job(tmp_path, "slow", code)], parallel=2)
    next(running)
    deadline = time.monotonic() + 60
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.close()  # what an exception in its caller does
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_job_that_waits_is_never_started_after_the_end(tmp_path):
    waiting = Job(
        "waits", lambda: [sys.executable, "-c", "open('started', 'w')"], tmp_path / "w.log", tmp_path, lambda: False
    )
    running = run_local([job(tmp_path, "quick", "pass"), waiting], parallel=2)
    next(running)
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 5
    assert not (tmp_path / "started").exists()


def test_ray_runs_the_same_jobs(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'medseg[ray]'")
    monkeypatch.setenv("MEDSEG_SIGN", "seen")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    codes = ["import os; print(os.environ['MEDSEG_SIGN'])", "import sys; sys.exit(3)"]
    ended = list(run_ray([job(tmp_path, str(i), code) for i, code in enumerate(codes)], parallel=2))
    assert {e.index: e.returncode for e in ended} == {0: 0, 1: 3}
    assert (tmp_path / "0.log").read_text().endswith("\nseen\n")


def test_ray_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match="pip install"):
        list(run_ray([]))
