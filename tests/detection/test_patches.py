"""Whole volumes patch by patch: cover, skipping, merging, and masks in their place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from medseg.detection.patches import PatchDetection, paste_masks, patch_starts
from medseg.detection.roi_heads import Detections

MASK = (4, 6, 6)


class BrightBoxes:
    """Stands for a network: finds every marked box in a patch. Objects are cubes whose voxels hold 1, 2, 3, ... ;
    other tissue is 0.5. The score falls with what the patch cuts off.
    """

    def __init__(self, sizes: dict[int, int]) -> None:
        self.sizes, self.calls, self.patches, self.least = sizes, 0, 0, 0.0

    def __call__(self, patches: torch.Tensor) -> list[Detections]:
        self.calls += 1
        self.patches += len(patches)
        found = []
        for patch in patches[:, 0]:
            boxes, scores = [], []
            for value, voxels in self.sizes.items():
                places = (patch == value).nonzero()
                if len(places) > self.least * voxels:
                    boxes.append(torch.cat([places.amin(0), places.amax(0) + 1]).float())
                    scores.append(0.9 * len(places) / voxels)
            order = torch.tensor(scores).argsort(descending=True)
            box = torch.stack(boxes)[order] if boxes else torch.zeros(0, 6)
            found.append(Detections(box, torch.tensor(scores)[order], torch.ones(len(boxes), *MASK)))
        return found


def volume_with(shape: tuple[int, int, int], *boxes: tuple[int, ...]) -> tuple[torch.Tensor, BrightBoxes]:
    volume = torch.full(shape, 0.5)
    sizes = {}
    for value, (d0, h0, w0, d1, h1, w1) in enumerate(boxes, start=1):
        volume[d0:d1, h0:h1, w0:w1] = value
        sizes[value] = (d1 - d0) * (h1 - h0) * (w1 - w0)
    return volume[None, None], BrightBoxes(sizes)


@given(st.tuples(*[st.integers(1, 60)] * 3), st.tuples(*[st.integers(1, 40)] * 3), st.floats(0, 0.9, allow_nan=False))
def test_patches_cover_every_voxel_with_the_overlap(shape, size, overlap):
    starts = patch_starts(shape, size, overlap)
    assert len(set(starts)) == len(starts)
    for axis in range(3):
        on_axis = sorted({start[axis] for start in starts})
        assert on_axis[0] == 0
        assert on_axis[-1] == max(0, shape[axis] - size[axis]), "flush with the end, not beyond it"
        steps = np.diff(on_axis)
        # evenly spaced starts are rounded: by less than a voxel
        assert (steps <= max(1, size[axis] * (1 - overlap)) + 0.999).all()
        assert (steps <= size[axis]).all(), "no gap"
    assert len(starts) == np.prod([len({s[a] for s in starts}) for a in range(3)])


@pytest.mark.parametrize("merge", ["wbc", "nms"])
def test_an_object_between_patches_is_found_once(merge):
    volume, network = volume_with((8, 40, 40), (2, 15, 4, 6, 23, 12))
    detect = PatchDetection((8, 24, 24), overlap=0.3, merge=merge, iou_threshold=0.2)
    found = detect(volume, network)
    assert network.patches == 4
    assert found["boxes"].shape == (1, 1, 6)
    box = found["boxes"][0, 0].numpy()
    if merge == "nms":  # the whole one of a neighbour wins
        np.testing.assert_array_equal(box, [2, 15, 4, 6, 23, 12])
    else:
        assert (np.abs(box - [2, 15, 4, 6, 23, 12]) < 2).all()
    assert found["scores"].shape == (1, 1)
    inside = found["probability"][0, 0, 2:6, 17:22, 5:11]
    assert (inside > 0.5).all()


def test_boxes_lie_in_the_volume_and_by_falling_score():
    """Objects that no overlap touches: every box and score is exactly what the network gave."""
    boxes = [(1, 2, 3, 4, 8, 9), (2, 30, 32, 7, 38, 39), (0, 2, 30, 8, 10, 38)]
    volume, network = volume_with((8, 40, 40), *boxes)
    network.sizes[1] *= 2  # a lower score
    found = PatchDetection((8, 20, 20), overlap=0.0)(volume, network)
    assert {tuple(b) for b in found["boxes"][0].round(decimals=4).tolist()} == set(boxes)
    assert found["scores"][0].tolist() == pytest.approx([0.9, 0.9, 0.45])
    assert found["masks"].shape == (1, 3, *MASK)
    expected = torch.zeros(8, 40, 40)
    for d0, h0, w0, d1, h1, w1 in boxes:
        expected[d0:d1, h0:h1, w0:w1] = 1
    torch.testing.assert_close(found["probability"][0, 0], expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_skipping_empty_patches_changes_nothing_but_the_time(batch_size):
    """Objects that the network sees only whole, and every one is whole in some patch."""
    volume, network = volume_with((8, 96, 96), (2, 6, 6, 6, 14, 14), (1, 40, 10, 7, 50, 20), (3, 80, 24, 5, 88, 32))
    volume[..., 36:] = 0  # no body
    network.least = 0.99
    results, patches = [], []
    for skip_below in (None, 0.0, 0.02):
        network.patches = 0
        detect = PatchDetection((8, 24, 24), 0.5, skip_below=skip_below, batch_size=batch_size, merge="nms")
        results.append(detect(volume, network))
        patches.append(network.patches)
    assert patches == [49, 14, 14]
    assert results[0]["boxes"].shape[1] == 3
    for other in results[1:]:
        assert {tuple(b) for b in other["boxes"][0].tolist()} == {tuple(b) for b in results[0]["boxes"][0].tolist()}
        torch.testing.assert_close(other["scores"], results[0]["scores"], rtol=0, atol=0)
        torch.testing.assert_close(other["probability"], results[0]["probability"], rtol=0, atol=1e-5)


def test_patches_with_a_sliver_of_the_body_are_skipped():
    volume = torch.zeros(4, 20, 20)
    volume[1, :10, :10] = 1
    volume[0, 19, 19] = 1
    grid = {(0, 0, 0), (0, 0, 10), (0, 10, 0), (0, 10, 10)}
    assert set(PatchDetection((4, 10, 10), 0.0, None).starts(volume)) == grid
    assert set(PatchDetection((4, 10, 10), 0.0, 0.0).starts(volume)) == {(0, 0, 0), (0, 10, 10)}
    assert set(PatchDetection((4, 10, 10), 0.0, 0.01).starts(volume)) == {(0, 0, 0), (0, 10, 10)}
    assert set(PatchDetection((4, 10, 10), 0.0, 0.011).starts(volume)) == {(0, 0, 0)}
    assert PatchDetection((4, 10, 10)).starts(torch.zeros(4, 20, 20)) == []


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)), st.tuples(st.integers(3, 16), st.integers(3, 16)),
    st.floats(0, 0.8), st.data(),
)  # fmt: skip
def test_the_grid_covers_the_whole_body_and_stays_inside(shape, size, overlap, data):
    low = [data.draw(st.integers(0, n - 1)) for n in shape]
    high = [data.draw(st.integers(a + 1, n)) for a, n in zip(low, shape, strict=True)]
    volume = torch.zeros(4, *shape)
    volume[1, low[0] : high[0], low[1] : high[1]] = 1
    covered = torch.zeros(shape, dtype=torch.bool)
    starts = PatchDetection((4, *size), overlap, 0.0).starts(volume)
    assert len(starts) <= len(patch_starts((4, *shape), (4, *size), overlap))
    for d, h, w in starts:
        assert d == 0
        assert 0 <= h <= max(0, shape[0] - size[0])
        assert 0 <= w <= max(0, shape[1] - size[1])
        covered[h : h + size[0], w : w + size[1]] = True
    assert covered[low[0] : high[0], low[1] : high[1]].all()


def test_a_box_in_the_outer_half_of_an_overlap_counts_less():
    detect = PatchDetection((10, 20, 20), overlap=0.4, edge_weight=0.5)  # a band of 4 voxels in h and w, 2 in d
    starts = [(0, h, w) for h in (0, 10, 20) for w in (0, 10, 20)]

    def weight(start, centre):
        box = torch.tensor([[*centre, *centre]], dtype=torch.float32)
        return detect._weights(box, start, starts).item()

    assert weight((0, 0, 0), (5, 2, 2)) == 1, "no neighbour on this side"
    assert weight((0, 0, 0), (5, 15.9, 10)) == 1
    assert weight((0, 0, 0), (5, 16.1, 10)) == 0.5
    assert weight((0, 20, 0), (5, 3.9, 10)) == 0.5
    assert weight((0, 20, 0), (5, 18, 10)) == 1, "the end of the volume"
    assert weight((0, 10, 10), (0.5, 10, 10)) == 1, "the only patch along d"


@pytest.mark.parametrize("merge", ["wbc", "nms"])
def test_flipped_views_are_turned_back(merge):
    boxes = [(1, 2, 3, 4, 8, 9), (2, 14, 8, 7, 19, 19)]
    volume, network = volume_with((8, 20, 24), *boxes)
    plain = PatchDetection((8, 20, 24), merge=merge)(volume, network)
    assert network.patches == 1
    flips = [[0], [1], [2], [0, 1, 2]]
    turned = PatchDetection((8, 20, 24), merge=merge, flips=flips)(volume, network)
    assert network.patches == 1 + 5
    for key in ("boxes", "scores", "probability"):
        torch.testing.assert_close(turned[key], plain[key])


def test_masks_of_flipped_views_are_turned_back():
    """The network marks the half of a box with lower rows, in whatever view: both halves get half of the votes."""
    volume = torch.ones(1, 1, 4, 12, 8)
    half = torch.zeros(1, *MASK)
    half[:, :, :3] = 1

    def network(patches):
        return [Detections(torch.tensor([[0.0, 0, 0, 4, 12, 8]]), torch.tensor([0.8]), half)] * len(patches)

    found = PatchDetection((4, 12, 8), flips=[[1]])(volume, network)
    torch.testing.assert_close(found["masks"][0, 0], torch.full(MASK, 0.5))
    found = PatchDetection((4, 12, 8), flips=[[2]])(volume, network)
    torch.testing.assert_close(found["masks"][0, 0], half[0])


def test_a_short_volume_is_padded():
    volume, _ = volume_with((5, 30, 12), (1, 4, 4, 4, 10, 10))
    seen = []

    def network(patches):
        seen.append(patches)
        return [Detections(torch.tensor([[1.0, 4, 4, 4, 10, 10]]), torch.tensor([0.7]), torch.ones(1, *MASK))] * len(
            patches
        )

    found = PatchDetection((8, 32, 16), overlap=0.25)(volume, network)
    assert seen[0].shape == (1, 1, 8, 32, 16)
    torch.testing.assert_close(seen[0][0, 0, :5, :30, :12], volume[0, 0])
    assert seen[0].sum() == volume.sum()
    assert found["probability"].shape == (1, 1, 5, 30, 12)
    assert found["boxes"][0].tolist() == [[1, 4, 4, 4, 10, 10]]


def trilinear(mask: np.ndarray, place: list[float]) -> float:
    """Value at a place in voxel-centre indices, the edge continued."""
    total = 0.0
    low = [int(np.floor(p)) for p in place]
    for corner in np.ndindex(2, 2, 2):
        weight, index = 1.0, []
        for axis in range(3):
            fraction = place[axis] - low[axis]
            weight *= fraction if corner[axis] else 1 - fraction
            index.append(int(np.clip(low[axis] + corner[axis], 0, mask.shape[axis] - 1)))
        total += weight * mask[tuple(index)]
    return total


corners = st.tuples(*[st.floats(-4, 10, width=32)] * 3)
sides = st.tuples(*[st.floats(0.5, 12, width=32)] * 3)


@settings(max_examples=30, deadline=None)
@given(corners, sides, st.integers(0, 2**31))
def test_pasted_masks_are_trilinear(corner, side, seed):
    shape = (6, 8, 7)
    mask = np.random.default_rng(seed).random((3, 4, 5)).astype(np.float32)
    box = np.array([*corner, *np.add(corner, side)], np.float32)
    where, pasted = next(paste_masks(torch.from_numpy(box)[None], torch.from_numpy(mask)[None], shape))
    whole = np.zeros(shape)
    whole[where] = pasted.numpy()
    for voxel in np.ndindex(*shape):
        share = [(v + 0.5 - box[a]) / (box[a + 3] - box[a]) for a, v in enumerate(voxel)]
        if any(abs(s) < 1e-4 or abs(s - 1) < 1e-4 for s in share):
            continue  # a centre on the edge: rounding decides
        inside = all(0 <= s <= 1 for s in share)
        expected = trilinear(mask, [s * n - 0.5 for s, n in zip(share, mask.shape, strict=True)]) if inside else 0.0
        assert whole[voxel] == pytest.approx(expected, abs=1e-3)


def test_a_mask_on_the_grid_of_its_box_is_kept_as_it_is():
    mask = torch.rand(1, 3, 4, 5)
    where, pasted = next(paste_masks(torch.tensor([[2.0, 1, 3, 5, 5, 8]]), mask, (10, 10, 10)))
    assert where == (slice(2, 5), slice(1, 5), slice(3, 8))
    torch.testing.assert_close(pasted, mask[0])


def test_an_enlarged_mask_keeps_its_mass():
    """Twice as large along each axis: eight times the sum, in the interior of a mask that falls to 0 at its edges."""
    mask = torch.zeros(1, 6, 8, 8)
    mask[0, 2:4, 2:6, 2:6] = torch.rand(2, 4, 4)
    _, pasted = next(paste_masks(torch.tensor([[0.0, 0, 0, 12, 16, 16]]), mask, (12, 16, 16)))
    assert pasted.sum().item() == pytest.approx(8 * mask.sum().item(), rel=1e-5)


def test_a_box_beyond_the_volume_is_cut():
    mask = torch.ones(2, 2, 2, 2)
    boxes = torch.tensor([[-3.0, -2, -2, 2, 2, 2], [20, 20, 20, 24, 24, 24]])
    (first, inside), (second, outside) = paste_masks(boxes, mask, (5, 5, 5))
    assert inside.shape == (2, 2, 2)
    assert (inside == 1).all()
    assert first == (slice(0, 2),) * 3
    assert outside.numel() == 0
    assert torch.zeros(5, 5, 5)[second].shape == outside.shape


def test_merged_masks_are_the_score_weighted_mean():
    """Two patches see the same object; one calls its left half, with three times the score the other all of it."""
    volume = torch.ones(1, 1, 4, 8, 24)
    half = torch.ones(1, *MASK)
    half[..., 3:] = 0

    def network(patches):
        left = Detections(torch.tensor([[0.0, 0, 8, 4, 8, 16]]), torch.tensor([0.6]), torch.ones(1, *MASK))
        right = Detections(torch.tensor([[0.0, 0, 0, 4, 8, 8]]), torch.tensor([0.2]), half)
        return [left, right]

    detect = PatchDetection((4, 8, 16), overlap=0.5, skip_below=None, batch_size=2, merge="wbc", edge_weight=1.0)
    found = detect(volume, network)
    assert found["boxes"][0].tolist() == [[0, 0, 8, 4, 8, 16]]
    assert found["scores"][0].tolist() == pytest.approx([0.4])
    mask = found["masks"][0, 0]
    torch.testing.assert_close(mask[..., :3], torch.ones(4, 6, 3))
    torch.testing.assert_close(mask[..., 3:], torch.full((4, 6, 3), 0.75))


@pytest.mark.parametrize("segment", [None, lambda volume, boxes: torch.zeros(len(boxes), 3, 3, 3)])
def test_nothing_found(segment: Callable[..., torch.Tensor] | None):
    volume, network = volume_with((8, 40, 40))
    found = PatchDetection((8, 24, 24), segment=segment)(volume, network)
    assert network.calls == 4
    assert (found["boxes"].shape, found["scores"].shape, found["masks"].shape[:2]) == ((1, 0, 6), (1, 0), (1, 0))
    assert found["probability"].shape == volume.shape
    assert not found["probability"].any()
    empty = PatchDetection((8, 24, 24), segment=segment)(torch.zeros_like(volume), network)
    assert network.calls == 4, "an empty volume needs no network"
    assert empty["boxes"].shape == (1, 0, 6)


def test_masks_of_another_method_are_made_once_for_the_merged_boxes():
    volume, network = volume_with((8, 40, 40), (2, 15, 4, 6, 25, 12))
    asked = []

    def segment(whole, boxes):
        asked.append((whole.shape, len(boxes)))
        return torch.full((len(boxes), 2, 2, 2), 0.25)

    found = PatchDetection((8, 24, 24), overlap=0.5, segment=segment, merge="nms")(volume, network)
    assert asked == [((8, 40, 40), 1)]
    assert found["probability"].max().item() == pytest.approx(0.25)


def test_low_scores_go():
    volume, network = volume_with((8, 20, 20), (1, 2, 3, 4, 8, 9))
    assert PatchDetection((8, 20, 20), score_threshold=0.95)(volume, network)["boxes"].shape == (1, 0, 6)


def test_results_are_plain_tensors():
    volume, network = volume_with((8, 20, 20), (1, 2, 3, 4, 8, 9))
    found = PatchDetection((8, 20, 20))(MetaTensor(volume), network)
    assert all(type(value) is torch.Tensor for value in found.values())


@pytest.mark.parametrize("shape", [(2, 1, 8, 20, 20), (1, 2, 8, 20, 20), (1, 8, 20, 20)])
def test_several_volumes_are_refused(shape):
    with pytest.raises(ValueError, match=r"give one at a time, \(1, 1, D, H, W\)"):
        PatchDetection((8, 20, 20))(torch.ones(shape), BrightBoxes({}))


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_an_impossible_overlap_is_refused(overlap):
    with pytest.raises(ValueError, match=r"give a share of a patch in \[0, 1\)"):
        PatchDetection((8, 20, 20), overlap=overlap)


@pytest.mark.parametrize("flips", [[[0]], [[1], [2]], [[0, 1]]])
def test_flipped_patches_give_the_boxes_of_the_volume(flips):
    """A network that marks the brightest block of a patch: turned back, all passes agree."""
    volume = torch.full((1, 1, 8, 24, 20), 0.1)
    volume[0, 0, 1:4, 3:11, 5:9] = 1.0

    def network(patches):
        found = []
        for patch in patches[:, 0]:
            places = torch.nonzero(patch > 0.5)
            low, high = places.amin(dim=0), places.amax(dim=0) + 1
            box = torch.cat([low, high])[None].float()
            found.append(Detections(box, torch.tensor([0.8]), torch.ones(1, 4, 4, 4)))
        return found

    plain = PatchDetection((8, 24, 20))(volume, network)
    turned = PatchDetection((8, 24, 20), flips=flips)(volume, network)
    torch.testing.assert_close(turned["boxes"], plain["boxes"])
    torch.testing.assert_close(turned["scores"], plain["scores"])
    assert turned["boxes"][0, 0].tolist() == [1, 3, 5, 4, 11, 9]


def test_a_flip_turns_the_masks_back():
    volume = torch.ones(1, 1, 8, 8, 8)
    corner = torch.zeros(1, 4, 4, 4)
    corner[0, 0, 0, 0] = 1.0  # of the patch as it is seen

    def network(patches):
        return [Detections(torch.tensor([[0.0, 0, 0, 8, 8, 8]]), torch.tensor([0.9]), corner) for _ in patches]

    masks = PatchDetection((8, 8, 8), flips=[[0]])(volume, network)["masks"][0, 0]
    assert masks[0, 0, 0] == masks[3, 0, 0] == 0.5
