"""nms_3d against MONAI's non_max_suppression, list by list, and against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.box_utils import non_max_suppression

from medseg.detection.nms import BLOCK, nms_3d


def spread(n, rng, extent=(64, 256, 256)):
    centres, sizes = rng.uniform(0, extent, (n, 3)), rng.uniform(8, 40, (n, 3))
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)


def clustered(n, rng, clusters=10):
    places = spread(clusters, rng)[rng.integers(0, clusters, n)]
    centres, sizes = (places[:, :3] + places[:, 3:]) / 2, places[:, 3:] - places[:, :3]
    centres, sizes = (
        centres + 0.1 * sizes * rng.standard_normal((n, 3)),
        sizes * np.exp(0.1 * rng.standard_normal((n, 3))),
    )
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)


def mixed_sizes(n, rng):
    """Extents over four orders of magnitude, some boxes within others."""
    centres, sizes = rng.uniform(0, 100, (n, 3)), 10 ** rng.uniform(-2, 2, (n, 1)) * rng.uniform(0.5, 1.5, (n, 3))
    return np.concatenate([centres - sizes / 2, centres + sizes / 2], 1)


def lattice(n, rng):
    """Whole numbers on a small lattice: many equal boxes, IoUs that equal a threshold, boxes without volume."""
    low = rng.integers(0, 6, (n, 3))
    return np.concatenate([low, low + rng.integers(0, 5, (n, 3))], 1).astype(float)


LAYOUTS = {"spread": spread, "clustered": clustered, "mixed": mixed_sizes, "lattice": lattice}


def by_definition(boxes, scores, threshold):
    """Greedy suppression, one pair of boxes after the other."""
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        for j in kept:
            sides = np.minimum(boxes[i, 3:], boxes[j, 3:]) - np.maximum(boxes[i, :3], boxes[j, :3])
            inter = np.prod(np.maximum(sides, 0))
            union = np.prod(boxes[i, 3:] - boxes[i, :3]) + np.prod(boxes[j, 3:] - boxes[j, :3]) - inter
            if union > 0 and inter / union > threshold:
                break
        else:
            kept.append(i)
    return kept


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_keeps_what_monai_keeps_in_the_same_order(layout, threshold):
    rng = np.random.default_rng(1)
    boxes = torch.tensor(LAYOUTS[layout](700, rng), dtype=torch.float32)
    scores = torch.tensor(rng.random(700), dtype=torch.float32)
    kept = nms_3d(boxes, scores, threshold)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, non_max_suppression(boxes, scores, threshold))


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.sampled_from([1, 2, 7, 60, BLOCK, BLOCK + 1, 3 * BLOCK]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    threshold=st.floats(0, 1),
    levels=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_boxes_as_monai(seed, n, layout, threshold, levels, dtype):
    rng = np.random.default_rng(seed)
    boxes = torch.tensor(LAYOUTS[layout](n, rng), dtype=dtype)
    scores = torch.tensor(rng.integers(0, levels, n) / levels, dtype=dtype)
    assert torch.equal(nms_3d(boxes, scores, threshold), non_max_suppression(boxes, scores, threshold))


@pytest.mark.parametrize("layout", ["spread", "clustered", "mixed"])
def test_the_definition_in_float64(layout):
    rng = np.random.default_rng(2)
    boxes, scores = LAYOUTS[layout](300, rng), rng.random(300)
    kept = nms_3d(torch.from_numpy(boxes).float(), torch.from_numpy(scores), 0.3)
    assert kept.tolist() == by_definition(boxes, scores, 0.3)


def test_boxes_far_from_the_origin():
    rng = np.random.default_rng(3)
    boxes = torch.tensor(spread(800, rng) + 1e5, dtype=torch.float32)
    scores = torch.tensor(rng.random(800), dtype=torch.float32)
    assert torch.equal(nms_3d(boxes, scores, 0.2), non_max_suppression(boxes, scores, 0.2))


def test_equal_scores_keep_their_order():
    box = torch.tensor([0.0, 0, 0, 2, 2, 2])
    boxes = torch.stack([box, box + 10, box, box + 10, box + 20])
    assert nms_3d(boxes, torch.full((5,), 0.5), 0.5).tolist() == [0, 1, 4]


def test_an_iou_equal_to_the_threshold_stays():
    boxes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 0, 2, 2, 1]])  # IoU 0.5
    assert nms_3d(boxes, torch.tensor([0.9, 0.8]), 0.5).tolist() == [0, 1]
    assert nms_3d(boxes, torch.tensor([0.9, 0.8]), 0.49).tolist() == [0]


def test_empty_and_without_volume():
    assert nms_3d(torch.zeros(0, 6), torch.zeros(0), 0.5).shape == (0,)
    assert nms_3d(torch.zeros(3, 6), torch.tensor([0.1, 0.3, 0.2]), 0.0).tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_types(dtype):
    boxes = torch.tensor([[0, 0, 0, 4, 4, 4], [0, 0, 1, 4, 4, 5], [0, 0, 8, 4, 4, 12]], dtype=dtype)
    assert nms_3d(boxes, torch.tensor([6, 9, 3]).to(dtype), 0.5).tolist() == [1, 2]


def test_inputs_stay_as_they_were():
    boxes = torch.tensor(spread(50, np.random.default_rng(4)), dtype=torch.float32, requires_grad=True)
    scores, before = torch.rand(50, requires_grad=True), boxes.detach().clone()
    nms_3d(boxes, scores, 0.1)
    assert torch.equal(boxes.detach(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    boxes = torch.tensor(spread(500, np.random.default_rng(5)), dtype=torch.float32)
    scores = torch.rand(500)
    kept = nms_3d(boxes.cuda(), scores.cuda(), 0.1)
    assert kept.is_cuda
    assert torch.equal(kept.cpu(), nms_3d(boxes, scores, 0.1))


BOX = [0.0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("boxes", "scores", "threshold", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2), 0.5, r"boxes has shape \(2, 4\); pass \(N, 6\)"),
        (torch.tensor([BOX]), torch.zeros(2), 0.5, r"scores has shape \(2,\) for 1 boxes"),
        (torch.tensor([BOX, [0, 0, float("nan"), 1, 1, 1]]), torch.zeros(2), 0.5, "boxes holds NaN.*index 1"),
        (torch.tensor([BOX]), torch.tensor([float("nan")]), 0.5, "scores holds NaN.*index 0"),
        (torch.tensor([BOX, [0, 0, 2, 1, 1, 1]]), torch.zeros(2), 0.5, r"boxes\[1\] has a maximum below"),
        (torch.tensor([BOX]) * 1e20, torch.zeros(1), 0.5, "too large"),
        (torch.tensor([BOX]), torch.zeros(1), 1.5, "iou_threshold is 1.5"),
        (torch.tensor([BOX]), torch.zeros(1), float("nan"), "iou_threshold is nan"),
    ],
)
def test_says_what_is_wrong(boxes, scores, threshold, message):
    with pytest.raises(ValueError, match=message):
        nms_3d(boxes, scores, threshold)
