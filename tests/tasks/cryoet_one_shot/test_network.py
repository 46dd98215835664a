"""COS-Net against loops over its equations, and its size against the released network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from medseg.tasks.cryoet_one_shot.network import COSNet, DuSE


def parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def tiny(**options) -> COSNet:
    torch.manual_seed(0)
    return COSNet(**{"channels": 4, "size": 8, "feature_size": 6, **options}).eval()


def volumes(count: int = 3, size: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 1, size, size, size, generator=torch.Generator().manual_seed(seed))


def test_the_default_network_has_the_papers_size():
    """One stream of the released network has 18,233,293 parameters without its match score.

    Ours has 18,233,286 with it. The released DuSE blocks carry batch norms that forward() never calls, 130 parameters
    in each of the four: 18,233,286 - 513 + 4 x 130 = 18,233,293.
    """
    with torch.device("meta"):
        network = COSNet()
    assert parameters(network) == 18_233_286
    assert parameters(network.score) == 512 + 1 == 513
    assert parameters(network) - 513 + 4 * 130 == 18_233_293
    assert parameters(network.feature_encoder) == 32768 * 512 + 512 + 512 * 512 + 512
    convolution, norm, duse = 64 * 64 * 27 + 64, 2 * 64, (64 * 32 + 32) + (32 * 64 + 64) + (64 + 1)
    assert duse == 4_257
    stages = [64 * 27 + 64, *[2 * (convolution + norm) + duse] * 2, 2 * (convolution + norm)]
    assert [parameters(stage) for stage in network.encoder] == stages
    assert parameters(network.decoder) == 2 * (64 * 64 * 8 + 64 + 2 * (convolution + norm) + duse) + 65


def test_options_add_and_leave_out_what_they_say():
    with torch.device("meta"):
        whole, plain, matching = COSNet(), COSNet(duse=False), COSNet(decoder=False)
        small = COSNet(16, stem_stride=2)
    assert parameters(whole) - parameters(plain) == 4 * 4_257
    assert not any(isinstance(m, DuSE) for m in plain.modules())
    assert parameters(whole) - parameters(matching) == parameters(whole.decoder)
    assert matching.decoder is None
    assert not [name for name in matching.state_dict() if name.startswith("decoder")]
    assert small.feature_encoder[1].in_features == 16 * 4**3


@pytest.mark.parametrize("fusion", ["add", "max"])
@pytest.mark.parametrize("duse", [True, False])
@pytest.mark.parametrize("stem_stride", [1, 2])
def test_shapes(duse, stem_stride, fusion):
    network = tiny(duse=duse, stem_stride=stem_stride, fusion=fusion)
    with torch.no_grad():
        features, logits = network.embed(volumes())
    assert features.shape == (3, 6)
    assert logits.shape == (3, 1, 8, 8, 8)
    assert torch.isfinite(logits).all()


def test_the_order_is_convolution_relu_batch_norm_and_nothing_skips():
    network = tiny(duse=False)
    kinds = [type(m).__name__ for m in network.encoder[1].modules() if not list(m.children())]
    assert kinds == ["Conv3d", "ReLU", "BatchNorm3d"] * 2 + ["MaxPool3d"]
    # the decoder of the paper's network sees the encoder's last map alone
    encoded = network.encoder(volumes())
    with torch.no_grad():
        torch.testing.assert_close(network.decoder(encoded, volumes(seed=2)), network.decoder(encoded, volumes(seed=3)))


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("fusion", ["add", "max"])
def test_duse_is_equations_9_to_13(fusion):
    torch.manual_seed(0)
    block = DuSE(4, fusion).double()
    features = torch.randn(2, 4, 3, 2, 5, dtype=torch.float64)
    w1, b1, w2, b2, w3, b3 = (p.detach().numpy() for p in block.parameters())
    expected = np.zeros(features.shape)
    for b, volume in enumerate(features.numpy()):
        means = [volume[c].sum() / (3 * 2 * 5) for c in range(4)]  # (9)
        hidden = [max(0.0, sum(w1[h, c] * means[c] for c in range(4)) + b1[h]) for h in range(2)]
        attention = [sigmoid(sum(w2[c, h] * hidden[h] for h in range(2)) + b2[c]) for c in range(4)]  # (10)
        for i, j, k in np.ndindex(3, 2, 5):
            spatial = sigmoid(sum(w3[0, c, 0, 0, 0] * volume[c, i, j, k] for c in range(4)) + b3[0])  # (12)
            for c in range(4):
                by_channel, by_voxel = attention[c] * volume[c, i, j, k], spatial * volume[c, i, j, k]  # (11), (13)
                expected[b, c, i, j, k] = by_channel + by_voxel if fusion == "add" else max(by_channel, by_voxel)
    np.testing.assert_allclose(block(features).detach().numpy(), expected, rtol=1e-12)


def test_the_fusion_of_the_blocks_is_the_one_asked_for():
    for fusion in ("add", "max"):
        blocks = [m for m in tiny(fusion=fusion).modules() if isinstance(m, DuSE)]
        assert [b.fusion for b in blocks] == [fusion] * 4


def test_match_is_equations_7_and_8():
    network = tiny().double()
    support, target = torch.randn(5, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    weight, bias = network.score.weight.detach().numpy()[0], network.score.bias.item()
    expected = np.zeros((3, 5))
    for t, s in np.ndindex(3, 5):
        expected[t, s] = sum(weight[f] * abs(float(support[s, f] - target[t, f])) for f in range(6)) + bias
    with torch.no_grad():
        scores = network.match(support, target)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12)
        # both streams have the same weights: it does not matter which side is which
        torch.testing.assert_close(network.match(target, support), scores.T)
        # several episodes at once are each by itself
        both = network.match(torch.stack([support, -support]), torch.stack([target, 2 * target]))
        torch.testing.assert_close(both[0], scores)
        torch.testing.assert_close(both[1], network.match(-support, 2 * target))


def test_forward_and_embed_agree():
    for network in (tiny(), tiny(stem_stride=2)):
        with torch.no_grad():
            features, logits = network.embed(volumes())
            torch.testing.assert_close(network(volumes()), logits)
            encoded = network.encoder(volumes())
            torch.testing.assert_close(network.feature_encoder(encoded), features)
            # and a volume's results are its own, whatever else is in the batch
            torch.testing.assert_close(network(volumes()[1:2]), logits[1:2])


def test_without_a_decoder_there_are_features_and_no_masks():
    network = tiny(decoder=False)
    features, logits = network.embed(volumes())
    assert features.shape == (3, 6)
    assert logits is None
    with pytest.raises(ValueError, match=r"no decoder and makes no masks; embed\(\) gives its features"):
        network(volumes())


@pytest.mark.parametrize("shape", [(3, 1, 16, 16, 16), (3, 1, 8, 8, 4), (3, 2, 8, 8, 8), (1, 8, 8, 8), (3, 1, 8, 8)])
def test_volumes_of_another_shape_are_refused(shape):
    network = tiny()
    with pytest.raises(ValueError, match=r"this network takes \(B, 1, 8, 8, 8\)") as error:
        network(torch.zeros(shape))
    assert str(shape) in str(error.value)
    with pytest.raises(ValueError, match="this network takes"):
        network.embed(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fusion": "mean"}, "fusion is 'mean'; choose from add, max"),
        ({"stem_stride": 3}, "stem_stride is 3; choose from 1, 2"),
        ({"size": 30}, "size is 30; it must be a multiple of 4"),
        ({"size": 12, "stem_stride": 2}, "size is 12; it must be a multiple of 8"),
        ({"size": 0}, "size is 0; it must be a multiple of 4"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize("options", [{}, {"fusion": "max"}, {"duse": False}, {"stem_stride": 2}])
def test_gradients_reach_every_parameter(options):
    network = tiny(channels=16, **options).train()  # of a few hidden units in a DuSE block all may be dead
    features, logits = network.embed(volumes(6))
    weights = torch.rand(3, 3, generator=torch.Generator().manual_seed(5))
    loss = (network.match(features[:3], features[3:]) * weights).sum() + (logits * torch.randn_like(logits)).sum()
    loss.backward()
    sizes = {name: float(p.grad.abs().max()) for name, p in network.named_parameters()}
    # A match sees differences of features, in which the linear layers' own biases cancel: they can never learn.
    cancelled = {"feature_encoder.1.bias", "feature_encoder.2.bias"}
    assert all(sizes[name] < 1e-5 for name in cancelled)
    assert {name for name, size in sizes.items() if size < 1e-5} == cancelled
