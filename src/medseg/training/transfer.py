"""Transfer learning: initialise a network's encoder, freeze it, train the rest.

The encoder is the child ``encoder`` of a segmentation-models-pytorch network, or ``swinViT`` of MONAI's Swin UNETR
(its convolutional skip blocks ``encoder1..10`` belong to the trained part).

Source: W. Hou et al., Surgical Innovation 2024, section "Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from medseg.training.checkpoint import read_state_dict

MODES = ("end_to_end", "transfer")
ENCODERS = ("encoder", "swinViT")

State = dict[str, torch.Tensor]

__all__ = ["frozen_children", "load_encoder", "prepare"]


def prepare(network: nn.Module, mode: str, weights: str, encoder: str) -> nn.Module:
    """Make a network ready for its training mode.

    Args:
        network: built without pretrained weights.
        mode: ``end_to_end`` leaves it as it is; ``transfer`` initialises and freezes the encoder.
        weights: ``imagenet``, or a file of encoder weights (``.safetensors`` or a plain state_dict).
        encoder: encoder name of segmentation-models-pytorch, to find its ImageNet weights.

    Returns:
        The same network. Frozen means frozen: no gradient, and :class:`SegmentationModule` keeps frozen children in
        ``eval()``, so their batch-norm statistics do not move either.

    Raises:
        ValueError: on an unknown mode, a network without an encoder, or weights that do not fit.
        RuntimeError: if ImageNet weights cannot be loaded; the message says both ways out.
    """
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
    if mode == "end_to_end" and weights != "imagenet":
        raise ValueError("--encoder_weights has no effect in end_to_end mode; pass --mode transfer as well")
    if mode == "transfer":
        load_encoder(network, weights, encoder)
        for parameter in _encoder(network).parameters():
            parameter.requires_grad = False
    return network


def frozen_children(network: nn.Module) -> list[nn.Module]:
    """The direct children that have parameters, none of which is trained."""
    children = []
    for child in network.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            children.append(child)
    return children


def load_encoder(network: nn.Module, weights: str, encoder: str) -> None:
    """Put pretrained weights into a network's encoder, all of them or none.

    A first convolution for three channels is summed over its input channels when the network takes one, which is what
    segmentation-models-pytorch does with ImageNet weights.

    Args:
        network: with a child named ``encoder`` or ``swinViT``.
        weights: as in :func:`prepare`.
        encoder: as in :func:`prepare`.

    Raises:
        ValueError: if the shapes or names do not fit; the message lists the first differences.
        RuntimeError: as in :func:`prepare`.
    """
    target = _encoder(network)
    is_swin = target is getattr(network, "swinViT", None)
    if weights == "imagenet":
        if is_swin:
            raise ValueError(
                "there are no ImageNet weights for the 2D Swin UNETR: the published Swin-T files have patch 4, three "
                "channels and other depths and do not fit it. Pass --encoder_weights FILE with a state_dict of its "
                "swinViT (for example from your own pretraining), or train with --mode end_to_end"
            )
        state = _imagenet_state(target, encoder)
    else:
        state = _encoder_part(read_state_dict(weights))
    state = _sum_input_channels(state, target.state_dict())
    problems = _differences(state, target.state_dict())
    if problems:
        hint = "ImageNet Swin-T files do not fit a 2D Swin UNETR" if is_swin else "was it another encoder or depth?"
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        raise ValueError(f"{weights} does not fit the encoder ({len(problems)} differences; {hint}):\n{shown}")
    target.load_state_dict(state)


def _encoder(network: nn.Module) -> nn.Module:
    for name in ENCODERS:
        child = getattr(network, name, None)
        if isinstance(child, nn.Module):
            return child
    raise ValueError(f"{type(network).__name__} has no encoder ({' or '.join(ENCODERS)}); use --mode end_to_end")


def _imagenet_state(target: nn.Module, encoder: str) -> State:
    import segmentation_models_pytorch as smp

    first = next(p for p in target.parameters() if p.ndim == 4)
    depth = int(getattr(target, "_depth", 5))
    try:
        source = smp.encoders.get_encoder(encoder, in_channels=first.shape[1], depth=depth, weights="imagenet")
    except Exception as error:  # network, proxy, hub and cache errors have no common type
        raise RuntimeError(
            f"the ImageNet weights of {encoder} could not be loaded ({type(error).__name__}: {str(error)[:200]}). Two "
            "ways out: run once where the library can download them (they stay in its cache), or pass "
            "--encoder_weights FILE with the encoder's state_dict (.safetensors or .pt)"
        ) from error
    state: State = source.state_dict()
    return state


def _encoder_part(state: Mapping[str, torch.Tensor]) -> State:
    """A file may hold the encoder alone or a whole network."""
    for name in ENCODERS:
        part = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
        if part:
            return part
    return dict(state)


def _sum_input_channels(state: State, target: Mapping[str, Any]) -> State:
    fitted = dict(state)
    for key, value in state.items():
        wanted = target.get(key)
        if (
            wanted is not None
            and value.ndim == 4
            and wanted.ndim == 4
            and (value.shape[1], wanted.shape[1]) == (3, 1)
            and (value.shape[0], *value.shape[2:]) == (wanted.shape[0], *wanted.shape[2:])
        ):
            fitted[key] = value.sum(dim=1, keepdim=True)
    # ImageNet files carry the classifier that a segmentation encoder has no use for.
    return {k: v for k, v in fitted.items() if k in target or not k.startswith(("fc.", "classifier.", "_fc.", "head."))}


def _differences(state: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> list[str]:
    problems = [f"{k}: missing" for k in target if k not in state and not k.endswith("num_batches_tracked")]
    problems += [f"{k}: not part of the encoder" for k in state if k not in target]
    problems += [
        f"{k}: {tuple(state[k].shape)} instead of {tuple(v.shape)}"
        for k, v in target.items()
        if k in state and state[k].shape != v.shape
    ]
    return problems
