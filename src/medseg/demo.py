"""Running a demo: the steps of a bundle as a user would type them, each printed before it runs."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg.bundles.catalog import repository_root
from medseg.io.files import write_atomically

MARKER = ".medseg-demo"

__all__ = ["Demo", "DemoError"]


class DemoError(RuntimeError):
    """A step of a demo failed; its own output is above."""


@dataclass
class Demo:
    """One demo of one task.

    Attributes:
        out: folder that everything is written to.
        root: the checkout that bundles are run from.
        seconds: time of each step by title.
    """

    out: Path
    root: Path = field(default_factory=repository_root)
    seconds: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make an empty output folder.

        Raises:
            DemoError: if the folder holds something that no demo wrote.
        """
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / MARKER).is_file():
                raise DemoError(f"{self.out} is not empty and was not written by a demo; choose another --out")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARKER).write_text("written by `medseg demo`, which replaces this folder\n")

    def bundle(self, title: str, config: str | Sequence[str], **arguments: Any) -> None:
        """Run ``python -m monai.bundle run`` on a config, or on a list of configs that overlay each other.

        Args:
            title: what the step does.
            config: config file or files.
            arguments: further arguments of the line.

        Raises:
            DemoError: if it fails.
        """
        files = config if isinstance(config, str) else "[" + ",".join(f"'{c}'" for c in config) + "]"
        line = ["-m", "monai.bundle", "run", "--config_file", files]
        for name, value in arguments.items():
            line += [f"--{name}", str(value)]
        self.step(title, [sys.executable, *line], shown=["python", *line])

    def medseg(self, title: str, *words: str) -> None:
        """Run a ``medseg`` command.

        Args:
            title: what the step does.
            words: of the command, after ``medseg``.

        Raises:
            DemoError: if it fails.
        """
        self.step(title, [sys.executable, "-m", "medseg", *words], shown=["medseg", *words])

    def mlflow_page(self) -> str:
        """How to open the MLflow page with the demo's runs, for the notes."""
        from medseg.tracking.store import tracking_uri  # every command imports DemoError from here

        server = "" if os.environ.get("MLFLOW_TRACKING_URI") else f" --backend-store-uri {tracking_uri()}"
        return f"open the MLflow page: cd {self.root} && {Path(sys.executable).parent / 'mlflow'} ui{server}"

    def step(self, title: str, command: Sequence[str], shown: Sequence[str] | None = None) -> None:
        """Print a command, run it in the checkout and time it.

        Args:
            title: what the step does.
            command: program and arguments.
            shown: what to print instead of ``command``.

        Raises:
            DemoError: if it fails.
        """
        print(f"\n=== {title}\n$ {' '.join(_quote(word) for word in shown or command)}", flush=True)
        started = time.perf_counter()
        done = subprocess.run(list(command), cwd=self.root, check=False)
        self.seconds[title] = time.perf_counter() - started
        if done.returncode:
            raise DemoError(f"the step '{title}' failed with exit code {done.returncode}; its output is above")

    def finish(self, metrics: Mapping[str, float], notes: Sequence[str]) -> None:
        """Write ``metrics.json`` and print the notes, the times and, as the last lines, the metric table.

        Args:
            metrics: value by name, in the order of the table.
            notes: lines about what was written and what to do next.
        """
        clean = {k: None if math.isnan(v) else v for k, v in metrics.items()}
        write_atomically(self.out / "metrics.json", (json.dumps(clean, indent=1) + "\n").encode())
        print("\n=== done in " + f"{sum(self.seconds.values()):.0f} s: ", end="")
        print(", ".join(f"{title} {seconds:.0f} s" for title, seconds in self.seconds.items()))
        print("\n".join(notes) + "\n")
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.4f}")


def _quote(word: str) -> str:
    # A list of configs reads best in double quotes, as in the documentation.
    return f'"{word}"' if "'" in word and '"' not in word else shlex.quote(word)
