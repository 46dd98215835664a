"""The paper's network and the reduced one."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from medseg.detection.roi_heads import RoISettings
from medseg.tasks.dbt_mass.network import MassRCNN3D, resnet_fpn

NETWORK = {
    "spacing", "depth", "widths", "fpn_channels", "max_pool", "stem", "norm", "anchors_per_level", "proposals",
    "regions", "box_convolutions", "box_hidden", "mask_hidden", "mask_convolutions",
}  # fmt: skip


def of_config(name: str) -> dict[str, Any]:
    with open(f"bundles/dbt_mass/configs/{name}.yaml") as file:
        return {k: v for k, v in yaml.safe_load(file).items() if k in NETWORK}


def reduced(**changes: Any) -> MassRCNN3D:
    torch.manual_seed(0)
    return MassRCNN3D(**of_config("demo") | changes)


def test_size_of_the_paper():
    """Table 5: 5.27e7 parameters."""
    count = sum(p.numel() for p in MassRCNN3D().parameters())
    assert count == 52_765_278, "design A of ../shared/specs/dbt_mass.md, with one class of mask"
    assert abs(count / 5.27e7 - 1) < 0.1


def test_defaults_are_those_of_the_config():
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in of_config("train").items()}
    defaults = {k: v.default for k, v in inspect.signature(MassRCNN3D).parameters.items()}
    assert {k: v if v is not None else {} for k, v in defaults.items()} == config


@pytest.mark.parametrize(
    ("max_pool", "strides"),
    [(True, [(2, 4, 4), (4, 8, 8), (8, 16, 16), (16, 32, 32)]), (False, [(2, 4, 4), (4, 8, 8), (8, 16, 16)])],
)
@pytest.mark.parametrize("depth", [10, 50])
@torch.no_grad()
def test_strides_of_the_feature_maps(max_pool, strides, depth):
    backbone = resnet_fpn(depth, (4, 4, 4, 4), 8, max_pool, 3, "batch").eval()
    shape = (16, 64, 32)
    maps = list(backbone(torch.rand(1, 1, *shape)).values())
    expected = [(1, 8, *(n // s for n, s in zip(shape, stride, strict=True))) for stride in strides]
    assert [tuple(m.shape) for m in maps[: len(strides)]] == expected


def test_reduced_network_on_a_whole_view():
    network = reduced()
    assert 2e5 < sum(p.numel() for p in network.parameters()) < 1.5e6
    image = torch.rand(1, 1, 32, 128, 96)
    with torch.no_grad():
        (found,) = network.eval()(image)
    assert found.masks.shape[1:] == (8, 16, 16)
    assert (found.boxes[:, 3:] <= torch.tensor([32.0, 128, 96])).all()
    mask = torch.zeros(1, 32, 128, 96, dtype=torch.bool)
    mask[0, 8:18, 30:60, 20:50] = True
    losses = network.train()(image, [{"boxes": torch.tensor([[8.0, 30, 20, 18, 60, 50]]), "masks": mask}])
    assert len(losses) == 5
    assert all(torch.isfinite(value) for value in losses.values())


def test_unknown_depth():
    with pytest.raises(ValueError, match="depth is 34; choose from 10, 18, 50"):
        MassRCNN3D(depth=34)


def test_unknown_settings_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'positive'"):
        reduced(regions={"positive": 3})


def test_lists_of_a_config_become_sizes():
    settings = reduced().heads.settings
    assert (settings.box_size, settings.mask_size, settings.finest) == ((4, 5, 5), (4, 8, 8), True)
    assert settings.samples == RoISettings().samples == 32
    assert settings.positives == 19


def test_first_anchors_are_cubes_in_millimetres():
    network = MassRCNN3D(spacing=(2.0, 1.0, 0.5), depth=10, widths=(4, 4, 4, 4), fpn_channels=8, anchors_per_level=2)
    anchors = network.proposals.anchors
    assert anchors.shape == (4, 2, 3)
    sides = anchors * torch.tensor([2.0, 1.0, 0.5])
    torch.testing.assert_close(sides, sides[..., :1].expand(-1, -1, 3))
    assert sides[..., 0].flatten().tolist() == [10, 16, 24, 36, 54, 80, 110, 140]


def test_fitted_anchors_rise_from_the_finest_level():
    network = reduced()
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=(80, 1)) * 0.5 + np.log([6, 15, 15]))
    sizes *= np.exp(0.1 * rng.normal(size=(80, 3)))
    network.fit_anchors(sizes)
    anchors = network.proposals.anchors
    assert anchors.shape == (3, 2, 3)
    assert (anchors.prod(dim=2).flatten().diff() >= 0).all()
    assert (anchors.flatten(0, 1) >= torch.from_numpy(sizes.min(0)).float() - 1e-4).all()
    assert (anchors.flatten(0, 1) <= torch.from_numpy(sizes.max(0)).float() + 1e-4).all()


def test_fewer_masses_than_anchors_are_told():
    with pytest.raises(ValueError, match="5 different sizes for 6 anchors"):
        reduced().fit_anchors(np.arange(1.0, 16).reshape(5, 3))
