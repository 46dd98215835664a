"""Free-response ROC (FROC): sensitivity over the rate of false positives, lesion-based and breast-based.

Three tables (pandas) say everything:

- ``views``, one row per view: ``view`` (its unique name), ``patient``, ``breast`` (unique name of the breast; empty
  where the laterality is unknown);
- ``truths``, one row per true mass and view: ``view``, ``mass`` (name within the breast: both views of a mass share
  it), the box;
- ``detections``: ``view``, the box, ``score``; higher is more suspicious.

Boxes as in :mod:`medseg.detection.hit_rules`. Counting, with ``by="lesion"``: every mass of every view is a truth, and
the false positives of all views are divided by their number. With ``by="breast"``: every mass of a breast is one truth,
hit when it is hit in either view, and the false positives of all views of all breasts are summed and divided by the
number of breasts, with and without a mass. Views without a breast take part in lesion-based counting only.

Source: M. Fan et al., 3D Mask R-CNN for DBT, evaluation section and Table 2; the step convention of the area is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from medseg.detection.hit_rules import DUPLICATE, FALSE_POSITIVE, check_frames, match_detections

Array = npt.NDArray[np.float64]

#: Sensitivities of the paper's Table 2.
SENSITIVITIES = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)

#: Greatest rate of false positives up to which the area is taken.
LIMIT = 4.0

__all__ = ["LIMIT", "SENSITIVITIES", "Froc", "Outcomes", "froc", "outcomes", "sensitivity_table", "truth_areas"]


@dataclass(frozen=True)
class Froc:
    """An FROC curve: its points, one per distinct score, by falling threshold.

    Between its points the curve is a step: at a rate of false positives it has the sensitivity of the last point that
    needs no more; before the first point it is 0, after the last one it keeps its value.

    Attributes:
        thresholds: (points,) a detection counts from this score on.
        sensitivity: (points,) share of the truths that are hit; ``nan`` without truths.
        false_positives: (points,) per breast, or per mass and view; ``nan`` without any.
        truths: number of truths.
        units: number of breasts, or of masses and views, by which false positives are divided.
        by: ``breast`` or ``lesion``.
    """

    thresholds: Array
    sensitivity: Array
    false_positives: Array
    truths: int
    units: int
    by: str

    def at_false_positives(self, rate: float) -> float:
        """Sensitivity at a rate of false positives, in [0, 1]; ``nan`` without truths.

        Raises:
            ValueError: if the rate is negative.
        """
        if not rate >= 0:
            raise ValueError(f"rate is {rate}; false positives per {self.by} are at least 0")
        if not self.truths or not self.units:
            return float("nan")
        reached = self.sensitivity[self.false_positives <= rate + 1e-12]
        return float(reached[-1]) if len(reached) else 0.0

    def false_positives_at(self, sensitivity: float) -> float:
        """Smallest rate of false positives with at least this sensitivity; ``nan`` if it is not reached.

        Raises:
            ValueError: if the sensitivity is not in (0, 1].
        """
        if not 0 < sensitivity <= 1:
            raise ValueError(f"sensitivity is {sensitivity}; give a share in (0, 1], e.g. 0.9")
        reached = self.false_positives[self.sensitivity >= sensitivity - 1e-12]
        return float(reached[0]) if len(reached) else float("nan")

    def area(self, limit: float = LIMIT) -> float:
        """Mean sensitivity over the rates of false positives in [0, limit]: in [0, 1], ``nan`` without truths."""
        _check_limit(limit)
        if not self.truths or not self.units:
            return float("nan")
        gain = np.diff(self.sensitivity, prepend=0.0)
        return float(gain @ np.clip(1 - self.false_positives / limit, 0, None))


@dataclass(frozen=True)
class Outcomes:
    """What the detections came to: all that a curve, its area and their statistics depend on.

    Attributes:
        truths: one row per truth: ``patient``, ``breast`` or ``view``, ``mass``, and ``score``, the highest one of a
            detection that hits it (``nan`` if none does).
        false_positives: one row each: ``patient``, ``score``.
        scores: distinct scores of all detections counted, falling.
        units: number of breasts, or of masses and views, of every patient (indexed by patient).
        by: ``breast`` or ``lesion``.
    """

    truths: pd.DataFrame
    false_positives: pd.DataFrame
    scores: Array
    units: pd.Series
    by: str

    def rates(self, scores: npt.ArrayLike) -> Array:
        """Rate of false positives at each threshold; ``nan`` without units."""
        rising = np.sort(self.false_positives["score"].to_numpy(float))
        count = len(rising) - np.searchsorted(rising, np.asarray(scores, float), side="left")
        units = int(self.units.sum())
        return count / units if units else np.full(count.shape, np.nan)

    def curve(self) -> Froc:
        """The FROC curve."""
        hits = np.sort(self.truths["score"].dropna().to_numpy(float))
        count = len(hits) - np.searchsorted(hits, self.scores, side="left")
        truths, units = len(self.truths), int(self.units.sum())
        sensitivity = count / truths if truths else np.full(len(count), np.nan)
        return Froc(self.scores, sensitivity, self.rates(self.scores), truths, units, self.by)

    def areas(self, limit: float = LIMIT) -> pd.DataFrame:
        """What every truth contributes to the area under the curve, as :func:`truth_areas` returns it."""
        _check_limit(limit)
        hit = self.truths["score"].notna().to_numpy()
        rate = np.where(hit, self.rates(self.truths["score"]), np.nan)
        area = np.where(hit, np.clip(1 - rate / limit, 0, None), 0.0)
        return self.truths.assign(false_positives=rate, area=area)


def outcomes(
    detections: pd.DataFrame,
    truths: pd.DataFrame,
    views: pd.DataFrame,
    by: str = "breast",
    rule: str = "iou>0.5",
    *,
    duplicates: str = "ignore",
) -> Outcomes:
    """Match detections with truths, view by view, and count by breast or by lesion.

    Args:
        detections: ``view``, box, ``score``.
        truths: ``view``, ``mass``, box.
        views: ``view``, ``patient``, ``breast``; for the rule ``bcs-dbt`` its grid too.
        by: ``breast`` or ``lesion``.
        rule: hit rule, as in :func:`medseg.detection.hit_rules.box_hits`.
        duplicates: ``ignore`` (nothing) or ``false_positive``: what a detection counts that hits only truths which
            higher-scoring ones have taken. The paper does not say.

    Raises:
        ValueError: if an argument is unknown, the tables do not fit together, a patient is unnamed, or a breast has
            two patients.
    """
    if by not in ("breast", "lesion"):
        raise ValueError(f"by is {by!r}; give 'breast' or 'lesion'")
    if duplicates not in ("ignore", "false_positive"):
        raise ValueError(f"duplicates is {duplicates!r}; give 'ignore' or 'false_positive'")
    check_frames(detections, truths, views)
    where = _owners(views, by)
    found = detections[detections["view"].isin(where.index)]
    true = truths[truths["view"].isin(where.index)]
    outcome = match_detections(found, true, views, rule)
    score = found["score"].to_numpy(float)

    true_patient, true_breast = (where.loc[true["view"], c].to_numpy() for c in ("patient", "breast"))
    place = {"breast": true_breast} if by == "breast" else {"view": true["view"].to_numpy()}
    items = pd.DataFrame({"patient": true_patient, **place, "mass": true["mass"].to_numpy(), "score": np.nan})
    items.loc[outcome[outcome >= 0], "score"] = score[outcome >= 0]
    if by == "breast":  # the better view; max leaves nan out
        items = items.groupby(["patient", "breast", "mass"], sort=False, as_index=False)["score"].max()

    wrong = (outcome == FALSE_POSITIVE) | ((outcome == DUPLICATE) & (duplicates == "false_positive"))
    patient = where.loc[found["view"], "patient"].to_numpy()
    false_positives = pd.DataFrame({"patient": patient[wrong], "score": score[wrong]})
    patients = pd.Index(where["patient"].unique(), name="patient")
    units = items.groupby("patient").size() if by == "lesion" else where.groupby("patient")["breast"].nunique()
    return Outcomes(items, false_positives, np.unique(score)[::-1], units.reindex(patients, fill_value=0), by)


def froc(
    detections: pd.DataFrame,
    truths: pd.DataFrame,
    views: pd.DataFrame,
    by: str = "breast",
    rule: str = "iou>0.5",
    *,
    duplicates: str = "ignore",
) -> Froc:
    """The FROC curve of detections.

    Args: as of :func:`outcomes`.

    Returns:
        The curve. Without detections it has no points: its sensitivity is 0 at every rate.

    Raises:
        ValueError: as :func:`outcomes`.

    Example:
        >>> box = {"d0": 0, "h0": 0, "w0": 0, "d1": 8, "h1": 20, "w1": 20}
        >>> views = pd.DataFrame([{"view": "a", "patient": "1", "breast": "1L"}])
        >>> truths = pd.DataFrame([{"view": "a", "mass": 1, **box}])
        >>> found = pd.DataFrame([{"view": "a", "score": 0.9, **box}, {"view": "a", "score": 0.95, **box, "d0": 7}])
        >>> froc(found, truths, views).false_positives_at(0.9)
        1.0
    """
    return outcomes(detections, truths, views, by, rule, duplicates=duplicates).curve()


def truth_areas(
    detections: pd.DataFrame,
    truths: pd.DataFrame,
    views: pd.DataFrame,
    by: str = "breast",
    rule: str = "iou>0.5",
    *,
    duplicates: str = "ignore",
    limit: float = LIMIT,
) -> pd.DataFrame:
    """What every truth contributes to the area under the curve: their mean is the area.

    Args:
        detections: ``view``, box, ``score``.
        truths: ``view``, ``mass``, box.
        views: ``view``, ``patient``, ``breast``.
        by: ``breast`` or ``lesion``.
        rule: hit rule.
        duplicates: as in :func:`outcomes`.
        limit: greatest rate of false positives.

    Returns:
        One row per truth: ``patient``, ``breast`` or ``view``, ``mass``, ``score`` of its hit (``nan`` if none),
        ``false_positives``, the rate at that threshold (``nan`` if none), and ``area`` = max(0, 1 - rate / limit), 0
        for a truth that is never hit. The values of one method are not quite independent: all share its rates.

    Raises:
        ValueError: as :func:`outcomes`, or if the limit is not positive.
    """
    return outcomes(detections, truths, views, by, rule, duplicates=duplicates).areas(limit)


def sensitivity_table(curves: Mapping[str, Froc], sensitivities: Sequence[float] = SENSITIVITIES) -> pd.DataFrame:
    """False positives at given sensitivities, as in the paper's Table 2.

    Args:
        curves: curve by name.
        sensitivities: in (0, 1].

    Returns:
        One row per curve: ``name``, ``by``, ``truths``, ``units``, and a column per sensitivity in per cent, e.g.
        ``85``, with the rate of false positives; ``nan`` where the sensitivity is not reached.
    """
    rows = []
    for name, one in curves.items():
        rates = {f"{100 * s:g}": one.false_positives_at(s) for s in sensitivities}
        rows.append({"name": name, "by": one.by, "truths": one.truths, "units": one.units, **rates})
    return pd.DataFrame(rows)


def _owners(views: pd.DataFrame, by: str) -> pd.DataFrame:
    """Patient and breast of the views that take part, as text by view."""
    where = views.set_index("view")[["patient", "breast"]]
    where = where.where(where.notna(), "").astype(str)
    unnamed = where.index[where["patient"] == ""]
    if len(unnamed):
        raise ValueError(f"views: no patient for view {unnamed[0]!r}; give every view one (its own name if unknown)")
    if by == "lesion":
        return where
    where = where[where["breast"] != ""]
    shared = where.groupby("breast")["patient"].nunique()
    if (shared > 1).any():
        raise ValueError(
            f"views: breast {shared.index[shared > 1][0]!r} has more than one patient; name breasts by patient and side"
        )
    return where


def _check_limit(limit: float) -> None:
    if not 0 < limit < np.inf:
        raise ValueError(f"limit is {limit}; give a positive rate of false positives, e.g. {LIMIT:g}")
