"""The precision in which a device trains fastest without losing what bfloat16 keeps."""

from __future__ import annotations

import torch

__all__ = ["fast_precision"]


def fast_precision(device: str | torch.device) -> str:
    """Lightning's name of the precision for a device: bfloat16 where it has instructions for it, else 32 bits.

    CPUs with AVX512-BF16 or AMX run convolutions in bfloat16 up to twice as fast; those without only emulate it.

    Not for tiny feature maps: with torch 2.15 the gradient of 3 x 3 x 3 kernels is now and then NaN on maps of
    2 x 3 x 3 (4 of 30 tries), never on those of 4 x 6 x 6 and larger (30 tries each).

    Args:
        device: e.g. ``cuda:0`` or ``cpu``.

    Returns:
        ``bf16-mixed`` or ``32-true``.
    """
    if torch.device(device).type == "cuda":
        return "bf16-mixed"
    # not in the oldest torch that medseg takes
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16-mixed" if known.get("avx512_bf16") or known.get("amx_bf16") else "32-true"
