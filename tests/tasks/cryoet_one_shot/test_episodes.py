"""Episodes: which volumes a step sees, alone and through the loader, and how n-way accuracy counts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import CacheDataset, MetaTensor, list_data_collate
from monai.transforms import Compose, RandGaussianNoised, ToTensord

from medseg.tasks.cryoet_one_shot.episodes import EpisodeOrder, NWayAccuracy
from medseg.tasks.cryoet_one_shot.losses import EpisodeLoss
from medseg.tasks.cryoet_one_shot.module import OneShotModule
from medseg.tasks.cryoet_one_shot.network import COSNet
from medseg.training.loader import SeededDataLoader
from medseg.training.module import Case

#: Three volumes of a, seven of g, six of the others.
CLASSES = list("gabcdefg" + "abcdefg" * 2 + "gfedcb" * 3)


@pytest.fixture
def loader(monkeypatch):
    """The real loader over CLASSES; of one of several processes if asked for."""

    def make(order: EpisodeOrder, seed: int = 0, rank: int = 0, world: int = 1) -> SeededDataLoader:
        from medseg.training import loader as module

        monkeypatch.setattr(module._EpochSampler, "_share", lambda _: (rank, world))
        transform = Compose([ToTensord("image"), RandGaussianNoised("image", prob=1.0)])
        data = [{"image": torch.full((1, 2, 2), float(i)), "class": c, "index": i} for i, c in enumerate(CLASSES)]
        dataset = CacheDataset(data, transform, progress=False, copy_cache=True)
        return SeededDataLoader(dataset, order.volumes, seed, order=order)

    return make


def drawn(order: EpisodeOrder, seed: int = 0) -> list[int]:
    return order(torch.Generator().manual_seed(seed))


def check_episodes(indices: list[int], n_way: int, k_shot: int) -> list[tuple[str, ...]]:
    """Every episode has n classes, each with k + 1 different volumes, shots first and targets last; their classes."""
    size = n_way * (k_shot + 1)
    assert len(indices) % size == 0
    found = []
    for start in range(0, len(indices), size):
        rows = [indices[start + r * n_way : start + (r + 1) * n_way] for r in range(k_shot + 1)]
        classes = [tuple(CLASSES[i] for i in row) for row in rows]
        assert classes == [classes[0]] * (k_shot + 1), "every row, the targets' as well, has the classes in one order"
        assert len(set(classes[0])) == n_way
        assert len({i for row in rows for i in row}) == size, "no volume is there twice"
        found.append(classes[0])
    return found


@pytest.mark.parametrize(("n_way", "k_shot", "batch_size"), [(2, 1, 2), (5, 1, 12), (7, 2, 7), (3, 2, 1)])
def test_an_epoch_is_episode_after_episode(n_way, k_shot, batch_size):
    order = EpisodeOrder(CLASSES, n_way, k_shot, batch_size, steps=80)
    episodes = max(1, batch_size // n_way)
    assert order.volumes == episodes * n_way * (k_shot + 1)
    assert len(order) == 80 * order.volumes
    indices = drawn(order)
    assert len(indices) == len(order)
    classes = check_episodes(indices, n_way, k_shot)
    assert len(classes) == 80 * episodes
    assert {c for episode in classes for c in episode} == set("abcdefg")
    if n_way < 7:
        assert len({frozenset(episode) for episode in classes}) > 1, "episodes differ in their classes"
    assert set(indices) == set(range(len(CLASSES))), "every volume has its turn"


def test_targets_are_as_often_one_volume_as_another():
    order = EpisodeOrder(CLASSES, n_way=7, batch_size=7, steps=600)
    targets = np.asarray(drawn(order)).reshape(-1, 2, 7)[:, 1].ravel()
    for name in "abcdefg":
        members = [i for i, c in enumerate(CLASSES) if c == name]
        counts = np.asarray([(targets == i).sum() for i in members])
        assert counts.sum() == 600
        # 5 standard deviations of a binomial count
        share = 1 / len(members)
        assert abs(counts - 600 * share).max() < 5 * np.sqrt(600 * share * (1 - share))


def test_the_generator_alone_decides():
    order = EpisodeOrder(CLASSES, n_way=4, steps=5)
    assert drawn(order, 1) == drawn(order, 1) == drawn(EpisodeOrder(CLASSES, n_way=4, steps=5), 1)
    assert drawn(order, 1) != drawn(order, 2)
    assert drawn(order, 1) == drawn(EpisodeOrder(CLASSES, n_way=4, steps=5, tested=["x", "y"]), 1)
    generator = torch.Generator().manual_seed(1)
    assert order(generator) != order(generator), "the next epoch is another one"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 8}, "n_way is 8; with 7 training classes choose from 2"),
        ({"n_way": 1}, "n_way is 1"),
        ({"n_way": 2, "k_shot": 3}, r"an episode takes 4 volumes of a class; too few of a \(3\)$"),
        ({"n_way": 2, "k_shot": 6}, r"too few of a \(3\), b \(6\), c \(6\), d \(6\), e \(6\), f \(6\)$"),
        ({"n_way": 2, "k_shot": 0}, "k_shot is 0"),
        ({"n_way": 2, "steps": 0}, "steps is 0"),
        ({"n_way": 2, "tested": ["x", "f", "b", "f"]}, "^b, f would be trained and tested: move these classes"),
    ],
)
def test_episodes_that_cannot_be_made(options, message):
    with pytest.raises(ValueError, match=message):
        EpisodeOrder(CLASSES, **options)


def epoch(loader: SeededDataLoader, number: int) -> tuple[list[list[int]], torch.Tensor]:
    loader.sampler.set_epoch(number)
    batches = list(loader)
    return [b["index"].tolist() for b in batches], torch.cat([b["image"].as_tensor() for b in batches])


def test_batches_are_whole_episodes(loader):
    order = EpisodeOrder(CLASSES, n_way=3, k_shot=2, batch_size=6, steps=4)
    loader = loader(order)
    batches, _ = epoch(loader, 0)
    assert len(loader) == len(batches) == 4
    for batch in batches:
        assert len(check_episodes(batch, 3, 2)) == 2
    assert batches != epoch(loader, 1)[0]


def test_a_resumed_epoch_equals_an_uninterrupted_one(loader):
    whole = loader(EpisodeOrder(CLASSES, n_way=3, steps=3), seed=5)
    epochs = [epoch(whole, number) for number in range(3)]
    batches, images = epoch(loader(EpisodeOrder(CLASSES, n_way=3, steps=3), seed=5), 2)
    assert batches == epochs[2][0]
    torch.testing.assert_close(images, epochs[2][1], rtol=0, atol=0)
    assert epoch(loader(EpisodeOrder(CLASSES, n_way=3, steps=3), seed=6), 2)[0] != batches


def test_processes_get_different_whole_episodes(loader):
    order = EpisodeOrder(CLASSES, n_way=4, steps=5)  # an odd number of steps: one is seen twice
    alone, _ = epoch(loader(order), 0)
    shares = [epoch(loader(order, rank=rank, world=2), 0)[0] for rank in range(2)]
    assert [len(share) for share in shares] == [3, 3]
    for batch in shares[0] + shares[1]:
        check_episodes(batch, 4, 1)
    assert [shares[step % 2][step // 2] for step in range(6)] == [*alone, alone[0]]


def nearest(support: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As COSNet.match with the negative L1 distance for a score."""
    return -(target.unsqueeze(-2) - support.unsqueeze(-3)).abs().sum(-1)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_features_that_tell_the_classes_apart_win_every_episode():
    classes = list("aabbccdd")
    features = torch.eye(4).repeat_interleave(2, dim=0)
    for n_way in (2, 3, 4):
        assert NWayAccuracy(n_way)(features, classes, nearest).tolist() == [1.0] * 8
    # and features that lead to another class lose every one
    assert NWayAccuracy(2)(column(0, 9, 1, 8), list("aabb"), nearest)[[0, 1]].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("n_way", [2, 3, 4])
@pytest.mark.parametrize("k_shot", [1, 2])
def test_a_network_that_answers_nothing_scores_one_in_n(n_way, k_shot):
    values = NWayAccuracy(n_way, k_shot)(torch.ones(12, 5), list("aaabbbcccddd"), nearest)
    assert values.tolist() == pytest.approx([1 / n_way] * 12, rel=1e-6)


def test_a_tie_of_some_counts_its_share():
    # a's volumes are alike, b's and c's lie on them, d's far away: of 4 classes 3 tie
    classes, features = list("aabbccdd"), column(0, 0, 0, 0, 0, 0, 50, 50)
    values = NWayAccuracy(4)(features, classes, nearest).tolist()
    assert values == pytest.approx([1 / 3] * 6 + [1.0, 1.0], rel=1e-6)


def test_random_features_score_about_one_in_n():
    generator = torch.Generator().manual_seed(3)
    features, classes = torch.randn(400, 8, generator=generator), [f"c{i % 10}" for i in range(400)]
    for n_way in (2, 5):
        values = NWayAccuracy(n_way, episodes=10)(features, classes, nearest)
        assert float(values.mean()) == pytest.approx(1 / n_way, abs=0.05)
        assert 0 <= float(values.min()) < float(values.max()) <= 1


def test_a_target_is_never_its_own_support():
    # each of a has one of b right beside it and its only fellow far off: with itself for a support it would win
    features = column(0, 100, 1, 99)
    values = NWayAccuracy(2, episodes=200)(features, list("aabb"), nearest)
    assert values[:2].tolist() == [0.0, 0.0]
    # two shots of three are both fellows, mean 90; itself among them would give 45
    features = column(0, 90, 90, 50, 50, 50)
    assert float(NWayAccuracy(2, 2, episodes=50)(features, list("aaabbb"), nearest)[0]) == 0.0


def test_the_features_of_the_shots_are_averaged():
    # a's fellows are at -10 and 10: their mean is the target, though each of them is farther off than b
    features = column(0, -10, 10, 5, 5)
    values = NWayAccuracy(2, k_shot=2, episodes=30)(features, list("aaabb"), nearest)
    assert float(values[0]) == 1.0
    assert float(NWayAccuracy(2, k_shot=1, episodes=30)(features, list("aaabb"), nearest)[0]) == 0.0


def expected_accuracy(features: np.ndarray, classes: list[str], target: int, n_way: int, k_shot: int) -> float:
    """Mean over all episodes that there are, every set of classes and of shots as likely as another."""
    own = [i for i, c in enumerate(classes) if c == classes[target] and i != target]
    others = sorted(set(classes) - {classes[target]})
    distance = {  # of every class, the distances that its sets of shots have
        c: [
            abs(np.mean([features[i] for i in shots]) - features[target])
            for shots in combinations([i for i, d in enumerate(classes) if d == c], k_shot)
        ]
        for c in others
    }
    total = []
    for shots in combinations(own, k_shot):
        mine = abs(np.mean([features[i] for i in shots]) - features[target])
        for chosen in combinations(others, n_way - 1):
            total.append(np.prod([np.mean([mine < d for d in distance[c]]) for c in chosen]))
    return float(np.mean(total))


@pytest.mark.parametrize(("n_way", "k_shot"), [(2, 1), (3, 1), (4, 1), (2, 2), (3, 3)])
def test_accuracy_is_the_mean_over_all_possible_episodes(n_way, k_shot):
    classes = list("aaaabbbbbccccddddddd")
    values = np.random.default_rng(n_way).permutation(len(classes)) * 1.37 + 0.1 * np.arange(len(classes)) ** 2
    metric = NWayAccuracy(n_way, k_shot, episodes=3000, seed=1)
    found = metric(torch.from_numpy(values)[:, None], classes, nearest).tolist()
    expected = [expected_accuracy(values, classes, t, n_way, k_shot) for t in range(len(classes))]
    assert np.std(expected) > 0.05, "the case tells something"
    assert found == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(3000))


def test_the_episodes_do_not_depend_on_the_network():
    classes = [f"c{i % 5}" for i in range(30)]
    seen: list[torch.Tensor] = []

    def spy(support: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(support[..., 0].round())
        return nearest(support, target)

    numbers = torch.arange(30.0)[:, None]
    for features in (torch.cat([numbers, torch.zeros(30, 1)], 1), torch.cat([numbers, torch.randn(30, 1) * 100], 1)):
        NWayAccuracy(3, seed=4)(features, classes, spy)
    assert all(torch.equal(a, b) for a, b in zip(seen[:30], seen[30:], strict=True))
    assert len(seen) == 60
    NWayAccuracy(3, seed=5)(features, classes, spy)
    assert not all(torch.equal(a, b) for a, b in zip(seen[:30], seen[60:], strict=True))


def test_too_few_for_an_episode_is_undefined():
    single = NWayAccuracy(2)(column(0, 1, 1, 9), ["alone", "b", "b", "c"], nearest)
    assert torch.isnan(single).tolist() == [True, False, False, True]
    assert single[1:3].tolist() == [1.0, 1.0], "a class of one volume is still there to be compared with"
    assert torch.isnan(NWayAccuracy(4)(torch.eye(6), list("aabbcc"), nearest)).all()
    # two shots: a class of one volume cannot support, a class of two has no target
    features, classes = column(0, 0, 0, 5, 5, 9), list("aaabbc")
    values = NWayAccuracy(2, k_shot=2)(features, classes, nearest)
    assert torch.isnan(values).tolist() == [False] * 3 + [True] * 3
    assert torch.isnan(NWayAccuracy(3, k_shot=2)(features, classes, nearest)).all()
    assert NWayAccuracy(2)(torch.zeros(0, 3), [], nearest).shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_way": 1}, "n_way 1, k_shot 1, episodes 20: at least 2, 1 and 1 are needed"),
        ({"n_way": 2, "k_shot": 0}, "k_shot 0"),
        ({"n_way": 2, "episodes": 0}, "episodes 0"),
        ({"n_way": 2, "by": "size"}, "by is 'size'; choose from features, true_voxels, found_voxels"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        NWayAccuracy(**options)


def module(**network: Any) -> OneShotModule:
    net = COSNet(2, size=4, feature_size=3, **network)
    metrics = {f"by_{by}": NWayAccuracy(2, by=by) for by in ("features", "true_voxels", "found_voxels")}
    return OneShotModule(
        episodes=EpisodeOrder(CLASSES, 2), network=net, loss=EpisodeLoss(torch.nn.Identity()), metrics=metrics,
        optimizer=torch.optim.Adam(net.parameters()), train_inferer=None, val_inferer=None, postprocessing=None,
    )  # fmt: skip


def scored(module: OneShotModule, rows: list[tuple[str, int, int]]) -> dict[str, list[float]]:
    """Accuracies of cases with a class, a true and a found size; their features are all alike."""
    cases = [
        Case(str(i), dict.fromkeys(module.metrics, np.nan), False, False, fields=dict(zip(names, row, strict=True)))
        for names in [("class", "true_voxels", "found_voxels")]
        for i, row in enumerate(rows)
    ]
    with torch.no_grad():
        module._score_matches(cases, {("", str(i)): np.zeros(3, np.float32) for i in range(len(rows))})
    return {name: [c.metrics[name] for c in cases] for name in module.metrics}


def test_the_size_baselines_compare_the_logarithm_of_sizes_and_nothing_else():
    # In voxels 100 is nearer to 10 (90) than to 260 (160); as a ratio it is nearer to 260.
    rows = [("a", 100, 7), ("a", 260, 7), ("b", 10, 7), ("b", 9, 7)]
    values = scored(module(), rows)
    assert values["by_true_voxels"] == [1.0, 1.0, 1.0, 1.0]
    assert values["by_found_voxels"] == [0.5] * 4, "equal sizes tell nothing"
    assert values["by_features"] == [0.5] * 4
    # a mask without a voxel counts as one voxel
    values = scored(module(), [("a", 5, 0), ("a", 50, 1), ("b", 5, 90), ("b", 50, 90)])
    assert values["by_found_voxels"] == [1.0] * 4


def test_found_voxels_are_those_of_the_mask_and_not_of_the_logits():
    scored, items = module(), []
    scored.postprocessing = lambda item: {**item, "pred": (item["pred"] > 0).float()}
    for number, voxels in enumerate((5, 0)):
        logits, label = torch.full((1, 4, 4, 4), -0.2), torch.zeros(1, 4, 4, 4)
        logits.flatten()[:voxels], label.flatten()[: voxels + 3] = 0.2, 1  # sure by no more than a little
        image = MetaTensor(torch.zeros(1, 4, 4, 4), meta={"filename_or_obj": f"{number}.mrc"})
        items.append({"image": image, "label": label, "pred": logits, "without_crf": logits.sigmoid(), "class": "a"})
    scored._collect(list_data_collate(items), np.zeros((2, 3), np.float32))
    fields = [(c.image, c.fields["class"], c.fields["found_voxels"], c.fields["true_voxels"]) for c in scored.cases]
    assert fields == [("0.mrc", "a", 5, 8), ("1.mrc", "a", 0, 3)]
    assert [c.empty_prediction for c in scored.cases] == [False, True]


@pytest.mark.parametrize(("n_way", "k_shot", "batch_size"), [(3, 1, 3), (3, 2, 6), (5, 2, 5)])
def test_a_training_step_compares_the_classes_that_the_loader_lays_out(loader, monkeypatch, n_way, k_shot, batch_size):
    """With features that are nothing but the class every target is matched; with another's none is."""
    order = EpisodeOrder(CLASSES, n_way, k_shot, batch_size, steps=2)
    trained, logged = module(), {}
    trained.episodes, trained.loss = order, EpisodeLoss(torch.nn.Identity(), match="softmax")
    monkeypatch.setattr(trained, "log", lambda name, value, **_: logged.update({name: float(value)}))
    monkeypatch.setattr(trained.network, "match", lambda support, target: 9 * nearest(support, target))
    monkeypatch.setattr(trained.network, "embed", lambda _: (features, None))
    for batch in loader(order):
        batch["label"] = batch["image"]
        features = torch.eye(7)[["abcdefg".index(c) for c in batch["class"]]]
        assert float(trained.training_step(batch, 0)) < 1e-6
        assert logged["train_accuracy"] == 1
        features = features.view(-1, k_shot + 1, n_way, 7).clone()
        features[:, -1] = features[:, -1].roll(1, dims=1)  # the targets' alone
        features = features.view(-1, 7)
        assert float(trained.training_step(batch, 0)) > 1
        assert logged["train_accuracy"] == 0


def test_without_a_decoder_there_are_no_found_sizes():
    values = scored(module(decoder=False), [("a", 5, 0), ("a", 5, 0), ("b", 90, 0), ("b", 90, 0)])
    assert values["by_true_voxels"] == [1.0] * 4
    assert np.isnan(values["by_found_voxels"]).all()
