"""The trainer and the evaluator that bundle configs run: ``$@train::trainer.run()``."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from medseg.bundles.running import merged_config, running_parser
from medseg.interruption import ended_by_signals
from medseg.training.checkpoint import load_weights, save_weights
from medseg.training.module import SegmentationModule
from medseg.training.results import (
    Draw,
    by_file_name,
    by_part,
    draw_case,
    table,
    typical_cases,
    worst_first,
    write_overlays,
    write_results,
)
from medseg.training.run_folder import (
    check_resumed_config,
    claim_run_folder,
    run_lock,
    write_config,
    write_run_configs,
    write_status,
)

log = logging.getLogger(__name__)

__all__ = ["Evaluator", "Trainer"]


class Trainer(pl.Trainer):
    """A Lightning trainer that knows its module and its data, so that a bundle runs it like any MONAI trainer.

    Args:
        module: what to train.
        train_dataloader: training batches.
        val_dataloader: validation cases; they choose the checkpoint.
        test_dataloader: cases to score with the best weights when the training has ended, each with its ``part``
            (see :func:`medseg.io.datalist.scored_items`); empty or ``None`` for none.
        output_dir: the run's folder (see :mod:`medseg.training.run_folder`).
        bundle_root: the bundle's folder.
        resume: continue the run in ``output_dir`` from its last checkpoint.
        handlers: Lightning callbacks. MONAI Label may add a ``CheckpointLoader``: its weights are loaded. Other
            Ignite handlers are ignored with a warning.
        draw: gives the overlay of a case.
        kwargs: further arguments of ``pytorch_lightning.Trainer``.

    Raises:
        FileExistsError: if ``output_dir`` holds a run and ``resume`` is false.
        FileNotFoundError: if ``resume`` is true and there is nothing to resume.
    """

    def __init__(
        self,
        *,
        module: SegmentationModule,
        train_dataloader: Any,
        val_dataloader: Any,
        output_dir: str,
        bundle_root: str,
        test_dataloader: Any = None,
        resume: bool = False,
        handlers: Iterable[Any] = (),
        draw: Draw = draw_case,
        **kwargs: Any,
    ) -> None:
        super().__init__(callbacks=_callbacks(handlers), **_defaults(kwargs))
        self._module, self._loaders, self._tested = module, (train_dataloader, val_dataloader), test_dataloader
        if not isinstance(resume, bool):  # on a command line `false` is a word, and words are true
            raise ValueError(f"--resume is {resume!r}; pass True or False")
        self._folder, self._bundle_root, self.resumed = Path(output_dir), Path(bundle_root), resume
        self._draw = draw
        self._parser = running_parser()

    @property
    def network(self) -> torch.nn.Module:
        """The network that is trained."""
        return self._module.network

    def run(self) -> None:
        """Train, then score the best weights on the validation cases and write everything into the run's folder."""
        with run_lock(self._folder) if self.is_global_zero else nullcontext():
            self._train_and_score()

    def _train_and_score(self) -> None:
        # Under DDP only the first process touches the folder; Lightning tells the others where the checkpoints are.
        last = claim_run_folder(self._folder, self.resumed) if self.is_global_zero or self.resumed else None
        if self._parser is not None and self.is_global_zero:
            config = merged_config(self._parser)
            if self.resumed:
                check_resumed_config(self._folder, config)
            else:
                write_run_configs(self._folder, config, self._bundle_root)
        with ended_by_signals(), _recorded(self, self._folder):
            self.fit(self._module, *self._loaders, ckpt_path=last, weights_only=True)
            self._finish()

    def _finish(self) -> None:
        best = getattr(self.checkpoint_callback, "best_model_path", "")
        if best and Path(best).is_file():
            load_weights(self._module.network, best)
        else:
            log.warning("no best checkpoint (%s): the last weights are kept instead", best or "nothing was validated")
        if self.is_global_zero:
            save_weights(self._module.network, self._folder / "models" / "model.pt")
        self._module.keep_masks = True
        self.validate(self._module, self._loaders[1], verbose=False)
        if self.is_global_zero:
            cases = self._module.cases
            summary = write_results(self._folder, cases)
            self._module.write_details(self._folder, cases)
            pictures = write_overlays(self._folder / "overlays", typical_cases(cases), self._draw)
            _tell(self, "on_results", self._folder, "best_val", cases, summary, pictures)
            log.info("best weights: %s", self._folder / "models" / "model.pt")
        if self._tested is not None and len(self._tested):
            _score_parts(self, self._module, self._tested, self._folder / "evaluation", self._draw)


class Evaluator(pl.Trainer):
    """Scores a network on parts of a data list.

    Args:
        module: with the network to score.
        dataloader: its cases, each with its ``part`` (see :func:`medseg.io.datalist.scored_items`).
        output_dir: where ``PART/per_image.csv``, ``PART/metrics.json`` and ``PART/overlays/`` go.
        ckpt_path: where the weights came from, for the record.
        handlers: as in :class:`Trainer`.
        draw: as in :class:`Trainer`.
        kwargs: further arguments of ``pytorch_lightning.Trainer``.
    """

    def __init__(
        self,
        *,
        module: SegmentationModule,
        dataloader: Any,
        output_dir: str,
        ckpt_path: str | None = None,
        handlers: Iterable[Any] = (),
        draw: Draw = draw_case,
        **kwargs: Any,
    ) -> None:
        super().__init__(callbacks=_callbacks(handlers), **_defaults(kwargs))
        self._module, self._loader = module, dataloader
        self._folder, self._draw = Path(output_dir), draw
        self._parser = running_parser()
        self.ckpt_path_for_record = ckpt_path

    @property
    def network(self) -> torch.nn.Module:
        """The network that is scored."""
        return self._module.network

    def run(self) -> dict[str, Any]:
        """Score every case and write tables and overlays.

        Returns:
            What ``metrics.json`` holds, by part.
        """
        if self._parser is not None and self.is_global_zero:
            write_config(self._folder / "configs" / "evaluate.yaml", merged_config(self._parser))
        lock = run_lock(self._folder) if self.is_global_zero else nullcontext()
        with lock, ended_by_signals(), _recorded(self, self._folder):
            return _score_parts(self, self._module, self._loader, self._folder, self._draw)


def _score_parts(
    trainer: pl.Trainer, module: SegmentationModule, loader: Any, folder: Path, draw: Draw
) -> dict[str, Any]:
    """Score the cases of a loader and write each part's tables and overlays to ``folder / part``."""
    module.keep_masks = True
    trainer.test(module, loader, verbose=False)
    summaries: dict[str, Any] = {}
    if not trainer.is_global_zero:
        return summaries
    for part, cases in by_part(module.cases).items():
        named = by_file_name(worst_first(cases))  # MLflow gets the first ones: those worth looking at
        for name, case in named.items():
            case.overlay = f"{name}.png"
        where = folder / part
        summaries[part] = write_results(where, cases)
        module.write_details(where, cases)
        pictures = write_overlays(where / "overlays", named, draw)
        _tell(trainer, "on_results", where, part, cases, summaries[part], pictures)
        log.info("scores of the %s part\n%s", part, table(summaries[part]))
        log.info("per image: %s   overlays: %s", where / "per_image.csv", where / "overlays")
    return summaries


def _callbacks(handlers: Iterable[Any]) -> list[pl.Callback]:
    callbacks = []
    for handler in handlers or ():
        if isinstance(handler, pl.Callback):
            callbacks.append(handler)
        elif hasattr(handler, "load_path") and hasattr(handler, "load_dict"):  # MONAI Label adds a CheckpointLoader
            for target in handler.load_dict.values():
                load_weights(target, handler.load_path)
        else:
            warnings.warn(f"{type(handler).__name__} is no Lightning callback and is ignored", stacklevel=2)
    return callbacks


def _defaults(kwargs: dict[str, Any]) -> dict[str, Any]:
    # Lightning's notes on devices and tips would bury what a run has to say.
    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Said once by claim_run_folder, as an error; and a call inside Lightning that torch wants written otherwise.
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    # SegmentationModule counts a case once that several processes scored.
    warnings.filterwarnings("ignore", message=".*ensure each sample/batch gets evaluated exactly once.*")
    terminal = sys.stdout.isatty()
    return {
        "logger": False,  # the MLflowRecorder callback records, one batch per epoch
        "enable_model_summary": False,
        "enable_progress_bar": terminal,
        "num_sanity_val_steps": 0,
        "deterministic": "warn",  # CUDA has no deterministic bilinear up-sampling; everything else is
        **kwargs,
    }


@contextmanager
def _recorded(trainer: Trainer | Evaluator, folder: Path) -> Iterator[None]:
    """Tell the recorders and the folder how it ended: finished, failed, or killed by a person or a scheduler."""
    status = "FAILED"
    if trainer.is_global_zero:
        write_status(folder, "RUNNING")
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # Lightning turns Ctrl-C into SystemExit
        status = "KILLED"
        if isinstance(trainer, Trainer) and trainer.is_global_zero:
            config = folder / "configs" / "train.yaml"
            log.warning("stopped; continue with: python -m monai.bundle run --config_file %s --resume True", config)
        raise
    finally:
        _tell(trainer, "on_run_end", status)
        if trainer.is_global_zero:
            with suppress(OSError):  # a full disk must not hide why the run ended
                write_status(folder, status)


def _tell(trainer: pl.Trainer, event: str, *args: Any) -> None:
    for callback in trainer.callbacks:
        if hasattr(callback, event) and trainer.is_global_zero:
            getattr(callback, event)(*args)
