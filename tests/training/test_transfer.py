from __future__ import annotations

import hashlib

import pytest
import segmentation_models_pytorch as smp
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import SwinUNETR
from safetensors.torch import save_file

from medseg.training.module import SegmentationModule
from medseg.training.transfer import frozen_children, prepare

SMP = {"encoder_name": "resnet18", "encoder_weights": None, "in_channels": 1, "classes": 1}


def digest(module: torch.nn.Module) -> str:
    whole = hashlib.sha256()
    for name, value in module.state_dict().items():  # buffers and num_batches_tracked included
        whole.update(name.encode() + value.numpy().tobytes())
    return whole.hexdigest()


def encoder_file(tmp_path, channels: int = 3, suffix: str = ".safetensors", prefix: str = ""):
    torch.manual_seed(5)
    source = smp.encoders.get_encoder("resnet18", in_channels=channels, depth=5, weights=None)
    state = {prefix + k: v.clone() + (0 if v.dtype == torch.long else 0.5) for k, v in source.state_dict().items()}
    path = tmp_path / f"encoder{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    return path, {k.removeprefix(prefix): v for k, v in state.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_a_local_file_initialises_the_encoder(tmp_path, suffix, prefix):
    path, state = encoder_file(tmp_path, 3, suffix, prefix)
    network = prepare(smp.Unet(**SMP), "transfer", str(path), "resnet18")
    loaded = network.encoder.state_dict()
    # three input channels are summed into one, as the library does with ImageNet weights
    torch.testing.assert_close(loaded["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True))
    torch.testing.assert_close(loaded["layer1.0.bn1.running_mean"], state["layer1.0.bn1.running_mean"])
    assert not any(p.requires_grad for p in network.encoder.parameters())
    assert all(p.requires_grad for p in network.decoder.parameters())
    assert frozen_children(network) == [network.encoder]


def test_frozen_means_frozen_through_epochs_and_validation(tmp_path):
    path, _ = encoder_file(tmp_path)
    network = prepare(smp.Unet(**SMP), "transfer", str(path), "resnet18")
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], 0.01, weight_decay=0.1)
    module = SegmentationModule(
        network, DiceCELoss(sigmoid=True), optimizer, lambda x, net: net(x), lambda x, net: net(x), lambda x: x, {}
    )
    before, decoder = digest(network.encoder), digest(network.decoder)
    for _ in range(2):
        module.on_train_epoch_start()
        for _ in range(2):
            loss = module.loss(network(torch.randn(2, 1, 64, 64)), torch.ones(2, 1, 64, 64))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        module.eval()
        network(torch.randn(2, 1, 64, 64))
    assert digest(network.encoder) == before
    assert digest(network.decoder) != decoder


def test_end_to_end_freezes_nothing():
    network = prepare(smp.Unet(**SMP), "end_to_end", "imagenet", "resnet18")
    assert all(p.requires_grad for p in network.parameters())
    assert frozen_children(network) == []


def test_weights_without_transfer_are_refused():
    with pytest.raises(ValueError, match="--mode transfer"):
        prepare(smp.Unet(**SMP), "end_to_end", "encoder.pt", "resnet18")


def test_offline_without_a_file_says_both_ways_out(monkeypatch):
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(smp.encoders, "get_encoder", offline)
    network = smp.Unet(**SMP)
    with pytest.raises(RuntimeError, match=r"Two ways out: .*download.*--encoder_weights FILE"):
        prepare(network, "transfer", "imagenet", "resnet18")


def test_online_the_librarys_own_loader_is_used(monkeypatch):
    asked = {}
    original = smp.encoders.get_encoder

    def online(name: str, in_channels: int, depth: int, weights: str) -> torch.nn.Module:
        asked.update(name=name, in_channels=in_channels, depth=depth, weights=weights)
        torch.manual_seed(9)
        return original(name, in_channels=in_channels, depth=depth, weights=None)

    network = smp.UnetPlusPlus(**{**SMP, "encoder_depth": 4, "decoder_channels": (64, 32, 16, 8)})
    monkeypatch.setattr(smp.encoders, "get_encoder", online)
    prepare(network, "transfer", "imagenet", "resnet18")
    assert asked == {"name": "resnet18", "in_channels": 1, "depth": 4, "weights": "imagenet"}
    torch.manual_seed(9)
    expected = original("resnet18", in_channels=1, depth=4, weights=None)
    assert digest(network.encoder) == digest(expected)


def test_swin_unetr_takes_a_fitting_file_and_nothing_else(tmp_path):
    network = SwinUNETR(in_channels=1, out_channels=1, feature_size=12, spatial_dims=2)
    state = network.swinViT.state_dict()
    fitting = {k: v + 0.1 if v.is_floating_point() else v.clone() for k, v in state.items()}
    torch.save(fitting, tmp_path / "swin.pt")
    prepare(network, "transfer", str(tmp_path / "swin.pt"), "")
    assert frozen_children(network) == [network.swinViT]
    torch.testing.assert_close(network.swinViT.state_dict(), fitting)

    with pytest.raises(ValueError, match="there are no ImageNet weights for the 2D Swin UNETR"):
        prepare(network, "transfer", "imagenet", "")
    wider = SwinUNETR(in_channels=1, out_channels=1, feature_size=24, spatial_dims=2)
    with pytest.raises(ValueError, match=r"do not fit a 2D Swin UNETR[\s\S]*instead of"):
        prepare(wider, "transfer", str(tmp_path / "swin.pt"), "")


@pytest.mark.parametrize(
    ("mode", "weights", "message"),
    [("transfered", "imagenet", "unknown mode"), ("transfer", "absent.pt", "no weights at absent.pt")],
)
def test_bad_arguments(mode, weights, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(smp.Unet(**SMP), mode, weights, "resnet18")


def test_weights_of_another_encoder_are_refused_whole(tmp_path):
    path, _ = encoder_file(tmp_path)
    network = smp.Unet(**{**SMP, "encoder_name": "resnet34"})
    before = digest(network)
    with pytest.raises(ValueError, match=r"does not fit the encoder .*\n  - layer1.2.conv1.weight: missing"):
        prepare(network, "transfer", str(path), "resnet34")
    assert digest(network) == before


def test_a_network_without_an_encoder():
    with pytest.raises(ValueError, match="has no encoder"):
        prepare(torch.nn.Conv2d(1, 1, 1), "transfer", "imagenet", "resnet18")
