"""Intervals and paired tests of FROC curves: patients are the independent units.

All of them work on counts per patient at the scores at which some truth is hit; matching is done once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from medseg.detection.free_response import LIMIT, Outcomes, outcomes

Array = npt.NDArray[np.float64]

#: Rates of false positives at which sensitivities are reported.
RATES = (0.5, 1.0, 2.0, 4.0)

__all__ = ["RATES", "AreaDifference", "AreaInterval", "bootstrap_area", "bootstrap_outcomes", "compare_areas",
           "compare_outcomes"]  # fmt: skip


@dataclass(frozen=True)
class AreaInterval:
    """Area under an FROC curve and sensitivities on it, with bootstrap intervals (percentiles).

    Attributes:
        area: in [0, 1].
        area_interval: lower and upper bound.
        rates: (rates,) of false positives.
        sensitivity: (rates,).
        sensitivity_interval: (2, rates) lower and upper bounds.
    """

    area: float
    area_interval: tuple[float, float]
    rates: Array
    sensitivity: Array
    sensitivity_interval: Array


@dataclass(frozen=True)
class AreaDifference:
    """Difference of two areas under FROC curves of the same truths.

    Attributes:
        area_a: of the first method.
        area_b: of the second method.
        difference: a - b.
        interval: of the difference, from the paired bootstrap.
        p_bootstrap: two-sided, patients resampled together with both methods' outputs.
        p_permutation: two-sided, the methods' outputs swapped patient by patient.
    """

    area_a: float
    area_b: float
    difference: float
    interval: tuple[float, float]
    p_bootstrap: float
    p_permutation: float


@dataclass(frozen=True)
class _Counts:
    """Per patient, at falling thresholds: (patients, thresholds) hits new at each, false positives up to each."""

    hits: Array
    false_positives: Array
    truths: Array  # (patients,)
    units: Array  # (patients,)

    def areas(self, weights: Array, limit: float) -> Array:
        """(samples,) areas of samples of patients: (samples, patients) how often each one is drawn."""
        with np.errstate(divide="ignore", invalid="ignore"):  # a sample without truths has no area
            rates = weights @ self.false_positives / (weights @ self.units)[:, None]
            return _area(weights @ self.hits, rates, weights @ self.truths, limit)

    def sensitivities(self, weights: Array, rates: Array) -> Array:
        """(samples, rates) sensitivities of samples of patients."""
        hits, counts = weights @ self.hits, weights @ self.false_positives
        allowed = rates * (weights @ self.units)[:, None] + 1e-9
        with np.errstate(divide="ignore", invalid="ignore"):
            reached = [(hits * (counts <= a[:, None])).sum(axis=1) / (weights @ self.truths) for a in allowed.T]
        found: Array = np.stack(reached, axis=1)
        return found


def bootstrap_area(
    detections: pd.DataFrame,
    truths: pd.DataFrame,
    views: pd.DataFrame,
    by: str = "breast",
    rule: str = "iou>0.5",
    *,
    duplicates: str = "ignore",
    limit: float = LIMIT,
    rates: Sequence[float] = RATES,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AreaInterval:
    """Area under the FROC curve and sensitivities at rates of false positives, with intervals over patients.

    Args:
        detections: tables as in :mod:`medseg.detection.free_response`.
        truths: likewise.
        views: likewise.
        by: ``breast`` or ``lesion``.
        rule: hit rule.
        duplicates: as in :func:`medseg.detection.free_response.outcomes`.
        limit: greatest rate of false positives of the area.
        rates: rates of false positives of the sensitivities.
        resamples: bootstrap samples; patients are drawn with replacement, with all their breasts and views.
        confidence: coverage in (0, 1).
        seed: the same seed gives the same interval.

    Returns:
        Values and percentile intervals. The interval is ``nan`` for fewer than two patients; samples without any
        truth are left out.

    Raises:
        ValueError: if an argument is out of its range or the tables do not fit together.
    """
    found = outcomes(detections, truths, views, by, rule, duplicates=duplicates)
    return bootstrap_outcomes(found, limit=limit, rates=rates, resamples=resamples, confidence=confidence, seed=seed)


def bootstrap_outcomes(
    found: Outcomes,
    *,
    limit: float = LIMIT,
    rates: Sequence[float] = RATES,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AreaInterval:
    """:func:`bootstrap_area` of outcomes that are counted already."""
    _check(resamples, confidence)
    counts = _count(found, _thresholds(found.truths["score"]))
    wanted, one = np.asarray(rates, float), found.curve()
    sensitivity = np.array([one.at_false_positives(r) for r in wanted])
    area, patients = one.area(limit), len(found.units)
    if patients < 2:
        nothing = np.full((2, len(wanted)), np.nan)
        return AreaInterval(area, (np.nan, np.nan), wanted, sensitivity, nothing)
    weights = _resample(patients, resamples, np.random.default_rng(seed))
    low, high = _interval(counts.areas(weights, limit)[:, None], confidence)[:, 0]
    interval = _interval(counts.sensitivities(weights, wanted), confidence)
    return AreaInterval(area, (float(low), float(high)), wanted, sensitivity, interval)


def compare_areas(
    method_a: pd.DataFrame,
    method_b: pd.DataFrame,
    truths: pd.DataFrame,
    views: pd.DataFrame,
    by: str = "breast",
    *,
    rule: str = "iou>0.5",
    duplicates: str = "ignore",
    limit: float = LIMIT,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AreaDifference:
    """Compare the areas under the FROC curves of two methods on the same patients, paired.

    Args:
        method_a: detections of the first method.
        method_b: detections of the second method.
        truths: tables as in :mod:`medseg.detection.free_response`.
        views: likewise.
        by: ``breast`` or ``lesion``.
        rule: hit rule.
        duplicates: as in :func:`medseg.detection.free_response.outcomes`.
        limit: greatest rate of false positives of the area.
        resamples: bootstrap samples, and random swaps.
        confidence: coverage of the interval, in (0, 1).
        seed: the same seed gives the same values.

    Returns:
        The difference with its interval and both p-values, as :func:`compare_outcomes` describes them.

    Raises:
        ValueError: if an argument is out of its range or the tables do not fit together.
    """
    a, b = (outcomes(m, truths, views, by, rule, duplicates=duplicates) for m in (method_a, method_b))
    return compare_outcomes(a, b, limit=limit, resamples=resamples, confidence=confidence, seed=seed)


def compare_outcomes(
    a: Outcomes,
    b: Outcomes,
    *,
    limit: float = LIMIT,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> AreaDifference:
    """:func:`compare_areas` of outcomes that are counted already.

    Both p-values count the observed sample among the random ones (add-one), so they are never 0 and at least
    1 / (resamples + 1). Bootstrap: twice the smaller share of samples of patients in which the difference is not
    above, or not below, 0. Permutation: share of random swaps whose difference is at least as far from 0 as the
    observed one. Swapping mixes the scores of two methods, which need not share a scale; so every score is first
    replaced by the rate of false positives that its own method has at it, which leaves both curves as they are.

    Raises:
        ValueError: if the patients or truths differ, or an argument is out of its range.
    """
    _check(resamples, confidence)
    names = [c for c in a.truths.columns if c != "score"]
    if a.by != b.by or not a.units.equals(b.units) or not a.truths[names].equals(b.truths[names]):
        raise ValueError("the two methods have different truths or views; a paired test needs the same for both")
    a, b = _by_rate(a), _by_rate(b)
    both = _thresholds(pd.concat([a.truths["score"], b.truths["score"]]))
    counts_a, counts_b = _count(a, both), _count(b, both)
    area_a, area_b, patients = a.curve().area(limit), b.curve().area(limit), len(a.units)
    difference = area_a - area_b
    if patients < 2 or np.isnan(difference):
        return AreaDifference(area_a, area_b, difference, (np.nan, np.nan), np.nan, np.nan)
    rng = np.random.default_rng(seed)
    weights = _resample(patients, resamples, rng)
    drawn = counts_a.areas(weights, limit) - counts_b.areas(weights, limit)
    low, high = _interval(drawn[:, None], confidence)[:, 0]
    drawn = drawn[~np.isnan(drawn)]
    least = min((drawn <= 1e-12).sum(), (drawn >= -1e-12).sum())
    p_bootstrap = min(1.0, 2 * (least + 1) / (len(drawn) + 1))
    swapped = _swapped(counts_a, counts_b, rng.integers(0, 2, (resamples, patients)).astype(float), limit)
    p_permutation = ((np.abs(swapped) >= abs(difference) - 1e-12).sum() + 1) / (resamples + 1)
    return AreaDifference(
        area_a, area_b, difference, (float(low), float(high)), float(p_bootstrap), float(p_permutation)
    )


def _area(hits: Array, rates: Array, truths: Array | float, limit: float) -> Array:
    area: Array = (hits * np.clip(1 - rates / limit, 0, None)).sum(axis=1) / truths
    return area


def _swapped(a: _Counts, b: _Counts, swaps: Array, limit: float) -> Array:
    """(samples,) differences of areas after swapping the methods' outputs: (samples, patients) 1 where swapped."""
    units, truths = a.units.sum(), a.truths.sum()
    moved_hits, moved_false = swaps @ (b.hits - a.hits), swaps @ (b.false_positives - a.false_positives)
    first = _area(a.hits.sum(0) + moved_hits, (a.false_positives.sum(0) + moved_false) / units, truths, limit)
    second = _area(b.hits.sum(0) - moved_hits, (b.false_positives.sum(0) - moved_false) / units, truths, limit)
    return first - second


def _by_rate(found: Outcomes) -> Outcomes:
    """The same with each score replaced by minus the rate of false positives at it."""
    truths, wrong = (f.assign(score=-found.rates(f["score"])) for f in (found.truths, found.false_positives))
    truths["score"] = truths["score"].where(found.truths["score"].notna())
    return Outcomes(truths, wrong, np.unique(-found.rates(found.scores))[::-1], found.units, found.by)


def _thresholds(scores: pd.Series) -> Array:
    falling: Array = np.unique(scores.dropna().to_numpy(float))[::-1]
    return falling


def _count(found: Outcomes, thresholds: Array) -> _Counts:
    patients = found.units.index
    hits, wrong = np.zeros((2, len(patients), len(thresholds) + 1))
    hit = found.truths.dropna(subset="score")
    for table, counts in ((hit, hits), (found.false_positives, wrong)):
        # the first threshold that the score reaches; the last column takes what reaches none
        column = np.searchsorted(-thresholds, -table["score"].to_numpy(float), side="left")
        np.add.at(counts, (patients.get_indexer(table["patient"]), column), 1)
    truths = found.truths.groupby("patient").size().reindex(patients, fill_value=0)
    return _Counts(
        hits[:, :-1], wrong[:, :-1].cumsum(axis=1), truths.to_numpy(float), found.units.to_numpy(float)
    )  # fmt: skip


def _resample(patients: int, resamples: int, rng: np.random.Generator) -> Array:
    """(resamples, patients) how often each patient is drawn."""
    return rng.multinomial(patients, np.full(patients, 1 / patients), size=resamples).astype(float)


def _interval(samples: Array, confidence: float) -> Array:
    """(2, values) percentiles of (samples, values); ``nan`` if no sample has a value."""
    defined = samples[~np.isnan(samples).any(axis=1)]
    if not len(defined):
        return np.full((2, samples.shape[1]), np.nan)
    tail = (1 - confidence) / 2
    bounds: Array = np.quantile(defined, [tail, 1 - tail], axis=0)
    return bounds


def _check(resamples: int, confidence: float) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a coverage in (0, 1), e.g. 0.95")
