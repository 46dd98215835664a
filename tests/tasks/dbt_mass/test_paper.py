"""The pure parts of the paper's tables: average precision by hand, and the text of the tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.experiments.plan import Child, Plan, Setting
from medseg.io.files import write_csv
from medseg.tasks.dbt_mass import mask_scores, paper
from medseg.tasks.dbt_mass.mask_scores import MaskScores, average_precision, hits


def test_average_precision_by_hand() -> None:
    # recall 1/3 at precision 1, 2/3 at 2/3, 1 at 3/5; precision 1/2 at rank 2 and 4 is below the envelope
    hit = [True, False, True, False, True]
    assert average_precision([0.9, 0.8, 0.7, 0.6, 0.5], hit, 3) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_the_envelope_lifts_what_lies_before_a_better_precision() -> None:
    assert average_precision([0.9, 0.8, 0.7, 0.6], [False, True, True, True], 4) == pytest.approx(0.75 * 0.75)


def test_average_precision_does_not_depend_on_the_order_of_the_rows() -> None:
    assert average_precision([0.5, 0.9, 0.7], [True, True, False], 2) == pytest.approx((1 + 2 / 3) / 2)


def test_equal_scores_count_together() -> None:
    for hit in ([True, False], [False, True]):
        assert average_precision([0.5, 0.5], hit, 1) == pytest.approx(0.5)


def test_average_precision_of_nothing() -> None:
    assert average_precision([], [], 2) == 0
    assert math.isnan(average_precision([0.5], [False], 0))


@pytest.mark.parametrize(
    ("scores", "hit", "truths", "message"),
    [
        ([0.5], [True, False], 1, "1 scores and 2 hits"),
        ([float("nan")], [True], 1, "not finite"),
        ([0.5, 0.4], [True, True], 1, "2 hits of 1 truths"),
    ],
)
def test_average_precision_refuses(scores: list[float], hit: list[bool], truths: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        average_precision(scores, hit, truths)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12), st.integers(0, 3))
def test_average_precision_is_the_brute_force_area(rows: list[tuple[int, bool]], missed: int) -> None:
    truths = sum(hit for _, hit in rows) + missed
    points = []  # recall and precision at every threshold
    for threshold in sorted({score for score, _ in rows}, reverse=True):
        taken = [hit for score, hit in rows if score >= threshold]
        points.append((sum(taken) / max(truths, 1), sum(taken) / len(taken)))
    grid = (np.arange(2520) + 0.5) / 2520  # of recall; a multiple of every number of truths up to 10
    expected = np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in grid])
    found = average_precision([s for s, _ in rows], [h for _, h in rows], truths)
    if not truths:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(expected, abs=2e-3)


def test_a_truth_is_hit_once() -> None:
    iou = np.array([[0.8, 0.0], [0.9, 0.0], [0.6, 0.55], [0.5, 0.5]])
    assert hits(iou).tolist() == [True, False, True, False]
    assert hits(np.zeros((0, 1))).tolist() == []
    assert hits(np.zeros((2, 0))).tolist() == [False, False]


def test_masks_are_scored_where_the_box_fits() -> None:
    label = torch.zeros(1, 8, 16, 16, dtype=torch.uint8)
    label[:, 2:6, 4:12, 4:12] = 1
    boxes = torch.tensor([[2.0, 4, 4, 6, 12, 12], [0, 0, 0, 2, 4, 4]])
    masks = torch.ones(2, 4, 8, 8)
    masks[0, :2] = 0  # half of the mass
    found = MaskScores()
    mask_scores._add(found, "head", "a", torch.tensor([0.9, 0.8]), boxes, masks, label)
    (mass,) = found.masses
    assert (mass["dice"], mass["precision"], mass["fnr"]) == pytest.approx((2 / 3, 1, 0.5))
    assert [d["hit"] for d in found.detections] == [0, 0]  # an IoU of masks of exactly 0.5 is not above 0.5
    masks[0, 1] = 1
    mask_scores._add(found, "head", "b", torch.tensor([0.9, 0.8]), boxes, masks, label)
    assert [d["hit"] for d in found.detections[2:]] == [1, 0]
    mask_scores._add(found, "head", "c", torch.zeros(0), boxes[:0], masks[:0], label)
    assert len(found.masses) == 2


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no finished run"):
        mask_scores.score_masks(tmp_path)


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """What the scoring of masks leaves, in small."""
    for network in ("mask_rcnn_3d", "mask_rcnn_2d"):
        masses: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        for source in ("head", "found", "true"):
            for view, value in (("a", 0.8), ("b", 0.6)):
                masses.append({"source": source, "view": view, "mass": 1, "dice": value, "precision": 0.5, "fnr": 0.25})
            if source != "true":
                found += [{"source": source, "view": v, "score": s, "hit": h}
                          for v, s, h in (("a", 0.9, 1), ("b", 0.5, 0))]  # fmt: skip
        write_csv(tmp_path / f"{network}_masses.csv", masses)
        write_csv(tmp_path / f"{network}_detections.csv", found)
    return tmp_path


def test_table_4_has_our_numbers_beside_the_papers(scored: Path) -> None:
    facts = {"mask_rcnn_3d": {"masses": 2}}
    rows = [row for row in (paper._table4_row(scored, facts, *line) for line in paper.SEGMENTATION) if row]
    text = paper._table4(rows)
    assert "| 3D Mask R-CNN, mask head | 2 of 2 | 0.700 | 0.500 | 0.250 | 0.500 | *0.934* | *0.053* |" in text
    assert "(upper bound) | 2 of 2 | 0.700 | 0.500 | 0.250 | – | *–* | *–* |" in text
    assert "2D" not in text


def test_table_5_has_our_numbers_beside_the_papers() -> None:
    facts = {"parameters": 730_000, "megabytes": 2.9, "milliseconds": 123.4, "views": 10}
    row = paper._table5_row("mask_rcnn_3d", facts, [10.0, 11.0])
    line = "| 3D Mask R-CNN | 730,000 | *5.27e7* | 2.9 | *320* | 123 | *100* | 21 |"
    assert line in paper._table5([row])
    assert row["epochs"] == 2


def child(tmp_path: Path, network: str) -> Child:
    return Child(network, "mask_head", 0, 0, (), (("dataset_dir", str(tmp_path)),), tmp_path / network)


def test_epochs_fit_into_the_time_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = tuple(child(tmp_path, n) for n in paper.NAMES)
    plan = Plan("dbt_mass", tmp_path, tmp_path, "e", None, children, {}, {})
    took = {"mask_rcnn_3d": 20.0, "mask_rcnn_2d": 900.0}
    monkeypatch.setattr(paper, "_epoch_seconds", lambda _, child: took[child.network])
    given = [Setting("max_epochs", "7", "faster_rcnn_2d")]
    expected = {"mask_rcnn_3d": 5, "mask_rcnn_2d": 1}
    assert paper._epochs(tmp_path, plan, given, 100) == expected
    monkeypatch.delattr(paper, "_epoch_seconds")
    assert paper._epochs(tmp_path, plan, given, 100) == expected
    assert [str(s) for s in paper._schedule(expected)] == [
        "mask_rcnn_3d:max_epochs=5", "mask_rcnn_2d:max_epochs=1",
        "mask_rcnn_3d:val_interval=6", "mask_rcnn_2d:val_interval=2",
    ]  # fmt: skip


def test_an_epoch_is_timed_on_a_few_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"fold": i % 5} for i in range(100)]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": items}))
    seen: list[list[str]] = []

    def run(words: list[str], **_: Any) -> None:
        seen.append(words)
        (tmp_path / "timing" / "n").mkdir(parents=True)
        (tmp_path / "timing" / "n" / "train.log").write_text("epoch 1/2 a=1 seconds=9.0\nepoch 2/2 a=1 seconds=4.0\n")
        return paper.subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(paper.subprocess, "run", run)
    assert paper._epoch_seconds(tmp_path, child(tmp_path, "n")) == pytest.approx(4 * 80 / paper.TIMED)
    assert seen[0][seen[0].index("--max_epochs") + 1] == "2"


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_an_impossible_time_is_refused(tmp_path: Path, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds is"):
        paper.paper(tmp_path, seconds=seconds)
