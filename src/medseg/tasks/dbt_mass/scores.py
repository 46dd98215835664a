"""Scores of a whole part of a data list: shares of the area under the FROC curve, and sensitivity at a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from medseg.detection.free_response import outcomes
from medseg.training.module import Case

#: Columns of a box: half-open edges in voxels of the view's own grid.
BOX = ("d0", "h0", "w0", "d1", "h1", "w1")

__all__ = ["BOX", "FrocArea", "FrocScore", "SensitivityAt", "view_table"]


class FrocScore:
    """A score of masses, spread over the views that show them.

    Args:
        rule: hit rule, see :func:`medseg.detection.hit_rules.box_hits`.
        by: ``breast`` or ``lesion``.
    """

    def __init__(self, rule: str = "iou>0.5", by: str = "breast") -> None:
        self.rule, self.by = rule, by

    def __call__(self, detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame) -> list[float]:
        """Value of each view: the mean over its masses, ``nan`` where it has none (or no breast to count by).

        Args:
            detections: see :mod:`medseg.detection.free_response`.
            truths: likewise.
            views: likewise; the order of the values.
        """
        items = self.items(detections, truths, views)
        values = items.set_index([self._place, "mass"])["value"]
        owner = dict(zip(views["view"], views[self._place], strict=True))
        means: dict[str, float] = {}
        for view, own in truths.groupby("view"):
            keys = [(owner[view], mass) for mass in own["mass"]]
            known = [float(values[key]) for key in keys if key in values.index]
            means[str(view)] = sum(known) / len(known) if known else float("nan")
        return [means.get(str(view), float("nan")) for view in views["view"]]

    @property
    def _place(self) -> str:
        return "breast" if self.by == "breast" else "view"

    def items(self, detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame) -> pd.DataFrame:
        """One row per truth with its ``value``."""
        raise NotImplementedError


class FrocArea(FrocScore):
    """Area under the FROC curve up to a rate of false positives, divided by that rate: in [0, 1].

    The mean over masses is the area exactly; with one mass per breast and two views of each breast, so is the mean over
    views, because both have their breast's value.

    Args:
        rule: hit rule.
        by: ``breast`` or ``lesion``.
        limit: greatest rate of false positives.
    """

    def __init__(self, rule: str = "iou>0.5", by: str = "breast", limit: float = 4.0) -> None:
        super().__init__(rule, by)
        self.limit = limit

    def items(self, detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame) -> pd.DataFrame:
        """One row per truth with its share of the area."""
        table = outcomes(detections, truths, views, self.by, self.rule).areas(self.limit)
        return table.assign(value=table["area"])


class SensitivityAt(FrocScore):
    """Sensitivity at a rate of false positives: of each mass 1 if it is hit there, else 0.

    Args:
        rule: hit rule.
        by: ``breast`` or ``lesion``.
        rate: false positives per breast (or per mass and view).
    """

    def __init__(self, rule: str = "iou>0.5", by: str = "breast", rate: float = 1.0) -> None:
        super().__init__(rule, by)
        self.rate = rate

    def items(self, detections: pd.DataFrame, truths: pd.DataFrame, views: pd.DataFrame) -> pd.DataFrame:
        """One row per truth with 1 or 0."""
        found = outcomes(detections, truths, views, self.by, self.rule)
        reached = found.truths["score"].notna() & (found.rates(found.truths["score"]) <= self.rate + 1e-12)
        return found.truths.assign(value=reached.astype(float))


def view_table(cases: Sequence[Case]) -> pd.DataFrame:
    """Views of scored cases: ``view``, ``patient``, ``breast`` and every other field."""
    rows: list[Mapping[str, Any]] = [{**case.fields, "view": case.image} for case in cases]
    return pd.DataFrame(rows)
