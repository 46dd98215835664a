from __future__ import annotations

import pytest
import torch
from monai.data import CacheDataset
from monai.transforms import Compose, RandGaussianNoised, ToTensord

from medseg.training.loader import SeededDataLoader


def dataset(items: int = 7) -> CacheDataset:
    transform = Compose([ToTensord("image"), RandGaussianNoised("image", prob=1.0)])
    data = [{"image": torch.full((1, 4, 4), float(i)), "index": i} for i in range(items)]
    return CacheDataset(data, transform, progress=False, copy_cache=True)


def epoch(loader: SeededDataLoader, number: int) -> tuple[list[int], torch.Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return [int(i) for b in batches for i in b["index"]], torch.cat([b["image"].as_tensor() for b in batches])


def test_every_item_once_and_the_last_batch_filled_up():
    order, images = epoch(SeededDataLoader(dataset(7), batch_size=4), 0)
    assert len(order) == 8
    assert set(order) == set(range(7))
    assert images.shape == (8, 1, 4, 4)


def test_an_epoch_depends_on_seed_and_epoch_alone():
    first = SeededDataLoader(dataset(), batch_size=2, seed=1)
    epochs = [epoch(first, e) for e in range(3)]
    assert epochs[0][0] != epochs[1][0]
    # resumed: a new loader that starts at epoch 2 sees what the first saw there
    order, images = epoch(SeededDataLoader(dataset(), batch_size=2, seed=1), 2)
    assert order == epochs[2][0]
    torch.testing.assert_close(images, epochs[2][1])
    assert epoch(SeededDataLoader(dataset(), batch_size=2, seed=2), 2)[0] != order


def test_augmentation_differs_between_epochs_and_repeats():
    loader = SeededDataLoader(dataset(1), batch_size=4)
    _, images = epoch(loader, 0)
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images, epoch(loader, 1)[1])


def test_workers_change_nothing():
    order, images = epoch(SeededDataLoader(dataset(), batch_size=2, num_workers=2), 1)
    expected = epoch(SeededDataLoader(dataset(), batch_size=2), 1)
    assert order == expected[0]
    torch.testing.assert_close(images, expected[1])


def test_processes_share_an_epoch(monkeypatch):
    from medseg.training import loader as module

    seen = []
    for rank in range(2):
        monkeypatch.setattr(module._EpochSampler, "_share", lambda self, rank=rank: (rank, 2))
        loader = SeededDataLoader(dataset(7), batch_size=2)
        order, _ = epoch(loader, 0)
        assert len(order) == len(loader) * 2 == 4
        seen += order
    assert set(seen) == set(range(7))


def test_an_order_of_ones_own_comes_batch_after_batch(monkeypatch):
    from medseg.training import loader as module

    class Pairs:
        """Batches of two equal items."""

        def __len__(self) -> int:
            return 8

        def __call__(self, generator: torch.Generator) -> list[int]:
            return torch.randperm(7, generator=generator)[:4].repeat_interleave(2).tolist()

    seen = []
    for rank in range(2):
        monkeypatch.setattr(module._EpochSampler, "_share", lambda self, rank=rank: (rank, 2))
        order, _ = epoch(SeededDataLoader(dataset(7), batch_size=2, order=Pairs()), 0)
        assert order[::2] == order[1::2], "a batch stays together"
        seen += order[::2]
    assert len(set(seen)) == 4, "each process has its own batches"


def test_bad_arguments():
    with pytest.raises(ValueError, match="empty"):
        SeededDataLoader(dataset(0))
    with pytest.raises(ValueError, match="batch_size is 0"):
        SeededDataLoader(dataset(), batch_size=0)
