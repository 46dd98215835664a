"""The statistics of a comparison: intervals, paired tests, ranks. Plain functions on arrays.

A value that is undefined is ``nan`` here as everywhere in medseg; every function says what it does with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

__all__ = ["bootstrap_ci", "friedman", "holm", "mean_ranks", "paired_wilcoxon"]


def bootstrap_ci(
    values: Sequence[float] | npt.NDArray[Any],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap confidence interval of the mean: bias-corrected and accelerated (BCa), resampling cases.

    Args:
        values: one per independent case; ``nan`` is left out.
        confidence: coverage in (0, 1).
        resamples: bootstrap samples.
        seed: seed of the resampling; the same values give the same interval.

    Returns:
        Lower and upper bound, in the unit of the values. Both are the value itself if all values are equal, ``nan``
        for fewer than two.

    Raises:
        ValueError: if ``confidence`` is not in (0, 1), ``resamples`` is below 1 or a value is infinite.

    Source: B. Efron, Journal of the American Statistical Association 82, 1987; computed by ``scipy.stats.bootstrap``.
    """
    from scipy.stats import bootstrap

    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a coverage in (0, 1), e.g. 0.95")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    defined = _defined(values)
    if len(defined) < 2:
        return float("nan"), float("nan")
    if np.ptp(defined) == 0:
        return float(defined[0]), float(defined[0])
    found = bootstrap(
        (defined,), np.mean, n_resamples=resamples, confidence_level=confidence, method="BCa",
        batch=max(1, 4_000_000 // len(defined)), rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def paired_wilcoxon(a: Sequence[float] | npt.NDArray[Any], b: Sequence[float] | npt.NDArray[Any]) -> float:
    """Two-sided p-value of the Wilcoxon signed-rank test that paired values do not differ.

    Pairs with a ``nan`` are left out, and so are pairs without a difference (Wilcoxon's own treatment of zeros).
    Whether the distribution is exact or approximate is scipy's choice, by the number of differences and their ties.

    Args:
        a: one value per case.
        b: the same cases in the same order.

    Returns:
        A value in (0, 1]; 1 if no pair differs, ``nan`` if there is no pair.

    Raises:
        ValueError: if the lengths differ or a value is infinite.

    Source: F. Wilcoxon, Biometrics Bulletin 1, 1945; computed by ``scipy.stats.wilcoxon``.
    """
    from scipy.stats import wilcoxon

    x, y = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
    if len(x) != len(y):
        raise ValueError(f"{len(x)} values against {len(y)}; a paired test needs the same cases in the same order")
    difference = _defined(x - y)
    if not len(difference):
        return float("nan")
    difference = difference[difference != 0]
    return float(wilcoxon(difference).pvalue) if len(difference) else 1.0


def holm(p_values: Sequence[float] | npt.NDArray[Any]) -> Array:
    """P-values adjusted for testing several hypotheses (Holm's step-down method).

    Args:
        p_values: one per hypothesis, in [0, 1]; ``nan`` stays ``nan`` and does not count as a hypothesis.

    Returns:
        Adjusted values in the same order, each at most 1.

    Raises:
        ValueError: if a value is outside [0, 1].

    Source: S. Holm, Scandinavian Journal of Statistics 6, 1979.
    """
    p = np.asarray(p_values, float).ravel()
    tested = np.flatnonzero(~np.isnan(p))
    if np.any((p[tested] < 0) | (p[tested] > 1)):
        raise ValueError(f"p-values must lie in [0, 1], got {p.tolist()}")
    order = tested[np.argsort(p[tested], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1)
    return adjusted


def mean_ranks(values: npt.NDArray[Any], higher_is_better: bool = True) -> Array:
    """Mean rank of each configuration over the cases, 1 the best; ties share their ranks.

    Args:
        values: (cases, configurations). An undefined value ranks last in its case.
        higher_is_better: direction of the metric.

    Returns:
        (configurations,), each in [1, configurations]; ``nan`` without cases.
    """
    from scipy.stats import rankdata

    table = np.atleast_2d(np.asarray(values, float))
    if not table.size:
        return np.full(table.shape[1], np.nan)
    losses = np.where(np.isnan(table), np.inf, -table if higher_is_better else table)
    ranks: Array = rankdata(losses, axis=1).mean(axis=0)
    return ranks


def friedman(values: npt.NDArray[Any]) -> float:
    """P-value of the Friedman test that all configurations rank alike.

    Args:
        values: (cases, configurations); cases with a ``nan`` are left out.

    Returns:
        A value in [0, 1]; 1 if nothing differs, ``nan`` for fewer than three configurations or two cases.
    """
    from scipy.stats import friedmanchisquare

    table = np.atleast_2d(np.asarray(values, float))
    table = table[~np.isnan(table).any(axis=1)]
    if table.shape[1] < 3 or len(table) < 2:
        return float("nan")
    if np.all(table == table[:, :1]):
        return 1.0
    return float(friedmanchisquare(*table.T).pvalue)


def _defined(values: Sequence[float] | npt.NDArray[Any]) -> Array:
    array = np.asarray(values, float).ravel()
    if np.isinf(array).any():
        raise ValueError("the values hold an infinity; an undefined value is nan")
    defined: Array = array[~np.isnan(array)]
    return defined
