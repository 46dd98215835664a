"""roi_align_3d against torchvision's roi_align where the cases are equal, and against sample-by-sample NumPy."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from medseg.detection.roi_align import roi_align_3d


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_boxes(n, images, extent, rng):
    """(n, 7), parts of them outside of the image."""
    extent = np.asarray(extent)
    corners = np.sort(rng.uniform(-0.4, 1.4, (n, 2, 3)) * extent, axis=1).reshape(n, 6)
    return torch.from_numpy(np.concatenate([rng.integers(0, images, (n, 1)), corners], 1))


def sample(volume, point):
    """Trilinear value at an index coordinate, as torchvision defines it at the borders."""
    if any(p < -1 or p > n for p, n in zip(point, volume.shape, strict=True)):
        return 0.0
    point = [min(max(p, 0), n - 1) for p, n in zip(point, volume.shape, strict=True)]
    value = 0.0
    for corner in itertools.product((0, 1), repeat=3):
        weight, index = 1.0, []
        for p, c, n in zip(point, corner, volume.shape, strict=True):
            low = math.floor(p)
            weight *= p - low if c else 1 - (p - low)
            index.append(min(low + c, n - 1))
        value += weight * volume[tuple(index)]
    return value


def brute_force(features, boxes, size, scale, ratio):
    out = np.zeros((len(boxes), features.shape[1], *size))
    for n, c in itertools.product(range(len(boxes)), range(features.shape[1])):
        low, high = boxes[n, 1:4] * scale - 0.5, boxes[n, 4:] * scale - 0.5
        for cell in np.ndindex(*size):
            offsets = itertools.product(*((np.arange(ratio) + 0.5) / ratio for _ in range(3)))
            points = [low + (np.array(cell) + o) * (high - low) / size for o in offsets]
            out[(n, c, *cell)] = np.mean([sample(features[int(boxes[n, 0]), c], p) for p in points])
    return out


@pytest.mark.parametrize("ratio", [1, 2, 3])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.3])
def test_torchvision_on_features_that_are_constant_along_one_axis(ratio, scale):
    """Along each axis in turn; torchvision takes boxes as x, y."""
    rng = np.random.default_rng(0)
    plane = torch.from_numpy(rng.standard_normal((2, 3, 9, 12)))
    boxes = random_boxes(25, 2, (1, 9 / scale, 12 / scale), rng)
    expected = roi_align(plane, boxes[:, [0, 3, 2, 6, 5]], (4, 6), scale, ratio, aligned=True)
    for axis in range(3):
        features = torch.stack([plane] * 7, dim=2 + axis)
        where = [1, 2]
        where.insert(axis, 0)  # which of (constant, rows, columns) each of d, h and w is
        inside = torch.tensor([0.0, 7 / scale], dtype=torch.float64).expand(25, 2)
        low = torch.stack([inside[:, 0], boxes[:, 2], boxes[:, 3]], 1)[:, where]
        high = torch.stack([inside[:, 1], boxes[:, 5], boxes[:, 6]], 1)[:, where]
        size = [(2, 4, 6)[i] for i in where]
        found = roi_align_3d(features, torch.cat([boxes[:, :1], low, high], 1), size, scale, ratio)
        torch.testing.assert_close(found.select(2 + axis, 0), expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(found.select(2 + axis, 1), expected, atol=1e-10, rtol=0)


def test_torchvision_on_single_slices():
    """A box of exactly one slice, one sample along it: that slice alone, forward and backward."""
    rng = np.random.default_rng(1)
    features = torch.from_numpy(rng.standard_normal((1, 2, 5, 8, 8))).requires_grad_()
    boxes = random_boxes(12, 1, (5, 8, 8), rng)
    boxes[:, 1] = torch.arange(12) % 5
    boxes[:, 4] = boxes[:, 1] + 1
    found = roi_align_3d(features, boxes, (1, 3, 4), sampling_ratio=1)
    flat = torch.cat([boxes[:, 1:2], boxes[:, [3, 2, 6, 5]]], 1)  # slices as images
    expected = roi_align(features[0].transpose(0, 1), flat, (3, 4), 1.0, 1, aligned=True)
    torch.testing.assert_close(found[:, :, 0], expected, atol=1e-10, rtol=0)
    weights = torch.from_numpy(rng.standard_normal(expected.shape))
    grads = [torch.autograd.grad((v * weights).sum(), features)[0] for v in (found[:, :, 0], expected)]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-10, rtol=0)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(*[st.integers(1, 5)] * 3),
    size=st.tuples(*[st.integers(1, 3)] * 3),
    ratio=st.integers(1, 3),
    scale=st.tuples(*[st.sampled_from([0.25, 0.5, 1.0, 1.7])] * 3),
)
def test_sample_by_sample(seed, shape, size, ratio, scale):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, 1, *shape))
    boxes = random_boxes(3, 2, np.array(shape) / scale, rng)
    found = roi_align_3d(torch.from_numpy(features), boxes, size, scale, ratio)
    expected = brute_force(features, boxes.numpy(), size, np.array(scale), ratio)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)


def test_gradient_of_features():
    rng = np.random.default_rng(2)
    features = torch.from_numpy(rng.standard_normal((2, 2, 4, 5, 3))).requires_grad_()
    boxes = random_boxes(6, 2, (4, 5, 3), rng)
    boxes[0, 1:] = torch.tensor([20, 20, 20, 30, 30, 30])  # wholly outside
    assert torch.autograd.gradcheck(lambda f: roi_align_3d(f, boxes, (2, 3, 2)), (features,))


def test_outside_is_zero_and_the_border_counts_up_to_one_voxel_away():
    features = torch.ones(1, 1, 4, 4, 4)
    boxes = torch.tensor([[0.0, 0, 0, -3, 4, 4, -1], [0, 0, 0, -0.5, 4, 4, 0.5], [0, 0, 0, 5, 4, 4, 7]])
    found = roi_align_3d(features, boxes, (1, 1, 2), sampling_ratio=1)[:, 0, 0, 0]
    # Sampled at index -3 and -2; at -0.75 and -0.25; at 5 and 6.
    assert found.tolist() == [[0, 0], [1, 1], [0, 0]]


def test_a_ramp_gives_the_centres_of_the_cells():
    ramp = torch.arange(16.0)[:, None, None].expand(1, 1, 16, 4, 4)
    found = roi_align_3d(ramp, torch.tensor([[0.0, 6, 1, 1, 18, 3, 3]]), (3, 1, 1), spatial_scale=(0.5, 1, 1))
    assert found.flatten().tolist() == [3.5, 5.5, 7.5]


def test_no_boxes():
    features = torch.rand(2, 5, 4, 4, 4, requires_grad=True)
    found = roi_align_3d(features, torch.zeros(0, 7), (1, 2, 3))
    assert found.shape == (0, 5, 1, 2, 3)
    found.sum().backward()
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_the_result(dtype):
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.standard_normal((1, 3, 6, 6, 6))).to(dtype).requires_grad_()
    boxes = random_boxes(8, 1, (6, 6, 6), rng)
    found = roi_align_3d(features, boxes, 3)
    assert found.dtype == dtype
    assert torch.equal(found, roi_align_3d(features.float(), boxes, 3).to(dtype))
    found.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == dtype


def test_autocast_changes_nothing():
    rng = np.random.default_rng(4)
    features = torch.from_numpy(rng.standard_normal((1, 3, 6, 6, 6))).float().requires_grad_()
    boxes = random_boxes(8, 1, (6, 6, 6), rng)
    expected = roi_align_3d(features, boxes, 3)
    gradient = torch.autograd.grad(expected.square().sum(), features)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = roi_align_3d(features, boxes, 3)
        found_gradient = torch.autograd.grad(found.square().sum(), features)[0]
    assert torch.equal(found, expected)
    assert torch.equal(found_gradient, gradient)


def test_memory_layout_does_not_matter():
    rng = np.random.default_rng(5)
    features = torch.from_numpy(rng.standard_normal((2, 4, 5, 6, 7)))
    boxes, before = random_boxes(8, 2, (5, 6, 7), rng), copy.deepcopy(features)
    expected = roi_align_3d(features, boxes, 2)
    last = features.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    found = roi_align_3d(last, boxes, 2)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    found.transpose(2, 4).square().sum().backward()  # a gradient that is not contiguous
    assert torch.equal(features, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    rng = np.random.default_rng(6)
    features = torch.from_numpy(rng.standard_normal((2, 4, 5, 6, 7)))
    boxes = random_boxes(8, 2, (5, 6, 7), rng)
    found = roi_align_3d(features.cuda(), boxes.cuda(), 2)
    torch.testing.assert_close(found.cpu(), roi_align_3d(features, boxes, 2), atol=1e-10, rtol=0)


FEATURES, BOX = torch.zeros(2, 1, 4, 4, 4), torch.tensor([[0.0, 0, 0, 0, 2, 2, 2]])


@pytest.mark.parametrize(
    ("features", "boxes", "options", "message"),
    [
        (FEATURES[0], BOX, {}, r"features has shape \(1, 4, 4, 4\)"),
        (FEATURES.int(), BOX, {}, "floating-point"),
        (FEATURES, BOX[:, 1:], {}, r"boxes has shape \(1, 6\); pass \(N, 7\)"),
        (FEATURES, BOX + 2, {}, r"boxes\[0\] is of image 2, the batch has images 0..1"),
        (FEATURES, BOX * float("nan"), {}, r"boxes\[0\] holds NaN"),
        (FEATURES, BOX, {"output_size": (3, 7)}, r"output_size is \(3, 7\)"),
        (FEATURES, BOX, {"output_size": 0}, "output_size is 0"),
        (FEATURES, BOX, {"spatial_scale": (0.5, 0.5)}, r"spatial_scale is \(0.5, 0.5\)"),
        (FEATURES, BOX, {"spatial_scale": 0}, "spatial_scale is 0"),
        (FEATURES, BOX, {"sampling_ratio": 0}, "sampling_ratio is 0"),
    ],
)
def test_says_what_is_wrong(features, boxes, options, message):
    with pytest.raises(ValueError, match=message):
        roi_align_3d(features, boxes, **{"output_size": 2, **options})
