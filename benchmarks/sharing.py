"""``medseg check`` of a task, and ``medseg verify`` of a 500 MB bundle: seconds and peak memory of the whole command.

Run: .venv/bin/python benchmarks/sharing.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from medseg.bundles.archive import write_zip
from medseg.bundles.catalog import find_bundle, repository_root
from medseg.bundles.pack import chosen_network
from medseg.bundles.release import source_configs
from medseg.io.files import file_sha256

TASK = "fluorescence_tumor"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"{'command':<42} {'seconds':>8} {'peak MB':>8}   (median of {rounds} after one to warm up)")
    show("medseg --version", ["--version"], rounds)
    show(f"medseg check {TASK}", ["check", TASK], rounds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = big_bundle(Path(temporary) / TASK)
        packed = Path(temporary) / f"{TASK}_v0.1.0.zip"
        write_zip(folder, packed)
        megabytes = packed.stat().st_size / 1e6
        show(f"medseg verify, zip of {megabytes:.0f} MB", ["verify", str(packed)], rounds)
        show(f"medseg verify, folder of {megabytes:.0f} MB", ["verify", str(folder)], rounds)


def big_bundle(folder: Path) -> Path:
    """The task's configs with 62 million random weights in two files, 500 MB together."""
    root = repository_root()
    bundle = find_bundle(TASK, root)
    for part in ("configs", "models", "docs"):
        (folder / part).mkdir(parents=True)
    for name, config in source_configs(bundle, root).items():
        (folder / "configs" / f"{name}.json").write_text(json.dumps({**chosen_network(config), "bundle_root": "."}))
    (folder / "configs" / "metadata.json").write_text(json.dumps(bundle.metadata))
    (folder / "docs" / "README.md").write_text("# Big\n")
    state = {f"layers.{i}.weight": torch.randn(512, 512, 3, 3) for i in range(26)}
    torch.save(state, folder / "models" / "model.pt")
    save_file(state, folder / "models" / "model.safetensors")
    layout = {k: ["float32", list(v.shape)] for k, v in state.items()}
    (folder / "models" / "network_layout.json").write_text(json.dumps(layout))
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    (folder / "SHA256SUMS").write_text("".join(f"{file_sha256(folder / n)}  {n}\n" for n in names))
    return folder


def show(title: str, words: list[str], rounds: int) -> None:
    seconds, peak = zip(*(run(words) for _ in range(rounds + 1)), strict=True)
    print(f"{title:<42} {statistics.median(seconds[1:]):8.2f} {max(peak[1:]):8.0f}")


#: The command, and its peak memory at the end (what wait4 tells includes the memory of this parent).
COMMAND = """
import sys
from medseg.cli import main
try:
    main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
"""


def run(words: list[str]) -> tuple[float, float]:
    """Wall seconds and peak memory in MB of one command in a process of its own."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"medseg {' '.join(words)} failed:\n{done.stdout}{done.stderr}")
    return seconds, int(done.stderr.split()[-1]) / 1024


if __name__ == "__main__":
    main()
