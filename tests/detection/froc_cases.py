"""Small tables of detections, truths and views for the tests of FROC analysis."""

from __future__ import annotations

from typing import Any

import pandas as pd

from medseg.detection.hit_rules import BOX

MASS = (0, 0, 0, 10, 20, 20)
AWAY = (50, 50, 50, 60, 60, 60)


def detections(*rows: tuple[str, tuple[float, ...], float]) -> pd.DataFrame:
    return pd.DataFrame([[v, *box, s] for v, box, s in rows], columns=["view", *BOX, "score"])


def truths(*rows: tuple[str, str, tuple[float, ...]]) -> pd.DataFrame:
    return pd.DataFrame([[v, m, *box] for v, m, box in rows], columns=["view", "mass", *BOX])


def views(*rows: tuple[str, str, str], **fields: Any) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["view", "patient", "breast"]).assign(**fields)


TWO = views(("cc", "1", "1L"), ("mlo", "1", "1L"), ("other", "2", "2R"))
