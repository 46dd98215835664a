from __future__ import annotations

import pytest
import torch

from medseg.training.precision import fast_precision


@pytest.mark.parametrize(
    ("features", "expected"),
    [({"avx512_bf16": True}, "bf16-mixed"), ({"amx_bf16": True}, "bf16-mixed"), ({"avx512_f": True}, "32-true")],
)
def test_a_cpu_trains_in_bfloat16_only_if_it_has_instructions_for_it(monkeypatch, features, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert fast_precision("cpu") == expected


def test_gpus_do_and_an_older_torch_does_not(monkeypatch):
    assert fast_precision(torch.device("cuda:0")) == "bf16-mixed"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert fast_precision("cpu") == "32-true"
