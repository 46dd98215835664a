from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from medseg.training.checkpoint import load_weights, read_state_dict, save_weights


def test_round_trip_is_plain_tensors(tmp_path):
    network = torch.nn.Conv2d(1, 2, 3)
    save_weights(network, tmp_path / "models" / "model.pt")
    assert set(torch.load(tmp_path / "models" / "model.pt", weights_only=True)) == {"weight", "bias"}
    other = torch.nn.Conv2d(1, 2, 3)
    load_weights(other, tmp_path / "models" / "model.pt")
    torch.testing.assert_close(other.state_dict(), network.state_dict())


def test_checkpoints_and_safetensors(tmp_path):
    state = torch.nn.Conv2d(1, 2, 3).state_dict()
    torch.save({"state_dict": {f"network.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "a.ckpt")
    torch.save({"model": state}, tmp_path / "b.pt")
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.ckpt", "b.pt", "c.safetensors"):
        torch.testing.assert_close(read_state_dict(tmp_path / name), dict(state))


def test_of_a_lightning_checkpoint_only_the_network_is_taken(tmp_path):
    state = torch.nn.Conv2d(1, 2, 3).state_dict()
    whole = {f"network.{k}": v for k, v in state.items()} | {"refine.weight": torch.ones(1)}
    torch.save({"state_dict": whole, "pytorch-lightning_version": "2.6"}, tmp_path / "a.ckpt")
    torch.testing.assert_close(read_state_dict(tmp_path / "a.ckpt"), dict(state))


class Attack:
    def __reduce__(self):
        import os

        return os.mkdir, (str(self.target),)


def test_a_pickle_is_not_executed(tmp_path):
    attack = Attack()
    attack.target = tmp_path / "owned"
    Attack.target = attack.target
    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"weight": attack}))
    with pytest.raises(ValueError, match="no readable file of tensors"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


def test_damaged_and_foreign_files(tmp_path):
    save_weights(torch.nn.Conv2d(1, 2, 3), tmp_path / "model.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"half.pt is no readable file"):
        read_state_dict(tmp_path / "half.pt")
    torch.save({"weight": "not a tensor"}, tmp_path / "text.pt")
    with pytest.raises(ValueError, match="is no state_dict"):
        read_state_dict(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError, match="--ckpt_path"):
        read_state_dict(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="does not fit Conv2d: pass the --network_name"):
        load_weights(torch.nn.Conv2d(3, 2, 3), tmp_path / "model.pt")
