"""The Lightning module of every segmentation bundle: network, loss, optimizer, inferers, metrics from the config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytorch_lightning as pl
import torch
from monai.data import decollate_batch
from torch import distributed, nn
from torch.nn import functional

from medseg.calibration import reliability_bins
from medseg.metrics import summarise
from medseg.training.transfer import frozen_children

Metric = Callable[[Any, Any], float]

__all__ = ["Case", "SegmentationModule", "all_gathered", "plain_tensor"]


@dataclass
class Case:
    """Result of one case.

    Attributes:
        image: path of its image.
        metrics: value by metric name, ``nan`` where undefined.
        empty_prediction: whether nothing was segmented.
        empty_truth: whether there was nothing to segment.
        fields: the item's other fields, e.g. ``style`` or ``patient``.
        masks: prediction and truth, if they were asked for, as packed bits with their shape.
        part: the part of the data list that the case was scored for.
        reliability: (3, bins) of its pixels from :func:`medseg.calibration.reliability_bins`, if there is a
            probability.
        overlay: file name of its overlay, if one is drawn.
    """

    image: str
    metrics: dict[str, float]
    empty_prediction: bool
    empty_truth: bool
    fields: dict[str, Any] = field(default_factory=dict)
    masks: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], tuple[int, ...]] | None = None
    part: str = ""
    reliability: npt.NDArray[np.float64] | None = None
    overlay: str = ""

    def row(self) -> dict[str, Any]:
        """The case as one row of a table."""
        return {
            "image": self.image,
            **self.fields,
            **self.metrics,
            "empty_prediction": self.empty_prediction,
            "empty_truth": self.empty_truth,
            **({"overlay": self.overlay} if self.overlay else {}),
        }

    def unpacked(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Prediction and truth as boolean arrays, axes as in the network: (W, H) of a 2D image."""
        if self.masks is None:
            raise ValueError(f"the masks of {self.image} were not kept; set keep_masks before scoring")
        *packed, shape = self.masks
        count = int(np.prod(shape))
        pred, truth = (np.unpackbits(p, count=count).astype(bool).reshape(shape) for p in packed)
        return pred, truth


class SegmentationModule(pl.LightningModule):
    """Trains and validates one segmentation network.

    Children of the network without any trainable parameter are kept in ``eval()`` while the rest trains: in transfer
    mode the frozen encoder's batch-norm statistics must not move.

    Args:
        network: maps images (B, C, ...) to logits (B, K, ...).
        loss: of logits and labels.
        optimizer: over the network's trainable parameters.
        train_inferer: called with images and network in training.
        val_inferer: called with images and network in validation and test, e.g. a sliding window.
        postprocessing: from one decollated item with logits under ``pred`` to a mask under ``pred``.
        metrics: functions of two boolean masks of one case, by name.
        lr_scheduler: a scheduler, or Lightning's dictionary with ``scheduler`` and ``interval``.
        channels_last: memory format of the network; convolutions are faster with it, attention is not.
        probability_key: where ``postprocessing`` leaves the probability that the mask was cut from, for the
            calibration; ``None`` if the output is none.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_inferer: Callable[..., Any],
        val_inferer: Callable[..., Any],
        postprocessing: Callable[[Any], Any],
        metrics: Mapping[str, Metric],
        lr_scheduler: Any = None,
        channels_last: bool = False,
        probability_key: str | None = "probability",
    ) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.train_inferer, self.val_inferer = train_inferer, val_inferer
        self.postprocessing, self.metrics = postprocessing, dict(metrics)
        self._optimizer, self._scheduler = optimizer, lr_scheduler
        self._channels_last = channels_last
        if channels_last:
            volumes = any(parameter.ndim == 5 for parameter in network.parameters())
            self.network.to(memory_format=torch.channels_last_3d if volumes else torch.channels_last)
        self.probability_key = probability_key
        self.keep_masks = False
        self.cases: list[Case] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, ...) of images (B, C, ...)."""
        logits: torch.Tensor = self.network(images)
        return logits

    def train(self, mode: bool = True) -> SegmentationModule:
        """Switch to training or evaluation; frozen children stay in evaluation."""
        super().train(mode)
        for child in frozen_children(self.network):
            child.eval()
        return self

    def configure_optimizers(self) -> Any:
        """The optimizer of the config, with its scheduler if there is one."""
        if self._scheduler is None:
            return self._optimizer
        return {"optimizer": self._optimizer, "lr_scheduler": self._scheduler}

    def on_train_epoch_start(self) -> None:
        """Put everything but the frozen children into training mode; Lightning leaves the modes to the module."""
        self.train()

    def on_train_epoch_end(self) -> None:
        """Stop a training that diverged, before its weights become the last checkpoint."""
        loss = self.trainer.callback_metrics.get("train_loss")
        if loss is not None and not torch.isfinite(loss):
            raise ValueError(
                f"the training loss of epoch {self.current_epoch + 1} is {float(loss)}: lower --learning_rate, or look "
                "for NaN in the images; --resume True continues from the epoch before"
            )

    def in_memory_format(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, ...) as the network's weights lie in memory."""
        if not self._channels_last or images.ndim not in (4, 5):
            return images.contiguous()
        return images.contiguous(memory_format=torch.channels_last if images.ndim == 4 else torch.channels_last_3d)

    def training_step(self, batch: Mapping[str, Any], _: int) -> torch.Tensor:
        """Loss of one batch with ``image`` (B, C, ...) and ``label`` (B, K, ...)."""
        images, labels = (plain_tensor(batch[k]) for k in ("image", "label"))
        logits = self.train_inferer(self.in_memory_format(images), self.network)
        loss: torch.Tensor = self.loss(logits, labels)
        self.log(
            "train_loss", loss, on_epoch=True, on_step=False, batch_size=len(images), prog_bar=True, sync_dist=True
        )
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the last epoch's cases."""
        self.cases = []

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        """Score the cases of one batch in their own size."""
        self._score(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Gather the cases of all processes and log their means."""
        self._log_means("val")

    def on_test_epoch_start(self) -> None:
        """Forget earlier cases."""
        self.cases = []

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As :meth:`validation_step`."""
        self._score(batch, "test")

    def on_test_epoch_end(self) -> None:
        """As :meth:`on_validation_epoch_end`."""
        self._log_means("test")

    def _score(self, batch: dict[str, Any], stage: str) -> None:
        batch["pred"] = self.val_inferer(batch["image"], self.network).float()
        logits, labels = plain_tensor(batch["pred"]), plain_tensor(batch["label"])
        if logits.shape[2:] != labels.shape[2:]:  # the mask has the image's own size, the network may see another
            mode = "bilinear" if logits.ndim == 4 else "trilinear"
            logits = functional.interpolate(logits, labels.shape[2:], mode=mode)
        self.log(f"{stage}_loss", self.loss(logits, labels), batch_size=len(labels), sync_dist=True)
        for item in decollate_batch(batch):
            self.cases.append(self._case(self.postprocessing(item)))

    def _case(self, item: Mapping[str, Any]) -> Case:
        pred, truth = (plain_tensor(item[k])[0].cpu().numpy() > 0.5 for k in ("pred", "label"))
        known = ("image", "label", "pred", self.probability_key, "fold", "part")
        masks = (np.packbits(pred), np.packbits(truth), pred.shape) if self.keep_masks else None
        return Case(
            image=str(item["image"].meta["filename_or_obj"]),
            metrics=self._mask_metrics(item, pred, truth),
            empty_prediction=not pred.any(),
            empty_truth=not truth.any(),
            fields={k: v for k, v in item.items() if k not in known and isinstance(v, (str, int, float))},
            masks=masks,
            part=str(item.get("part", "")),
            reliability=self._reliability(item, truth),
        )

    def _mask_metrics(
        self, item: Mapping[str, Any], pred: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
    ) -> dict[str, float]:
        """Every metric of one case, from its masks."""
        return {name: float(metric(pred, truth)) for name, metric in self.metrics.items()}

    def _reliability(self, item: Mapping[str, Any], truth: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64] | None:
        if not self.keep_masks or self.probability_key is None or self.probability_key not in item:
            return None  # an epoch's validation has no use for it
        return reliability_bins(plain_tensor(item[self.probability_key])[0].cpu().numpy(), truth)

    def write_details(self, folder: Path, cases: list[Case]) -> None:
        """Write what a part's table of cases has no room for; nothing for masks."""

    def _gather_cases(self) -> None:
        """Bring the cases of all processes together."""
        gathered = all_gathered(self.cases)
        if len(gathered) > 1:  # a distributed sampler repeats cases to fill the last round: every case counts once
            self.cases = list({(c.part, c.image): c for cases in gathered for c in cases}.values())

    def _log_means(self, stage: str) -> None:
        self._gather_cases()
        for name in self.metrics:
            mean = summarise([c.metrics[name] for c in self.cases])["mean"]
            # all processes hold the same mean by now; saying so keeps Lightning from doubting it
            self.log(f"{stage}_{name}", mean, prog_bar=name == next(iter(self.metrics)), sync_dist=True)


def all_gathered(value: Any) -> list[Any]:
    """The value that each process has, in the order of their ranks; of a single process a list of one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    gathered: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, value)
    return gathered


def plain_tensor(value: Any) -> torch.Tensor:
    """A plain tensor: MONAI's MetaTensor makes every small operation many times slower."""
    tensor: torch.Tensor = value.as_tensor() if hasattr(value, "as_tensor") else value
    return tensor
