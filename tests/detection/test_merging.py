"""Merging of boxes from overlapping patches: hand-computed clusters, and a plain loop over boxes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.detection.merging import merge_boxes, weighted_box_clustering
from medseg.detection.nms import nms_3d

A, A_SHIFTED, FAR = [0.0, 0, 0, 4, 4, 4], [0.0, 0, 1, 4, 4, 5], [0.0, 0, 20, 4, 4, 24]  # IoU of the first two: 0.6


def tensors(boxes, scores, weights=None, expected=None):
    count = len(boxes)
    weights, expected = weights or [1.0] * count, expected or [1.0] * count
    return torch.tensor(boxes).reshape(count, 6), torch.tensor(scores), torch.tensor(weights), torch.tensor(expected)


def random_case(n, seed):
    rng = np.random.default_rng(seed)
    centres, sizes = rng.uniform(0, 30, (n, 3)), rng.uniform(4, 12, (n, 3))
    boxes = np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)
    arrays = boxes, rng.random(n), rng.choice([0.5, 1.0], n), rng.integers(1, 5, n).astype(float)
    return tuple(torch.from_numpy(a) for a in arrays)


def iou(a, b):
    inter = np.prod(np.maximum(np.minimum(a[3:], b[3:]) - np.maximum(a[:3], b[:3]), 0))
    return inter / (np.prod(a[3:] - a[:3]) + np.prod(b[3:] - b[:3]) - inter)


def by_definition(boxes, scores, weights, expected, threshold):
    left, merged = list(np.argsort(-scores, kind="stable")), []
    while left:
        cluster = [i for i in left if iou(boxes[left[0]], boxes[i]) >= threshold]
        left = [i for i in left if i not in cluster]
        vote, weight = scores[cluster] * weights[cluster], weights[cluster]
        missing = max(expected[cluster].mean() - len(cluster), 0)
        box = (vote[:, None] * boxes[cluster]).sum(0) / vote.sum()
        merged.append((vote.sum() / (weight.sum() + missing * weight.mean()), box, cluster))
    return sorted(merged, key=lambda m: -m[0])


def test_mean_weighted_by_score_and_weight():
    boxes, scores, members = weighted_box_clustering(*tensors([A, FAR, A_SHIFTED], [0.9, 0.5, 0.6], [1.0, 1.0, 0.5]))
    # Votes 0.9 and 0.3: the shift of 1 counts a quarter; score (0.9 + 0.3) / 1.5.
    torch.testing.assert_close(boxes, torch.tensor([[0, 0, 0.25, 4, 4, 4.25], FAR]))
    torch.testing.assert_close(scores, torch.tensor([0.8, 0.5]))
    assert [m.tolist() for m in members] == [[0, 2], [1]]


@pytest.mark.parametrize(
    ("found", "expected", "score"), [(1, 4, 0.2), (2, 4, 0.4), (4, 4, 0.8), (5, 4, 0.8), (1, 1, 0.8)]
)
def test_patches_without_the_box_count_as_zeros(found, expected, score):
    _, scores, members = weighted_box_clustering(*tensors([A] * found, [0.8] * found, None, [float(expected)] * found))
    torch.testing.assert_close(scores, torch.tensor([score]))
    assert members[0].tolist() == list(range(found))


def test_a_penalised_box_falls_behind():
    boxes, scores, members = weighted_box_clustering(*tensors([A, FAR], [0.9, 0.5], None, [4.0, 1.0]))
    assert boxes.tolist() == [FAR, A]
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.225]))
    assert [m.tolist() for m in members] == [[1], [0]]


def test_membership_is_by_iou_with_the_best_box_only():
    chain = [A, A_SHIFTED, [0.0, 0, 2, 4, 4, 6]]  # 0.6, 0.6 for neighbours, 1/3 for the ends
    assert [m.tolist() for m in weighted_box_clustering(*tensors(chain, [0.9, 0.8, 0.7]), 0.5)[2]] == [[0, 1], [2]]
    assert [m.tolist() for m in weighted_box_clustering(*tensors(chain, [0.8, 0.9, 0.7]), 0.5)[2]] == [[1, 0, 2]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 30), threshold=st.sampled_from([0.1, 0.2, 0.5]))
def test_plain_loop_over_boxes(seed, n, threshold):
    case = random_case(n, seed)
    boxes, scores, members = weighted_box_clustering(*case, threshold)
    expected = by_definition(*(c.numpy() for c in case), threshold)
    assert [m.tolist() for m in members] == [m for _, _, m in expected]
    np.testing.assert_allclose(scores.numpy(), [s for s, _, _ in expected], rtol=1e-10)
    np.testing.assert_allclose(boxes.numpy(), [b for _, b, _ in expected], rtol=1e-10)
    assert sorted(torch.cat(members).tolist()) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), threshold=st.sampled_from([0.0, 0.1, 0.5]))
def test_nms_keeps_boxes_and_scores_and_names_what_it_removed(seed, n, threshold):
    boxes, scores, weights, expected = random_case(n, seed)
    merged, merged_scores, members = merge_boxes(boxes, scores, weights, expected, "nms", threshold)
    kept = [int(m[0]) for m in members]
    assert sorted(kept) == sorted(nms_3d(boxes, scores * weights, threshold).tolist())
    assert torch.equal(merged, boxes[kept])
    assert torch.equal(merged_scores, scores[kept])
    assert (merged_scores.diff() <= 0).all()
    assert sorted(torch.cat(members).tolist()) == list(range(n))
    assert all(iou(boxes[m[0]].numpy(), boxes[i].numpy()) > threshold for m in members for i in m[1:])


def test_nms_prefers_the_whole_box_to_the_one_at_the_border_of_its_patch():
    case = tensors([A, A_SHIFTED], [0.9, 0.6], [0.5, 1.0])
    boxes, scores, members = merge_boxes(*case, "nms", 0.2)
    assert boxes.tolist() == [A_SHIFTED]
    assert [m.tolist() for m in members] == [[1, 0]]
    torch.testing.assert_close(scores, torch.tensor([0.6]))


def test_wbc_is_weighted_box_clustering():
    case = random_case(20, 0)
    for found, expected in zip(merge_boxes(*case, "wbc", 0.3), weighted_box_clustering(*case, 0.3), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["wbc", "nms"])
def test_nothing_in_nothing_out(method):
    boxes, scores, members = merge_boxes(*tensors([], []), method, 0.2)
    assert boxes.shape == (0, 6)
    assert scores.shape == (0,)
    assert members == []


@pytest.mark.parametrize("method", ["wbc", "nms"])
def test_boxes_without_volume_and_scores_of_zero_stay_finite(method):
    boxes, scores, members = merge_boxes(*tensors([[1.0] * 6, A, A_SHIFTED], [0.0, 0.0, 0.0]), method, 0.2)
    assert len(members) == 2
    assert torch.isfinite(boxes).all()
    assert scores.tolist() == [0, 0]


def test_inputs_stay_as_they_were_and_outputs_are_new():
    case = random_case(10, 1)
    before = [c.clone() for c in case]
    for method in ("wbc", "nms"):
        boxes, scores, _ = merge_boxes(*case, method, 0.2)
        boxes += 1
        scores += 1
    assert all(torch.equal(a, b) for a, b in zip(case, before, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": torch.zeros(1, 4)}, r"boxes has shape \(1, 4\)"),
        ({"boxes": torch.zeros(1, 6, dtype=torch.int64)}, "floating-point"),
        ({"boxes": torch.tensor([[0, 0, 0, 1, 1, float("nan")]])}, "boxes holds NaN"),
        ({"scores": torch.ones(2)}, r"scores has shape \(2,\) for 1 boxes"),
        ({"scores": torch.tensor([1.2])}, r"scores holds a value outside \[0, 1\]"),
        ({"weights": torch.tensor([0.0])}, "weights holds a value that is not positive"),
        ({"expected": torch.tensor([0.5])}, "expected holds a value below 1"),
        ({"method": "mean"}, "method is 'mean'; pass one of 'nms', 'wbc'"),
        ({"iou_threshold": 0.0}, "iou_threshold is 0"),
    ],
)
def test_says_what_is_wrong(change, message):
    names = ("boxes", "scores", "weights", "expected")
    with pytest.raises(ValueError, match=message):
        merge_boxes(**{**dict(zip(names, tensors([A], [0.9]), strict=True)), "method": "wbc", **change})
