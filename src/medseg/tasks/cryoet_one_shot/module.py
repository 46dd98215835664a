"""How COS-Net trains and is scored: episodes for the match, and every subtomogram's mask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import decollate_batch

from medseg.metrics import dice
from medseg.tasks.cryoet_one_shot.episodes import EpisodeOrder, NWayAccuracy
from medseg.tasks.cryoet_one_shot.losses import EpisodeLoss
from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.tasks.cryoet_one_shot.refine import MaskRefiner
from medseg.training.module import Case, SegmentationModule, all_gathered, plain_tensor

#: Metric by this name: Dice of the mask before the CRF.
WITHOUT_CRF = "dice_without_crf"

__all__ = ["OneShotModule"]


class OneShotModule(SegmentationModule):
    """A :class:`SegmentationModule` that learns to match as well.

    Args:
        episodes: how a training batch is made up.
        refine: the CRF; it refines the masks of a finished training and of an evaluation, not those of every epoch's
            validation. ``None`` for none.
        threshold: on the probability, for the mask without the CRF.
        kwargs: as of :class:`SegmentationModule`. Among ``metrics`` may be :class:`NWayAccuracy`; ``loss`` is an
            :class:`~medseg.tasks.cryoet_one_shot.losses.EpisodeLoss`. Without a decoder the masks' metrics are ``nan``.
    """

    network: COSNet
    loss: EpisodeLoss
    metrics: dict[str, Any]

    def __init__(
        self, *, episodes: EpisodeOrder, refine: MaskRefiner | None = None, threshold: float = 0.5, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.episodes, self.refine, self.threshold = episodes, refine, threshold
        self.probability_key = self.probability_key if self.network.decoder is not None else None  # of the masks
        if self.refine is not None:
            self.refine.requires_grad_(False)  # fitted when the training has ended, see fit_crf.py
        self._features: dict[tuple[str, str], npt.NDArray[np.float32]] = {}

    def training_step(self, batch: Mapping[str, Any], _: int) -> torch.Tensor:
        """Loss of a batch of episodes with ``image`` and ``label`` (V, 1, D, H, W) in the order of ``episodes``."""
        volumes, masks = (plain_tensor(batch[k]) for k in ("image", "label"))
        features, logits = self.network.embed(self.in_memory_format(volumes))
        shots, ways = self.episodes.k_shot, self.episodes.n_way
        by_class = features.view(-1, shots + 1, ways, features.shape[-1])
        scores = self.network.match(by_class[:, :shots].mean(dim=1), by_class[:, shots])
        loss: torch.Tensor = self.loss(scores, logits, masks)
        options: dict[str, Any] = {"on_epoch": True, "on_step": False, "batch_size": len(volumes), "sync_dist": True}
        self.log("train_loss", loss, prog_bar=True, **options)
        correct = scores.argmax(dim=-1) == torch.arange(ways, device=scores.device)
        self.log("train_accuracy", correct.float().mean(), prog_bar=True, **options)
        return loss

    def _score(self, batch: dict[str, Any], stage: str) -> None:
        volumes, masks = (plain_tensor(batch[k]) for k in ("image", "label"))
        features, logits = self.network.embed(self.in_memory_format(volumes))
        if logits is None:
            logits = torch.full_like(volumes, -torch.inf)
        else:
            logits = logits.float()
            self.log(f"{stage}_loss", self.loss.mask_loss(logits, masks), batch_size=len(masks), sync_dist=True)
        batch["without_crf"] = logits.sigmoid()
        if self.refine is not None and self.keep_masks and self.network.decoder is not None:
            logits = torch.logit(self.refine(logits.sigmoid(), volumes), eps=1e-6)
        batch["pred"] = logits
        self._collect(batch, features.float().cpu().numpy())

    def _collect(self, batch: dict[str, Any], features: npt.NDArray[np.float32]) -> None:
        for item, feature in zip(map(self.postprocessing, decollate_batch(batch)), features, strict=True):
            case = self._case(item)
            case.fields["true_voxels"] = int(plain_tensor(item["label"]).sum())
            case.fields["found_voxels"] = int((plain_tensor(item["pred"]) > 0.5).sum())
            self.cases.append(case)
            self._features[case.part, case.image] = feature

    def _mask_metrics(
        self, item: Mapping[str, Any], pred: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]
    ) -> dict[str, float]:
        metrics = dict.fromkeys(self.metrics, float("nan"))  # the accuracies wait for the other cases
        if self.network.decoder is not None:
            masks = {n: m for n, m in self.metrics.items() if not isinstance(m, NWayAccuracy)}
            metrics |= {name: float(metric(pred, truth)) for name, metric in masks.items()}
            if WITHOUT_CRF in metrics:
                metrics[WITHOUT_CRF] = dice(plain_tensor(item["without_crf"])[0].cpu().numpy() >= self.threshold, truth)
        return metrics

    def _gather_cases(self) -> None:
        super()._gather_cases()
        features = {case: feature for part in all_gathered(self._features) for case, feature in part.items()}
        self._features = {}
        for part in dict.fromkeys(c.part for c in self.cases):
            self._score_matches([c for c in self.cases if c.part == part], features)

    def _log_means(self, stage: str) -> None:
        super()._log_means(stage)
        self._require_a_choice(stage)

    def _require_a_choice(self, stage: str) -> None:
        """Stop a training whose checkpoint would be chosen by an accuracy that no validation case has."""
        monitor = str(getattr(self.trainer.checkpoint_callback, "monitor", "")).removeprefix("val_")
        metric = self.metrics.get(monitor)
        if stage != "val" or not isinstance(metric, NWayAccuracy) or metric.by == "found_voxels":
            return
        if all(np.isnan(case.metrics[monitor]) for case in self.cases):
            counts = Counter(str(case.fields["class"]) for case in self.cases)
            raise ValueError(
                f"{monitor}, which chooses the checkpoint, is undefined for every validation case: it needs "
                f"{metric.n_way} classes and {metric.k_shot + 1} volumes of a class, and the fold has "
                f"{', '.join(f'{c} ({n})' for c, n in counts.items())}; use fewer folds, or --validate::key_metric dice"
            )

    def _score_matches(self, cases: list[Case], features: Mapping[tuple[str, str], npt.NDArray[np.float32]]) -> None:
        """Fill in the accuracies of the cases of one part."""
        classes = [str(c.fields["class"]) for c in cases]
        vectors = torch.from_numpy(np.stack([features[c.part, c.image] for c in cases])).to(self.device)
        for name, metric in self.metrics.items():
            if not isinstance(metric, NWayAccuracy):
                continue
            if metric.by == "features":
                values = metric(vectors, classes, self.network.match)
            elif metric.by == "found_voxels" and self.network.decoder is None:
                continue
            else:
                sizes = torch.tensor([[float(c.fields[metric.by])] for c in cases]).clamp(min=1).log()
                values = metric(sizes, classes, lambda support, target: -(target - support).abs().transpose(-1, -2))
            for case, value in zip(cases, values.tolist(), strict=True):
                case.metrics[name] = value
