"""The 3D Mask R-CNN: losses, sampling, levels, and that it learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data.box_utils import box_iou

from medseg.detection.patches import paste_masks
from medseg.detection.region_proposal import Proposals, RegionProposalNetwork
from medseg.detection.roi_heads import RoIHeads, RoISettings
from medseg.tasks.dbt_mass.network import MassRCNN3D

LOSSES = {"rpn_objectness", "rpn_box", "roi_class", "roi_box", "roi_mask"}
SHAPE = (16, 48, 48)


def small_network(seed: int = 0, **changes: Any) -> MassRCNN3D:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "spacing": (1.0, 1.0, 1.0), "depth": 10, "widths": (8, 8, 16, 16), "fpn_channels": 16, "max_pool": False,
        "stem": 3, "norm": ("instance", {"affine": True}), "anchors_per_level": 1, "box_convolutions": (),
        "box_hidden": 32, "mask_hidden": 16, "mask_convolutions": 1,
        "regions": {"box_size": (2, 4, 4), "mask_size": (4, 6, 6), "finest": True},
    }  # fmt: skip
    return MassRCNN3D(**settings | changes)


def phantom(*centres: tuple[int, int, int], radii=(4, 7, 7)) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A noisy volume (1, D, H, W) with bright ellipsoids, their boxes and masks."""
    d, h, w = torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij")
    masks = torch.stack(
        [sum(((x - c) / r) ** 2 for x, c, r in zip((d, h, w), centre, radii, strict=True)) < 1 for centre in centres]
    )
    boxes = torch.stack([torch.cat([m.nonzero().amin(0), m.nonzero().amax(0) + 1]) for m in masks]).float()
    generator = torch.Generator().manual_seed(1)
    image = 0.3 + 0.6 * masks.any(0) + 0.05 * torch.randn(SHAPE, generator=generator)
    return image[None], {"boxes": boxes, "masks": masks}


NOTHING = {"boxes": torch.zeros(0, 6), "masks": torch.zeros((0, *SHAPE), dtype=torch.bool)}


def test_losses_reach_every_parameter():
    network = small_network().train()
    (first, one), (second, two) = phantom((8, 20, 20)), phantom((8, 12, 14), (8, 34, 30))
    losses = network(torch.stack([first, second]), [one, two])
    assert set(losses) == LOSSES
    assert all(value.shape == () and torch.isfinite(value) and value > 0 for value in losses.values())
    sum(losses.values()).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_a_batch_without_any_object_teaches_what_is_none():
    network = small_network().train()
    losses = network(torch.rand(2, 1, *SHAPE), [NOTHING, NOTHING])
    assert set(losses) == LOSSES - {"roi_mask"}
    assert losses["rpn_box"] == 0
    assert losses["roi_box"] == 0
    sum(losses.values()).backward()
    assert network.proposals.objectness.weight.grad.any()
    assert network.heads.box_head.classes.weight.grad.any()


@pytest.mark.parametrize("without", [None, NOTHING])
def test_boxes_without_masks_train_everything_but_masks(without):
    image, target = phantom((8, 20, 20))
    boxes_only = {"boxes": target["boxes"], "masks": None}
    losses = small_network().train()(image[None], [boxes_only])
    assert set(losses) == LOSSES - {"roi_mask"}
    mixed = small_network().train()(torch.stack([image, image]), [boxes_only if without is None else NOTHING, target])
    assert set(mixed) == LOSSES, "one known mask is enough"
    assert torch.isfinite(mixed["roi_mask"])


@pytest.mark.parametrize("box", [(8, 10, 10, 9, 30, 30), (3, 10, 10, 12, 11, 30), (0, 0, 0, 1, 1, 1)])
def test_objects_of_one_voxel(box):
    masks = torch.zeros((1, *SHAPE), dtype=torch.bool)
    masks[0, box[0] : box[3], box[1] : box[4], box[2] : box[5]] = True
    network = small_network().train()
    losses = network(torch.rand(1, 1, *SHAPE), [{"boxes": torch.tensor([box]).float(), "masks": masks}])
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_no_proposal_at_all():
    heads = RoIHeads(4, RoISettings(box_size=(2, 2, 2), mask_size=(2, 2, 2)), (), 8, 4, 1)
    images, features = torch.zeros(1, 1, *SHAPE), [torch.rand(1, 4, 8, 12, 12)]
    none = [Proposals(torch.zeros(0, 6), torch.zeros(0))]
    (found,) = heads.detect(images, features, none)
    assert (found.boxes.shape, found.scores.shape, found.masks.shape) == ((0, 6), (0,), (0, 4, 4, 4))
    _, target = phantom((8, 20, 20))
    losses = heads.losses(images, features, none, [target])  # the true box and its copies are regions
    assert all(torch.isfinite(value) for value in losses.values())
    losses = heads.losses(images, features, none, [NOTHING])
    assert all(torch.isfinite(value) for value in losses.values()), losses


def test_one_ball_is_learnt():
    network = small_network(norm=("group", {"num_groups": 4})).train()
    image, target = phantom((8, 22, 20))
    sizes = target["boxes"][:, 3:] - target["boxes"][:, :3]
    network.proposals.set_anchors((sizes * torch.tensor([[0.8], [1.0], [1.3]]))[:, None])
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        sum(network(image[None], [target]).values()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
    with torch.no_grad():
        (found,) = network.eval()(image[None])
    assert (found.scores.diff() <= 0).all()
    assert box_iou(found.boxes[:1], target["boxes"]).item() > 0.5
    where, mask = next(paste_masks(found.boxes, found.masks, SHAPE))
    whole = torch.zeros(SHAPE, dtype=torch.bool)
    whole[where] = mask > 0.5
    truth = target["masks"][0]
    assert 2 * (whole & truth).sum() / (whole.sum() + truth.sum()) > 0.6


def test_three_to_two_of_32_regions():
    """Paper: 32 proposals in a mini-batch, positive to negative 3 : 2; one mass alone would never give 19 positives."""
    heads = RoIHeads(4, RoISettings(jittered=30))
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(200, 3, generator=generator) * torch.tensor([8.0, 30, 30])
    proposals = Proposals(torch.cat([low, low + 6], 1), torch.linspace(1, 0, 200))
    truth = torch.tensor([[4.0, 10, 10, 12, 30, 30]])
    boxes, label, index = heads._sample(proposals, truth, SHAPE)
    assert int(label.sum()) == 19
    assert int((~label).sum()) == 13
    assert index.tolist() == [0] * 32
    quality = box_iou(boxes, truth)[:, 0]
    assert (quality[label] >= 0.5).all()
    assert (quality[~label] < 0.4).all()
    negative = (box_iou(proposals.boxes, truth)[:, 0] < 0.4).nonzero()[:8, 0]
    assert torch.equal(boxes[19:27], proposals.boxes[negative]), "eight are the highest-scoring ones"
    assert (boxes[:, :3] >= 0).all()
    assert (boxes[:, 3:] <= torch.tensor(SHAPE)).all()


def test_jittered_copies_make_positives_of_one_mass():
    torch.manual_seed(0)
    heads = RoIHeads(4)
    counts = []
    for _ in range(20):
        none = Proposals(torch.zeros(0, 6), torch.zeros(0))
        boxes, label, _ = heads._sample(none, torch.tensor([[4.0, 10, 10, 12, 30, 30]]), SHAPE)
        assert len(boxes) <= 9
        counts.append(int(label.sum()))
    assert min(counts) >= 1
    assert sum(counts) / 20 > 4, "the true box and most of its eight copies"


def test_without_truth_all_32_are_negative():
    heads = RoIHeads(4)
    low = torch.rand(100, 3)
    boxes, label, _ = heads._sample(Proposals(torch.cat([low, low + 4], 1), torch.ones(100)), torch.zeros(0, 6), SHAPE)
    assert len(boxes) == 32
    assert not label.any()


@pytest.mark.parametrize(
    ("side", "level"), [(5.0, 0), (27.9, 0), (28.0, 1), (55.9, 1), (56.1, 2), (113.0, 3), (900.0, 3), (0.0, 0)]
)
def test_levels_double_with_the_side(side, level):
    box = torch.tensor([[0.0, 0, 0, side, side, side]])
    assert RoIHeads(4)._levels(box, 4).tolist() == [level]
    assert RoIHeads(4, RoISettings(finest=True))._levels(box, 4).tolist() == [0]


def test_a_level_is_pooled_from_its_own_feature_map():
    heads = RoIHeads(1)
    images = torch.zeros(2, 1, 32, 128, 128)
    maps = [torch.full((2, 1, 32 // s, 128 // s, 128 // s), float(i)) for i, s in enumerate((2, 4, 8))]
    maps = [m + torch.tensor([0.0, 100.0]).view(2, 1, 1, 1, 1) for m in maps]
    boxes = [torch.tensor([[4.0, 4, 4, 12, 12, 12], [0, 0, 0, 32, 128, 128]]), torch.tensor([[0.0, 0, 0, 30, 40, 40]])]
    pooled = heads._pool(images, maps, boxes, (2, 2, 2))
    assert pooled.shape == (3, 1, 2, 2, 2)
    assert pooled.flatten(1).mean(1).tolist() == [0.0, 2.0, 101.0]


def test_anchors_travel_with_the_weights():
    first, second = small_network(), small_network(1)
    first.proposals.set_anchors(torch.arange(1, 10).reshape(3, 1, 3))
    state = first.state_dict()
    assert state["proposals.anchors"].flatten().tolist() == list(range(1, 10))
    second.load_state_dict(state)
    assert torch.equal(second.proposals.anchors, first.proposals.anchors)
    assert "proposals.anchors" not in dict(first.named_parameters())
    with pytest.raises(ValueError, match=r"anchors are \(2, 1, 3\); this network has \(3, 1, 3\)"):
        first.proposals.set_anchors(torch.ones(2, 1, 3))


@pytest.mark.parametrize("anchors", [torch.ones(3, 2), torch.zeros(3, 1, 3), torch.ones(3, 2, 2)])
def test_impossible_anchors_are_refused(anchors):
    with pytest.raises(ValueError, match="give positive sizes"):
        RegionProposalNetwork(8, anchors)


def test_anchors_lie_at_the_centres_of_their_voxels():
    """Level by level, place by place, then by size: the order of the heads' outputs."""
    rpn = RegionProposalNetwork(2, torch.tensor([[[2.0, 4, 4], [4, 8, 8]], [[8.0, 8, 8], [8, 16, 16]]]))
    features = [torch.zeros(1, 2, 8, 12, 12), torch.zeros(1, 2, 4, 6, 6)]
    anchors, per_level = rpn._anchors(torch.zeros(1, 1, 16, 48, 48), features)
    assert per_level == [8 * 12 * 12, 4 * 6 * 6]
    assert len(anchors) == 2 * sum(per_level)
    sizes = anchors[:, 3:] - anchors[:, :3]
    assert sizes[:4].tolist() == [[2, 4, 4], [4, 8, 8]] * 2
    assert sizes[2 * per_level[0]].tolist() == [8, 8, 8]
    centres = (anchors[:, :3] + anchors[:, 3:]) / 2
    step = centres[2] - centres[0]
    assert step.tolist() == [0, 0, 4], "the last axis runs fastest"


def test_nan_weights_are_told():
    image, _ = phantom((8, 20, 20))
    network = small_network().eval()
    with torch.no_grad():
        network.heads.box_head.classes.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores of the detections are not finite"):
        network(image[None])
    with torch.no_grad():
        network.proposals.objectness.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="scores of the proposals are not finite"):
        network(image[None])


def test_same_seed_same_losses_and_detections():
    image, target = phantom((8, 20, 20))
    found = []
    for _ in range(2):
        network = small_network(3).train()
        torch.manual_seed(5)
        losses = network(image[None], [target])
        with torch.no_grad():
            found.append((losses, network.eval()(image[None])[0]))
    (losses, first), (again, second) = found
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in again.items()}
    torch.testing.assert_close([first.boxes, first.scores], [second.boxes, second.scores], rtol=0, atol=0)


def test_half_precision_gives_boxes_in_full_precision():
    image, target = phantom((8, 20, 20))
    network = small_network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = network.train()(image[None], [target])
        with torch.no_grad():
            (found,) = network.eval()(image[None])
    for values in (found.boxes, found.scores, found.masks, *losses.values()):
        assert values.dtype == torch.float32
        assert torch.isfinite(values).all()
    assert len(found.boxes) > 0


def test_too_few_feature_maps_are_told():
    network = small_network()
    network.backbone = torch.nn.Identity()
    network.backbone.forward = lambda images: {"0": images}
    with pytest.raises(ValueError, match="gives 1 feature maps and there are anchors for 3"):
        network(torch.zeros(1, 1, *SHAPE))
