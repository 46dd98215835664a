"""Classes found by reading sources must be those that importing them gives."""

from __future__ import annotations

import importlib
import inspect

import pytest

from medseg.bundles.targets import find_target, index_monai

NAMES = [
    "monai.networks.nets.SwinUNETR", "monai.transforms.LoadImaged", "monai.transforms.Resized", "monai.data.DataLoader",
    "monai.handlers.CheckpointLoader", "monai.engines.SupervisedEvaluator", "monai.losses.DiceCELoss",
    "segmentation_models_pytorch.UnetPlusPlus", "torch.optim.Adam", "torch.optim.lr_scheduler.OneCycleLR",
    "torch.nn.Conv2d", "pytorch_lightning.callbacks.ModelCheckpoint", "medseg.training.trainer.Trainer",
    "medseg.tracking.recorder.MLflowRecorder", "monai.networks.nets.BasicUNet", "monai.inferers.SlidingWindowInferer",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_imported_class(name):
    module, _, attribute = name.rpartition(".")
    real = getattr(importlib.import_module(module), attribute)
    target = find_target(name)
    assert target is not None
    assert target.found
    assert target.name == f"{real.__module__}.{real.__name__}"
    parameters = inspect.signature(real).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    assert target.signature is not None
    assert list(target.signature.required) == required
    assert set(names) <= {*target.signature.required, *target.signature.optional}


def test_what_is_not_there():
    assert find_target("monai.networks.nets.Nope") is None
    assert find_target("monai.nosuch.Thing") is None
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        find_target("no_such_package.Thing")


def test_a_module_behind_a_package_keeps_its_own_name():
    """What is reached through another package's imports is judged by its real name."""
    target = find_target("monai.utils.misc.os.system")
    assert target is not None
    assert target.name == "os.system"


def test_short_names_are_monais():
    from monai.bundle import ComponentLocator

    locator = ComponentLocator()
    names = ["UNet", "LoadImaged", "LoadImageD", "LoadImageDict", "Compose", "DiceMetric", "Activationsd"]
    found = index_monai([*names, "NoSuchThing"])
    assert set(found) == set(names)
    for name in names:
        module = locator.get_component_module_name(name)
        expected = module if isinstance(module, str) else getattr(module, "__getitem__", lambda _: None)(0)
        if expected:  # aliases are not in MONAI's table under their own name
            assert found[name].rpartition(".")[0] == expected
