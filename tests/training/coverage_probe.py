"""A Lightning callback that writes down which images each process trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl


class CoverageProbe(pl.Callback):
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        file = self.folder / f"epoch{trainer.current_epoch}-rank{trainer.global_rank}.txt"
        with file.open("a") as out:
            out.writelines(f"{path}\n" for path in batch["image"].meta["filename_or_obj"])
