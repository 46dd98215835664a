"""A data loader whose epochs depend on the seed and the epoch alone.

The order of the items and every random transform are drawn from (seed, epoch, position). So a resumed run sees what
an uninterrupted one would have seen, and the number of workers or processes changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from monai.data import DataLoader
from torch import distributed
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

Draw = tuple[int, int, int]  # (epoch, position in the epoch, item)

__all__ = ["Order", "SeededDataLoader"]


class SeededDataLoader(DataLoader):
    """A MONAI ``DataLoader`` for training: shuffled, full batches, reproducible epoch by epoch.

    The last batch is filled up with items from the start of the epoch's order (a batch of one breaks batch norm).
    Under DDP every process gets every so-many-th batch of the same order.

    Args:
        dataset: a MONAI dataset with a ``transform`` that has ``set_random_state``.
        batch_size: items per batch and process.
        seed: seed of order and augmentation.
        num_workers: worker processes.
        order: draws the items of an epoch; a permutation of all by default.
        kwargs: further arguments of the ``DataLoader``.

    Raises:
        ValueError: if the dataset is empty or the batch size is below 1.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int = 1,
        seed: int = 0,
        num_workers: int = 0,
        order: Order | None = None,
        **kwargs: Any,
    ) -> None:
        if len(dataset) == 0:  # type: ignore[arg-type]
            raise ValueError("the training data set is empty")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        seeded = _SeededDataset(dataset, seed)
        super().__init__(
            seeded,
            num_workers=num_workers,
            batch_size=batch_size,
            sampler=_EpochSampler(seeded, batch_size, seed, order or _Permutation(len(seeded))),
            persistent_workers=num_workers > 0,
            **kwargs,
        )


class Order(Protocol):
    """What an epoch consists of: indices of items, batch after batch."""

    def __len__(self) -> int: ...

    def __call__(self, generator: torch.Generator) -> list[int]:
        """Draw an epoch."""
        ...


@dataclass(frozen=True)
class _Permutation:
    items: int

    def __len__(self) -> int:
        return self.items

    def __call__(self, generator: torch.Generator) -> list[int]:
        return torch.randperm(self.items, generator=generator).tolist()


class _EpochSampler(DistributedSampler[Draw]):
    """Draws an order per epoch; Lightning calls ``set_epoch`` before each.

    Being a ``DistributedSampler`` it is left in place under DDP, where Lightning replaces any other kind.
    """

    def __init__(self, dataset: _SeededDataset, batch_size: int, seed: int, order: Order) -> None:
        super().__init__(dataset, num_replicas=1, rank=0, seed=seed)
        self.order, self.batch_size = order, batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def _share(self) -> tuple[int, int]:
        ready = distributed.is_available() and distributed.is_initialized()
        return (distributed.get_rank(), distributed.get_world_size()) if ready else (0, 1)

    def __len__(self) -> int:
        step = self.batch_size * self._share()[1]
        return -(-len(self.order) // step) * self.batch_size

    def __iter__(self) -> Iterator[Draw]:
        rank, world = self._share()
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        order = self.order(generator)
        for batch in range(rank * self.batch_size, len(self) * world, world * self.batch_size):
            for position in range(batch, batch + self.batch_size):
                yield self.epoch, position, order[position % len(order)]


class _SeededDataset(Dataset[Any]):
    """Sets the random state of the transforms before each item."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.transform = getattr(dataset, "transform", None)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Draw) -> Any:
        epoch, position, item = draw
        if self.transform is not None:
            self.transform.set_random_state(seed=_mix(self.seed, epoch, position))
        return self.dataset[item]


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
