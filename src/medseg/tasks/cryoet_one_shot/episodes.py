"""Episodes of n-way k-shot learning: which volumes a training step sees, and how a test counts (paper, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

COMPARED = ("features", "true_voxels", "found_voxels")

__all__ = ["EpisodeOrder", "NWayAccuracy"]

Indices = npt.NDArray[np.int64]
Match = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class EpisodeOrder:
    """The order in which :class:`medseg.training.loader.SeededDataLoader` takes volumes: episode after episode.

    An episode is n classes drawn without replacement, and of each k + 1 different volumes: first the k shots of all n
    classes, shot by shot, then their n targets. A step holds several episodes.

    Args:
        classes: the class of every training item.
        n_way: n; at most the number of classes.
        k_shot: k.
        batch_size: volumes of one stream in a step: ``batch_size // n_way`` episodes, at least one.
        steps: steps of an epoch.
        tested: classes of the test part: a class that was trained is not found by one shot.

    Raises:
        ValueError: if there are fewer classes than n, a class has fewer than k + 1 volumes, or one is also tested; it
            is named.
    """

    def __init__(
        self,
        classes: Sequence[str],
        n_way: int,
        k_shot: int = 1,
        batch_size: int = 12,
        steps: int = 1000,
        tested: Sequence[str] = (),
    ) -> None:
        self._members = {c: np.flatnonzero(np.asarray(classes) == c) for c in sorted(set(classes))}
        self.n_way, self.k_shot, self.steps = n_way, k_shot, steps
        if not 2 <= n_way <= len(self._members):
            raise ValueError(f"n_way is {n_way}; with {len(self._members)} training classes choose from 2 to that")
        if k_shot < 1 or steps < 1:
            raise ValueError(f"k_shot is {k_shot} and steps is {steps}; both must be at least 1")
        small = [f"{c} ({len(m)})" for c, m in self._members.items() if len(m) < k_shot + 1]
        if small:
            raise ValueError(f"an episode takes {k_shot + 1} volumes of a class; too few of {', '.join(small)}")
        both = sorted(set(classes) & set(tested))
        if both:
            raise ValueError(
                f"{', '.join(both)} would be trained and tested: move these classes to one side of the data list, or, "
                "for a test of known classes, pass --train::episodes::tested '[]'"
            )
        self.episodes = max(1, batch_size // n_way)

    @property
    def volumes(self) -> int:
        """Volumes of one step, both streams together: the loader's ``batch_size``."""
        return self.episodes * self.n_way * (self.k_shot + 1)

    def __len__(self) -> int:
        return self.steps * self.volumes

    def __call__(self, generator: torch.Generator) -> list[int]:
        """Draw an epoch: indices of items."""
        random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        members = list(self._members.values())
        order: list[int] = []
        for _ in range(self.steps * self.episodes):
            chosen = random.choice(len(members), self.n_way, replace=False)
            drawn = [random.choice(members[c], self.k_shot + 1, replace=False) for c in chosen]
            order += np.stack(drawn, axis=1).ravel().tolist()
        return order


class NWayAccuracy:
    """Accuracy of n-way k-shot classification, counted for every target over many episodes.

    An episode sets the target against k volumes of its own class (never itself) and k of each of n - 1 other classes,
    drawn anew each time. It is won if the own class scores highest; a tie of m classes counts 1 / m, so that a network
    which answers nothing scores 1 / n.

    Args:
        n_way: n.
        k_shot: k; the features of k shots are averaged.
        episodes: episodes per target.
        by: ``features`` compares the network's features. ``true_voxels`` and ``found_voxels`` compare nothing but the
            size of the true masks, or of those that the network finds: baselines that show how far size alone gets.
        seed: seed of the episodes; they do not depend on the network.
    """

    def __init__(self, n_way: int, k_shot: int = 1, episodes: int = 20, by: str = "features", seed: int = 0) -> None:
        if n_way < 2 or k_shot < 1 or episodes < 1:
            raise ValueError(f"n_way {n_way}, k_shot {k_shot}, episodes {episodes}: at least 2, 1 and 1 are needed")
        if by not in COMPARED:
            raise ValueError(f"by is {by!r}; choose from {', '.join(COMPARED)}")
        self.n_way, self.k_shot, self.episodes, self.by, self.seed = n_way, k_shot, episodes, by, seed

    def __call__(self, features: torch.Tensor, classes: Sequence[str], match: Match) -> torch.Tensor:
        """Accuracy of each of N targets, 0 to 1.

        Args:
            features: (N, F), what ``match`` compares.
            classes: the class of each.
            match: from supports (..., n, F) and targets (..., 1, F) to scores (..., 1, n), higher is nearer.

        Returns:
            (N,) float64; ``nan`` where the classes, or the volumes of the own class, are too few for an episode.
        """
        names, labels = np.unique(np.asarray(classes), return_inverse=True)
        members = [np.flatnonzero(labels == c) for c in range(len(names))]
        possible = np.asarray([c for c, m in enumerate(members) if len(m) >= self.k_shot])
        result = torch.full((len(labels),), torch.nan, dtype=torch.float64)
        random = np.random.default_rng(self.seed)
        for target, own in enumerate(labels):
            others = possible[possible != own]
            shots = members[own][members[own] != target]
            if len(others) < self.n_way - 1 or len(shots) < self.k_shot:
                continue
            drawn = np.empty((self.episodes, self.n_way, self.k_shot), dtype=np.int64)
            drawn[:, 0] = self._shots(random, shots, self.episodes)
            chosen = others[random.random((self.episodes, len(others))).argsort(axis=1)[:, : self.n_way - 1]]
            for c in np.unique(chosen):  # the own class stands first in every episode
                drawn[:, 1:][chosen == c] = self._shots(random, members[c], int((chosen == c).sum()))
            support = features[torch.from_numpy(drawn)].mean(dim=2)  # (E, n, k, F) -> (E, n, F)
            scores = match(support, features[target].expand(self.episodes, 1, -1))[:, 0]
            best = scores == scores.max(dim=1, keepdim=True).values
            result[target] = (best[:, 0] / best.sum(dim=1)).mean(dtype=torch.float64)
        return result

    def _shots(self, random: np.random.Generator, members: Indices, count: int) -> Indices:
        """Draw k different members of a class, ``count`` times: (count, k)."""
        if self.k_shot == 1:
            return members[random.integers(len(members), size=(count, 1))]
        return members[random.random((count, len(members))).argsort(axis=1)[:, : self.k_shot]]
