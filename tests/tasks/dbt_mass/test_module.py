"""Training, scoring and what is written of detectors, with a network that finds what it is told to."""

from __future__ import annotations

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.data import Dataset, list_data_collate
from monai.transforms import Compose
from torch import nn

from medseg.metrics import dice, fnr
from medseg.tasks.dbt_mass.module import DetectionCase, DetectionModule
from medseg.tasks.dbt_mass.network import MassRCNN3D
from medseg.tasks.dbt_mass.scores import BOX, FrocArea, SensitivityAt
from medseg.tasks.dbt_mass.views import LoadViewd, RandMassPatchd, boxes_to_grid
from medseg.training.loader import SeededDataLoader

GRID = (2.0, 1.0, 1.0)


class Found:
    """Stands for the inferer: boxes given in the file's own voxels, with masks that fill them."""

    def __init__(self) -> None:
        self.told: dict[str, tuple[list[list[float]], list[float]]] = {}

    def __call__(self, image, network):
        boxes, scores = self.told[image.meta["filename_or_obj"][0]]
        affine, native = (np.asarray(image.meta[k][0], float) for k in ("affine", "native_affine"))
        moved = boxes_to_grid(np.asarray(boxes, float).reshape(-1, 6), native, affine)
        found = torch.from_numpy(moved).float()
        probability = torch.zeros(image.shape)
        for box in found:
            d0, h0, w0, d1, h1, w1 = box.round().int().tolist()
            probability[..., d0:d1, h0:h1, w0:w1] = 0.9
        return {
            "boxes": found[None],
            "scores": torch.tensor(scores)[None],
            "masks": torch.ones(1, len(found), 4, 6, 6),
            "probability": probability,
        }


@pytest.fixture
def inferer() -> Found:
    return Found()


@pytest.fixture
def module(inferer) -> DetectionModule:
    network = nn.Conv3d(1, 1, 1)
    return DetectionModule(
        network=network,
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        val_inferer=inferer,
        postprocessing=Compose([]),
        metrics={"froc_area": FrocArea(), "sensitivity": SensitivityAt(rate=0.5), "dice": dice, "fnr": fnr},
    )


def score(module: DetectionModule, inferer: Found, *views) -> list[DetectionCase]:
    """Score views (phantom, boxes, scores, further fields) as a validation does."""
    module.cases = []
    for view, boxes, scores, fields in views:
        inferer.told[str(view.image)] = boxes, scores
        item = LoadViewd(["image", "label"], GRID, skin=1.0)({**view.item, **fields})
        module._score(list_data_collate([item]), "val")
    module._gather_cases()
    return module.cases


def of_breast(breast: str, **more: object) -> dict[str, object]:
    return {"patient": breast[:2], "breast": breast, "mass": "1", **more}


@pytest.fixture
def cases(module, inferer, make_view) -> list[DetectionCase]:
    """A right breast, hit in one view of two; a left one, hit by a box that is 2 voxels off, among false ones."""
    truth, other = (2, 10, 18, 6, 18, 26), (2, 10, 6, 6, 18, 14)
    first = make_view(truth, name="a", laterality="R")
    second = make_view(truth, name="b", laterality="R")
    third = make_view(other, name="c")
    fourth = make_view(name="d")
    return score(
        module,
        inferer,
        (first, [list(truth), [0, 0, 24, 3, 5, 30]], [0.9, 0.4], of_breast("P1-R", density=3)),
        (second, [[0, 30, 20, 3, 36, 30]], [0.6], of_breast("P1-R", density=3)),
        (third, [[2, 10, 8, 6, 18, 16]], [0.5], of_breast("P2-L", density=1)),
        (fourth, [], [], of_breast("P3-L", mass="none", density=2)),
    )


def test_scores_of_a_part_belong_to_breasts(cases):
    assert [c.metrics["froc_area"] for c in cases[:3]] == pytest.approx([1, 1, 1 - (1 / 3) / 4])
    assert [c.metrics["sensitivity"] for c in cases[:3]] == [1, 1, 1]
    assert all(math.isnan(value) for value in cases[3].metrics.values())


def test_masks_are_compared_where_a_mass_is_hit(cases):
    assert cases[0].metrics["dice"] == 1
    assert cases[0].metrics["fnr"] == 0
    assert math.isnan(cases[1].metrics["dice"]), "the breast is hit, this view is not"
    assert cases[2].metrics["dice"] == pytest.approx(2 * 6 / 16), "shifted by 2 of 8 columns: IoU 0.6"
    assert cases[2].metrics["fnr"] == pytest.approx(0.25)


def test_cases_tell_what_was_found_on_the_file_s_own_grid(cases):
    first, _, third, fourth = cases
    assert [f["score"] for f in first.found] == [0.9, 0.4]
    assert [first.found[0][k] for k in BOX] == [2, 10, 18, 6, 18, 26]
    assert [f["iou"] for f in first.found] == [1, 0]
    assert third.found[0]["iou"] == pytest.approx(0.6)
    assert first.true == [{**dict(zip(BOX, [2, 10, 18, 6, 18, 26], strict=True)), "mass": "1"}]
    assert [c.empty_prediction for c in cases] == [False, False, False, True]
    assert [c.empty_truth for c in cases] == [False, False, False, True]
    assert fourth.true == fourth.found == []
    grid = {"slices": 8, "spacing_h": 1.0, "spacing_w": 1.0, "pixel_mm": 1.0}  # for the hit rule bcs-dbt
    assert first.fields == {"patient": "P1", "breast": "P1-R", "mass": "1", "density": 3, "masses": 1, **grid}


def test_details_are_written(module, cases, tmp_path):
    module.write_details(tmp_path, cases)
    found, true = (list(csv.DictReader((tmp_path / f"{n}.csv").open())) for n in ("detections", "truths"))
    assert list(found[0]) == ["view", *BOX, "score", "iou"]
    assert list(true[0]) == ["view", *BOX, "mass"]
    assert (len(found), len(true)) == (4, 3)
    assert [float(true[0][k]) for k in BOX] == [2, 10, 18, 6, 18, 26], "of a turned view as it is stored"
    module.write_details(tmp_path / "none", cases[3:])
    assert (tmp_path / "none" / "detections.csv").read_text().strip() == ",".join(["view", *BOX, "score", "iou"])


def test_masks_are_not_compared_with_true_boxes(module, inferer, make_view):
    view = make_view((2, 10, 6, 6, 18, 14))
    (case,) = score(module, inferer, (view, [[2, 10, 6, 6, 18, 14]], [0.9], of_breast("P1-L", truth="box")))
    assert math.isnan(case.metrics["dice"])
    assert case.metrics["froc_area"] == 1


def test_two_masses_of_a_view_have_names_of_their_own(module, inferer, make_view):
    view = make_view((2, 10, 6, 6, 18, 14), (2, 24, 6, 6, 30, 12))
    (case,) = score(module, inferer, (view, [[2, 24, 6, 6, 30, 12]], [0.9], of_breast("P1-L")))
    assert [t["mass"] for t in case.true] == ["1", "2"]
    assert case.metrics["froc_area"] == 0.5
    assert case.metrics["dice"] == 1, "of the one that is hit"


def test_masks_are_kept_on_request(module, inferer, make_view):
    view = make_view((2, 10, 18, 6, 18, 26), laterality="R")
    module.keep_masks = True
    (case,) = score(module, inferer, (view, [[2, 10, 18, 6, 18, 26]], [0.9], of_breast("P1-R")))
    pred, truth = case.unpacked()
    np.testing.assert_array_equal(pred, truth)
    assert truth.sum() == 4 * 8 * 8
    assert case.boxes == [[2, 10, 6, 6, 18, 14]], "on the turned grid, for pictures"


class Losses(nn.Module):
    """Remembers its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.targets: list[dict] = []

    def forward(self, images, targets):
        self.targets = targets
        return {"rpn_box": self.weight * 2, "roi_mask": self.weight * 3}


def test_a_step_of_training_sums_the_losses_and_names_them(module, monkeypatch):
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: float(value)}))
    module.network = Losses()
    labels = torch.zeros(2, 1, 4, 8, 8, dtype=torch.uint8)
    labels[0, 0, 1:3, 2:5, 2:6] = 1
    labels[1, 0, 0:2, 0:3, 0:4] = 2
    batch = {"image": torch.rand(2, 1, 4, 8, 8), "label": labels, "truth": ["mask", "box"]}
    loss = module.training_step(batch, 0)
    assert loss.item() == 5
    assert loss.requires_grad
    assert logged == {"train_rpn_box": 2, "train_roi_mask": 3, "train_loss": 5}
    first, second = module.network.targets
    assert first["boxes"].tolist() == [[1, 2, 2, 3, 5, 6]]
    assert torch.equal(first["masks"][0], labels[0, 0] == 1)
    assert second["boxes"].tolist() == [[0, 0, 0, 2, 3, 4]]
    assert second["masks"] is None
    module.training_step({k: batch[k] for k in ("image", "label")}, 0)
    assert all(t["masks"] is not None for t in module.network.targets)


@pytest.mark.parametrize("resumed", [False, True])
def test_anchors_are_fitted_at_the_start_and_not_again(module, make_view, resumed):
    views = [make_view((1, 8, 4, 1 + n % 5 + 2, 8 + n, 4 + n), name=f"v{n}") for n in range(4, 13)]
    transform = Compose([LoadViewd(["image", "label"], GRID, skin=1.0), RandMassPatchd((8, 32, 32), 1.0)])
    loader = SeededDataLoader(Dataset([v.item for v in views], transform), batch_size=1)
    module.network = MassRCNN3D(GRID, 10, (4, 4, 4, 4), 8, False, 3, anchors_per_level=1)
    before = module.network.proposals.anchors.clone()
    module._trainer = SimpleNamespace(resumed=resumed, train_dataloader=loader)
    module.on_fit_start()
    anchors = module.network.proposals.anchors
    assert torch.equal(anchors, before) == resumed
    if not resumed:
        assert (anchors.prod(dim=2).flatten().diff() > 0).all()
        assert (anchors[..., 1:] <= 12).all()
        assert (anchors >= 2).all()


def test_other_networks_have_no_anchors_to_fit(module):
    module._trainer = SimpleNamespace(resumed=False, train_dataloader=None)
    module.on_fit_start()
