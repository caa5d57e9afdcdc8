"""Layers with a rotary embedding and a window of their own, everywhere the model runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, randomise, small_config, small_model
from torch import Tensor

from open_mythos import KVCache, MythosConfig, OpenMythos
from open_mythos.config import Rotary
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.inference import check
from open_mythos.model.context import Context
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.ops.rope import rope_table

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
OWN = {0: {"window": 5, "rope_theta": 100.0}, 1: {"rope_theta": 0, "window": 3}}
B, T, LOOPS = 2, 13, 3
ATTENTION = pytest.mark.parametrize("attn_type", ["gqa", "mla"])


def mixed(attn_type: str, **changes: object) -> OpenMythos:
    """A model of layers with windows, without positions, and with scaled frequencies."""
    fields = {"rope_scaling": LLAMA3, "rope_theta": 1000.0, "layer_overrides": OWN, **changes}
    return small_model(attn_type, **fields)


def test_llama3_frequencies():
    """One frequency at a time: kept, divided by the factor, or between the two."""
    theta, width = 500.0, 32
    cos, sin = rope_table(torch.tensor([1]), width, theta, LLAMA3)
    for i, found in enumerate(torch.atan2(sin[0], cos[0]).tolist()):
        frequency = theta ** (-2 * i / width)
        wavelength, kept = 2 * math.pi / frequency, 64
        if wavelength > kept / 1.0:
            expected = frequency / 8
        elif wavelength < kept / 4.0:
            expected = frequency
        else:
            smooth = (kept / wavelength - 1.0) / (4.0 - 1.0)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        assert found == pytest.approx(expected, rel=1e-5)


def test_linear_scaling_divides_positions():
    scaling = {"rope_type": "linear", "factor": 4.0}
    table = rope_table(torch.arange(0, 32, 4), 8, 100.0, scaling)
    torch.testing.assert_close(table, rope_table(torch.arange(8), 8, 100.0))


def test_a_window_is_the_last_positions():
    cfg = small_config("gqa", window=4, rope_theta=0)
    layer, x = randomise(GQAttention(cfg)), torch.randn(1, T, cfg.dim)
    whole = layer(x)
    for i in range(T):
        few = x[:, max(0, i - 3) : i + 1]
        torch.testing.assert_close(layer(few)[:, -1], whole[:, i], rtol=1e-4, atol=1e-5)


def test_the_scale_is_a_factor_on_the_scores():
    cfg = small_config("gqa", attn_scale=0.7)
    layer = randomise(GQAttention(cfg))
    plain = GQAttention(small_config("gqa"))
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        plain.q_proj.weight.mul_(0.7 * cfg.head_dim**0.5)
    x = torch.randn(2, T, cfg.dim)
    torch.testing.assert_close(layer(x), plain(x))


def test_each_layer_has_its_own():
    model = mixed("gqa")
    layers = [*model.prelude, *model.recurrent.blocks, *model.coda]
    assert [block.cfg.window for block in layers] == [5, 3, 0]
    scaling = tuple(sorted(LLAMA3.items()))
    assert [block.attn.rotary for block in layers] == [
        Rotary(8, 100.0, scaling), Rotary(8, 0.0, scaling), Rotary(8, 1000.0, scaling),
    ]  # fmt: skip
    assert len(Context.of(torch.zeros(1, 2, 32), model.cfg).ropes) == 2  # the one of 0 has none


def logits(model: OpenMythos, ids: Tensor, **arguments: object) -> Tensor:
    with torch.no_grad():
        return model(ids, LOOPS, **arguments)


@ATTENTION
def test_padding_documents_and_holes_change_nothing(attn_type):
    model, ids = mixed(attn_type), random_ids(1, T)
    alone = logits(model, ids)
    left = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    real = torch.arange(T + 4) >= 4
    assert_same(logits(model, left, attention_mask=real[None])[:, 4:], alone)
    hole = torch.cat((ids[:, :6], left[:, :2], ids[:, 6:]), 1)
    real = torch.tensor([1] * 6 + [0] * 2 + [1] * (T - 6))
    found = logits(model, hole, attention_mask=real[None])
    assert_same(found[:, real.bool()], alone)
    packed = torch.cat((random_ids(1, 5, seed=1), ids), 1)
    documents = torch.tensor([[0] * 5 + [1] * T])
    assert_same(logits(model, packed, document_ids=documents)[:, 5:], alone)


@ATTENTION
def test_exits_equal_a_cache_fed_token_by_token(attn_type):
    model, ids = mixed(attn_type), random_ids(B, T)
    rule = exit_rule("gate:0.6", model)
    whole, cache = logits(model, ids, exit_rule=rule), KVCache()
    parts = [
        logits(model, ids[:, i : i + 1], kv_cache=cache, start_pos=i, exit_rule=rule)
        for i in range(T)
    ]
    assert_same(torch.cat(parts, 1), whole)
    assert_differs(whole, logits(model, ids))


@ATTENTION
def test_the_engine_continues_as_generate(attn_type):
    model = mixed(attn_type, max_seq_len=96)
    assert not any(check.parity(model, 8, 3))
    assert not any(check.schedules(model, 1, 3))


@ATTENTION
@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_backends(attn_type, backend):
    ids = random_ids(B, T)
    model, other = mixed(attn_type), mixed(attn_type, attn_backend=backend)
    assert_same(logits(other, ids), logits(model, ids))


def test_it_is_stored(tmp_path):
    model = mixed("gqa")
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    assert again.cfg == model.cfg
    ids = random_ids(B, T)
    assert torch.equal(logits(again, ids), logits(model, ids))
    stored = json.loads(json.dumps(model.cfg.to_dict()))
    assert MythosConfig.from_dict(stored) == model.cfg
