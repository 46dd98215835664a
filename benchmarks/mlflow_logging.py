"""What recording in MLflow (SQLite) costs per training step: medseg's recorder against Lightning's own logger.

A tiny network is fitted by Lightning: without logging, with medseg's recorder (one batch per epoch, from a thread of
its own) and with Lightning's logger at every 50th and at every step. Opening and closing the run is part of each fit.
Then again, without logging and with the recorder, with steps that work for about ``--step-ms``.
"""

from __future__ import annotations

import logging
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from mlflow import MlflowClient
from pytorch_lightning.loggers import MLFlowLogger
from race import Result, arguments, prepare, print_table, race
from torch.utils.data import DataLoader

from medseg.tracking.recorder import MLflowRecorder


@dataclass(frozen=True)
class Fit:
    """One candidate: who logs, how long it runs, and how much its steps work besides the tiny network."""

    logger: str | None  # medseg | Lightning | None
    steps: int  # per epoch
    epochs: int
    every: int = 0  # Lightning: log_every_n_steps
    products: int = 0  # matrix products per step

    @property
    def total(self) -> int:
        return self.steps * self.epochs

    @property
    def records(self) -> int:
        """How many values of the loss it leaves in the store."""
        return {"medseg": self.epochs, "Lightning": self.total // max(self.every, 1), None: 0}[self.logger]

    @property
    def name(self) -> str:
        every = "every step" if self.every == 1 else f"every {self.every} steps"
        what = {"medseg": "medseg, every epoch", "Lightning": f"Lightning, {every}", None: "none"}[self.logger]
        return what + (", long steps" if self.products else "")


class Tiny(pl.LightningModule):
    """One convolution."""

    def __init__(self, fit: Fit) -> None:
        super().__init__()
        self.network = torch.nn.Conv2d(1, 1, 3, padding=1)
        self.fit = fit
        self.matrix = torch.eye(512)

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        _work(self.matrix, self.fit.products)
        loss: torch.Tensor = (self.network(batch["image"]) - batch["label"]).square().mean()
        each = self.fit.logger == "Lightning"
        self.log("train_loss", loss, on_step=each, on_epoch=not each, batch_size=len(batch["image"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=200, help="short steps per epoch")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of short steps")
    parser.add_argument("--step-ms", type=float, default=100, help="milliseconds of work in a long step")
    parser.add_argument("--long-steps", type=int, default=50, help="long steps per epoch")
    parser.add_argument("--long-epochs", type=int, default=4, help="epochs of long steps")
    options = parser.parse_args()
    prepare(options.threads)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    short = Fit(None, options.steps, options.epochs)
    few = Fit(None, steps=min(100, options.steps), epochs=1)
    long = Fit(None, options.long_steps, options.long_epochs, products=_products(options.step_ms))
    groups = [
        [short, replace(short, logger="medseg"), replace(short, logger="Lightning", every=50)],
        [few, replace(few, logger="Lightning", every=1)],
        [long, replace(long, logger="medseg")],
    ]
    fits = [fit for group in groups for fit in group]
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "mlflow.db"
        started = time.perf_counter()
        MlflowClient(f"sqlite:///{store}").search_experiments()
        created = time.perf_counter() - started
        _check([replace(fit, products=0) for fit in fits], store)
        candidates: dict[Fit, Callable[[], object]] = {fit: partial(_fit, fit, store) for fit in fits}
        results = race(candidates, options.rounds)
    rows = [_row(fit, results[fit], results[group[0]], options.step_ms) for group in groups for fit in group]
    rows.append(["creating the database (once)", "", f"{1000 * created:.0f} in all", "", "", ""])
    share = f"share of the time with {options.step_ms:.0f} ms steps"
    print_table(["logging", "steps", "wall ms/step", "CPU ms/step", "wall ms/step of logging", share], rows)


def _fit(fit: Fit, store: Path) -> float:
    """Train; returns the last loss."""
    uri, folder = f"sqlite:///{store}", tempfile.mkdtemp(dir=store.parent)
    recorder = MLflowRecorder(uri, "benchmark", folder) if fit.logger == "medseg" else None
    place = (Path(folder) / "artifacts").as_uri()
    logger = MLFlowLogger("benchmark", tracking_uri=uri, artifact_location=place) if fit.logger == "Lightning" else None
    trainer = pl.Trainer(
        max_epochs=fit.epochs,
        logger=logger or False,
        callbacks=[recorder] if recorder else [],
        log_every_n_steps=fit.every,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    batch = {"image": torch.rand(4, 1, 32, 32), "label": torch.rand(4, 1, 32, 32)}
    trainer.fit(Tiny(fit), DataLoader([batch] * fit.steps, batch_size=None))
    if recorder:
        recorder.on_run_end("FINISHED")  # waits until everything is in the store
    return float(trainer.callback_metrics["train_loss"])


def _check(fits: list[Fit], store: Path) -> None:
    """Every fit leaves the records it should."""
    for fit in fits:
        before = _records(store)
        _fit(fit, store)
        written = _records(store) - before
        if written != fit.records:
            raise RuntimeError(f"{fit.name} wrote {written} losses, not {fit.records}")


def _records(store: Path) -> int:
    with sqlite3.connect(store) as database:
        return int(database.execute("SELECT COUNT(*) FROM metrics WHERE key = 'train_loss'").fetchone()[0])


def _work(matrix: torch.Tensor, products: int) -> None:
    for _ in range(products):
        torch.mm(matrix, matrix)


def _products(milliseconds: float) -> int:
    """How many products of :func:`_work` take that long."""
    matrix = torch.eye(512)
    _work(matrix, 50)
    started = time.process_time()
    _work(matrix, 200)
    return max(1, round(milliseconds / 1000 / ((time.process_time() - started) / 200)))


def _row(fit: Fit, result: Result, base: Result, step_ms: float) -> list[str]:
    wall, cpu = 1000 * result.wall / fit.total, 1000 * result.cpu / fit.total
    extra = 1000 * (result.wall - base.wall) / fit.total
    if fit.logger is None:
        return [fit.name, str(fit.total), f"{wall:.2f}", f"{cpu:.2f}", "", ""]
    share = extra / wall if fit.products else extra / (extra + step_ms)
    return [fit.name, str(fit.total), f"{wall:.2f}", f"{cpu:.2f}", f"{extra:.2f}", f"{share:.2%}"]


if __name__ == "__main__":
    main()
