"""The 2D baselines: slices in, 3D candidates out."""

from __future__ import annotations

import pytest
import torch

from medseg.tasks.dbt_mass.slicewise import MASK_SIZE, SliceWiseRCNN, Tube, link_slices

SHAPE = (12, 64, 64)
BOX = [4.0, 20, 24, 9, 40, 44]


def slices(*found: list[tuple[float, ...]]) -> list[dict[str, torch.Tensor]]:
    """(x0, y0, x1, y1, score) of each slice."""
    tables = [torch.tensor(rows).reshape(-1, 5) for rows in found]
    return [{"boxes": t[:, :4], "scores": t[:, 4]} for t in tables]


def places(tubes: list[Tube]) -> list[tuple[list[int], list[int]]]:
    return [(t.slices, t.indices) for t in tubes]


A, B = (0.0, 0.0, 10.0, 10.0), (30.0, 30.0, 44.0, 44.0)


def test_two_tubes_side_by_side():
    found = slices([(*A, 0.9)], [(*B, 0.8), (*A, 0.7)], [(*A, 0.6), (*B, 0.9)], [(*B, 0.5)])
    tubes = link_slices(found)
    assert places(tubes) == [([0, 1, 2], [0, 1, 0]), ([1, 2, 3], [0, 1, 0])]
    assert [t.length for t in tubes] == [3, 3]


@pytest.mark.parametrize(("empty", "tubes"), [(1, 1), (2, 1), (3, 2)])
def test_a_tube_bridges_two_empty_slices(empty, tubes):
    linked = link_slices(slices([(*A, 0.9)], *[[] for _ in range(empty)], [(*A, 0.8)]))
    assert len(linked) == tubes
    assert linked[0].length == (empty + 2 if tubes == 1 else 1)


def test_a_box_joins_the_last_box_of_a_tube_and_drifts_with_it():
    found = slices(*[[(2.0 * d, 0, 10 + 2.0 * d, 10, 0.5)] for d in range(6)])
    assert places(link_slices(found)) == [(list(range(6)), [0] * 6)]
    jump = slices([(0, 0, 10, 10, 0.5)], [(4, 0, 14, 10, 0.5)])  # IoU 60 / 140
    assert len(link_slices(jump)) == 2
    assert len(link_slices(jump, iou_threshold=0.4)) == 1


def test_a_tube_takes_one_box_of_a_slice_the_best_scored_first():
    near = (1.0, 0.0, 10.0, 10.0)
    tubes = link_slices(slices([(*A, 0.5)], [(*A, 0.3), (*near, 0.8)]))
    assert places(tubes) == [([0, 1], [0, 1]), ([1], [0])]


def test_nothing_to_link():
    assert link_slices(slices([], [], [])) == []
    assert link_slices([]) == []


def test_box_and_score_of_a_tube():
    """All slices, the median of the corners (the lower one of two), the mean of the highest third of the scores."""
    (tube,) = link_slices(
        slices([(0, 0, 10, 10, 0.2)], [(1, 1, 11, 12, 0.9)], [(2, 1, 12, 12, 0.4)], [(2, 2, 12, 13, 0.7)])
    )
    assert tube.box().tolist() == [0, 1, 1, 4, 12, 11]
    assert tube.score().item() == pytest.approx((0.9 + 0.7) / 2)


@pytest.fixture(scope="module")
def networks() -> dict[bool, SliceWiseRCNN]:
    torch.manual_seed(0)
    return {
        masks: SliceWiseRCNN(masks, (1.0, 1.0, 1.0), 18, slices=1, anchor_sides=(4, 8, 16, 24, 32))
        for masks in (True, False)
    }


@pytest.fixture(scope="module")
def target() -> dict[str, torch.Tensor]:
    masks = torch.zeros(1, *SHAPE, dtype=torch.bool)
    masks[0, 4:9, 20:40, 24:44] = True
    return {"boxes": torch.tensor([BOX]), "masks": masks}


def test_both_train(networks, target):
    images = torch.rand(1, 1, *SHAPE)
    for masks, network in networks.items():
        losses = network.train()(images, [target])
        names = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
        assert set(losses) == names | ({"loss_mask"} if masks else set())
        assert all(torch.isfinite(value) for value in losses.values())
        network.zero_grad()
        sum(losses.values()).backward()
        assert network.detector.backbone.body.conv1.weight.grad.isfinite().all()
        assert network.detector.backbone.body.conv1.weight.grad.any()


def test_filled_boxes_are_no_masks(networks, target):
    images = torch.rand(1, 1, *SHAPE)
    losses = networks[True].train()(images, [{"boxes": target["boxes"], "masks": None}])
    assert "loss_mask" not in losses
    assert {"loss_classifier", "loss_box_reg"} <= set(losses)


def test_volumes_without_a_mass_train(networks):
    empty = {"boxes": torch.zeros(0, 6), "masks": torch.zeros((0, *SHAPE), dtype=torch.bool)}
    losses = networks[True].train()(torch.rand(1, 1, *SHAPE), [empty])
    assert all(torch.isfinite(value) for value in losses.values())


class Recorded(torch.nn.Module):
    """Stands for torchvision's detector: remembers what it is given and finds what it is told to."""

    def __init__(self, rows: dict[int, tuple[float, ...]] | None = None) -> None:
        super().__init__()
        self.rows, self.seen, self.targets = rows or {}, [], []

    def forward(self, images, targets=None):
        self.seen += [image.clone() for image in images]
        if targets is not None:
            self.targets += targets
            return {"loss_classifier": images[0].sum()}
        found = []
        for image in images:
            rows = self.rows.get(int(image.flatten()[-1]), ())  # the last pixel holds the slice's number
            table = torch.tensor(rows).reshape(-1, 5)
            masks = torch.zeros(len(table), 1, *image.shape[1:])
            for mask, row in zip(masks, table.tolist(), strict=True):
                x0, y0, x1, y1 = map(int, row[:4])
                mask[0, y0:y1, x0 : (x0 + x1) // 2] = 1  # the left half of the box
            found.append({"boxes": table[:, :4], "scores": table[:, 4], "masks": masks})
        return found


def numbered(shown: range) -> torch.Tensor:
    volume = torch.zeros(1, 1, *SHAPE)
    for d in shown:
        volume[0, 0, d, -1, -1] = d
    return volume


def with_detector(detector: Recorded, **arguments) -> SliceWiseRCNN:
    network = SliceWiseRCNN(depth=18, anchor_sides=(4, 8, 16, 24, 32), **arguments)
    network.detector = detector
    return network.eval()


def test_empty_slices_are_not_run():
    detector = Recorded()
    (found,) = with_detector(detector, chunk=3)(numbered(range(2, 9)))
    assert [int(image.flatten()[-1]) for image in detector.seen] == list(range(2, 9))
    assert all(image.shape == (3, 64, 64) for image in detector.seen)
    assert (found.boxes.shape, found.scores.shape, found.masks.shape) == ((0, 6), (0,), (0, *MASK_SIZE))


@pytest.mark.parametrize("masks", [True, False])
def test_candidates_of_a_volume(masks):
    row = (24.0, 20.0, 44.0, 40.0)
    detector = Recorded({3: (*row, 0.5), 4: (*row, 0.9), 5: (*row, 0.7), 8: (2.0, 2, 9, 9, 0.95)})
    (found,) = with_detector(detector, masks=masks, spacing=(1.0, 1.0, 1.0))(numbered(range(1, 12)))
    assert found.boxes.tolist() == [[3, 20, 24, 6, 40, 44]], "3 mm long; the other one is 1 mm"
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.masks.shape == (1, *MASK_SIZE)
    left, right = found.masks[0, ..., :12], found.masks[0, ..., 16:]
    assert (left > 0.9).all()
    assert (right < 0.1).all() if masks else (right == 1).all(), "Faster R-CNN has boxes only"


@pytest.mark.parametrize(("thickness", "kept"), [(0.5, 0), (1.0, 1), (3.0, 1), (8.0, 1)])
def test_the_shortest_candidate_is_in_millimetres(thickness, kept):
    row = (24.0, 20.0, 44.0, 40.0)
    detector = Recorded(dict.fromkeys((3, 4, 5), (*row, 0.5)))
    (found,) = with_detector(detector, spacing=(thickness, 1.0, 1.0))(numbered(range(1, 12)))
    assert len(found.boxes) == kept


def test_as_many_candidates_as_asked():
    rows = {d: tuple(v for i in range(4) for v in (15.0 * i, 5, 15.0 * i + 10, 15, 0.9 - 0.1 * i)) for d in (3, 4, 5)}
    (found,) = with_detector(Recorded(rows), candidates=2)(numbered(range(1, 12)))
    assert found.scores.tolist() == pytest.approx([0.9, 0.8])


def test_slices_of_a_mass_are_drawn_as_often_as_asked(target):
    detector = Recorded()
    network = with_detector(detector, slices=200, with_mass=0.75).train()
    torch.manual_seed(0)
    network(numbered(range(1, 12)), [target])
    shown = [len(t["boxes"]) for t in detector.targets]
    assert len(shown) == 200
    assert 0.75 < sum(shown) / 200 < 0.95, "and 5 of 12 slices of the others"
    for image, found in zip(detector.seen, detector.targets, strict=True):
        d = int(image.flatten()[-1])
        assert (len(found["boxes"]) == 1) == (4 <= d < 9)
        if len(found["boxes"]):
            assert found["boxes"].tolist() == [[24, 20, 44, 40]]
            assert torch.equal(found["masks"][0].bool(), target["masks"][0, d])
            assert found["labels"].tolist() == [1]


def test_slices_are_seen_in_their_own_size_in_training_and_detection(networks, target):
    """torchvision would enlarge them to 800 pixels in detection."""
    sizes = {True: [], False: []}
    network = networks[False]
    handle = network.detector.backbone.register_forward_pre_hook(
        lambda _, inputs: sizes[network.training].append(tuple(inputs[0].shape[2:]))
    )
    try:
        network.train()(torch.rand(1, 1, *SHAPE), [target])
        with torch.no_grad():
            network.eval()(torch.rand(1, 1, 2, 64, 64))
    finally:
        handle.remove()
    assert set(sizes[True]) == set(sizes[False]) == {(64, 64)}


@torch.no_grad()
def test_detections_have_the_form_of_the_3d_detector(networks):
    for network in networks.values():
        (found,) = network.eval()(torch.rand(1, 1, 4, 64, 64))
        assert found.boxes.shape == (len(found.scores), 6)
        assert found.masks.shape == (len(found.scores), *MASK_SIZE)
        assert (found.scores.diff() <= 0).all()
