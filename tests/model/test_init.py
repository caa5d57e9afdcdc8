"""The initialization of a whole model."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_ids, small_config

from open_mythos import OpenMythos


@pytest.fixture
def fresh(attn_type) -> OpenMythos:
    return OpenMythos(small_config(attn_type, dim=128, recurrent_layers=2))


ZERO = ("attn.out_proj.weight", "ffn.down", "ffn.down.weight", "ffn.shared.down.weight", "lora.up")


def test_branches_end_in_zero(fresh):
    ends = [value for name, value in fresh.named_parameters() if name.endswith(ZERO)]
    assert len(ends) == 4 + 4 + 2 + 1  # attentions, feed-forwards, shared experts, adapter
    assert all((value == 0).all() for value in ends)


def test_all_other_matrices_are_normal(fresh):
    std = math.sqrt(2 / (5 * 128))
    matrices = 0
    for name, value in fresh.named_parameters():
        if value.dim() < 2 or name.endswith((*ZERO, "injection.B", "readout.weight")):
            continue
        matrices += 1
        few = 4 / math.sqrt(2 * value.numel())
        assert value.std().item() == pytest.approx(std, rel=few), name
        assert abs(value.mean()) < std * few * 1.5, name
    assert matrices > 15


def test_norms_injection_and_readout(fresh):
    for name, value in fresh.named_parameters():
        if "norm" in name:
            assert (value == 1).all(), name
    assert torch.equal(fresh.readout.weight, torch.eye(128))
    assert torch.equal(fresh.recurrent.injection.B, torch.eye(128))
    torch.testing.assert_close(
        fresh.recurrent.injection.get_A().diag(), torch.full((128,), math.sqrt(1 / 5))
    )


def test_a_fresh_loop_is_linear(fresh):
    """Every block begins as the identity: h_n = (1 + A + ... + A^(n-1)) B e."""
    ids = random_ids(2, 5)
    e = fresh.embed(ids)
    decay, gain = fresh.recurrent.injection.coefficients()
    h = torch.zeros_like(e)
    for t in range(6):
        h = fresh.step(h, e, t)
    torch.testing.assert_close(h, e * gain * (1 - decay**6) / (1 - decay))


def test_seeded(attn_type):
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(OpenMythos(small_config(attn_type)))
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)


def test_tied_head_is_initialized_as_embedding():
    model = OpenMythos(small_config(tie_embeddings=True))
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.std() > 0
