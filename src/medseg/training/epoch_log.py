"""One plain line per epoch in a log file, and on the console where no progress bar is shown."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

log = logging.getLogger(__name__)

__all__ = ["EpochLog", "epoch_metrics"]


def epoch_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """The metrics of the epoch that ends: Lightning keeps old validation scores through epochs without validation."""
    validated = (trainer.current_epoch + 1) % trainer.check_val_every_n_epoch == 0
    return {k: float(v) for k, v in trainer.callback_metrics.items() if validated or not k.startswith("val_")}


class EpochLog(pl.Callback):
    """Appends ``time epoch k/n name=value ...`` to a file after every epoch.

    Args:
        path: the log file; a resumed run appends to it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._started = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the epoch's clock."""
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the epoch's line."""
        if not trainer.is_global_zero:
            return
        values = " ".join(f"{k}={float(v):.4f}" for k, v in sorted(epoch_metrics(trainer).items()))
        seconds = time.perf_counter() - self._started
        line = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs} {values} seconds={seconds:.1f}"
        if trainer.progress_bar_callback is None:
            log.info(line)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        except OSError as error:  # a full disk must not end the training over a log line
            log.warning("%s could not be written: %s", self.path, error)
