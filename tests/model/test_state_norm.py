"""The norm of the state, and embeddings of tokens in the values of attention."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, small_model

from open_mythos import ConfigError, OpenMythos
from open_mythos.hub.pretrained import from_pretrained, save_pretrained
from open_mythos.inference import check
from open_mythos.model.layers.gqa import GQAttention
from open_mythos.ops.norm import rms_norm

B, T, LOOPS = 2, 9, 3
VALUES = {"0": {"value_embedding": True}, "2": {"value_embedding": True}}
NORMS = pytest.mark.parametrize("weight", ["final", "plain"])


def normed(weight: str, **changes: object) -> OpenMythos:
    return small_model(state_norm="loop", state_norm_weight=weight, **changes)


@NORMS
@torch.no_grad()
def test_every_state_is_normalized(weight):
    model, ids = normed(weight), random_ids(B, T)
    scale = model.final_norm.weight if weight == "final" else torch.ones(32)
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    ctx = model.context(ids)
    e_BTD = model.embed(ids, ctx)
    states = [h for _, h in model.unroll(ids, LOOPS)]
    h_BTD = model.recurrent.initial_state(e_BTD, ctx)
    for t, state in enumerate(states):
        h_BTD = rms_norm(plain.step(h_BTD, e_BTD, t, ctx), scale, model.cfg.norm_eps)
        assert_same(state, h_BTD)


@torch.no_grad()
def test_at_the_exit_before_the_coda():
    model, plain = small_model(state_norm="exit"), small_model()
    h_BTD = torch.randn(B, T, 32)
    by_hand = plain.final_hidden(plain.final_norm(h_BTD))
    assert_same(model.final_hidden(h_BTD), by_hand)
    assert_differs(plain.final_hidden(h_BTD), by_hand)


@torch.no_grad()
def test_the_final_norm_is_not_applied_twice():
    """To a state that it has normalized, where nothing comes between."""
    bare = {"coda_layers": 0, "readout": False}
    h_BTD = torch.randn(B, T, 32)
    model = normed("final", **bare)
    assert torch.equal(model.final_hidden(h_BTD), h_BTD)
    at_exit = small_model(state_norm="exit", **bare)
    assert_same(at_exit.final_hidden(h_BTD), at_exit.final_norm(h_BTD))
    others = (
        normed("plain", **bare), normed("final", coda_layers=0),
        normed("final", relaxation="mean", **bare),
    )  # fmt: skip
    for other in others:
        assert_same(other.final_hidden(h_BTD), other.final_norm(other.readout(h_BTD)))


def test_one_weight_is_stored_copied_and_trained():
    model, ids = normed("final"), random_ids(B, T)
    names = [name for name in model.state_dict() if name.endswith("final_norm.weight")]
    assert names == ["final_norm.weight"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.final_norm.weight.mul_(2)
        first, second = (next(m.unroll(ids, 1))[1] for m in (model, twin))
    torch.testing.assert_close(second, 2 * first)
    next(model.unroll(ids, 1))[1].sum().backward()
    assert model.final_norm.weight.grad.any(), "through the state"


def test_a_stored_model_keeps_sharing(tmp_path):
    model, ids = normed("final"), random_ids(B, T)
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids, LOOPS), model(ids, LOOPS))


@pytest.mark.parametrize(
    "choice",
    [
        {"state_norm": "loop"}, {"state_norm": "loop", "coda_layers": 0, "readout": False},
        {"state_norm": "exit"}, {"attn_type": "gqa", "layer_overrides": VALUES},
        {"attn_type": "gqa", "value_embedding": True, "kv_share": "last"},
    ],
)  # fmt: skip
def test_the_engine_continues_as_generate(choice):
    model = small_model(**{"attn_type": "mla", **choice}, max_seq_len=96)
    assert not any(check.parity(model, 8, 3))
    assert not any(check.schedules(model, 1, 3))


@torch.no_grad()
def test_values_get_a_gated_embedding():
    """One head and one token at a time."""
    model, ids = small_model("gqa", layer_overrides=VALUES), random_ids(1, 3)
    layer = model.prelude[0].attn
    plain = GQAttention(small_model("gqa").cfg)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x_BTD, ctx = torch.randn(1, 3, 32), model.context(ids)
    model.embed(ids, ctx)
    _, v_BTGK = plain.kv_proj(x_BTD).unflatten(-1, (2, 2, 8)).unbind(2)
    for token, head in [(t, g) for t in range(3) for g in range(2)]:
        gate = 2 * (layer.value_gate.weight[head] @ x_BTD[0, token]).sigmoid()
        row = model.value_embeddings[0].weight[ids[0, token]].view(2, 8)[head]
        v_BTGK[0, token, head] += gate * row
    first = v_BTGK[0, 0].repeat_interleave(2, 0).flatten()  # the first token attends to itself
    torch.testing.assert_close(layer(x_BTD, ctx)[0, 0], plain.out_proj(first))


def test_states_without_tokens_are_refused():
    model = small_model("gqa", value_embedding=True)
    h_BTD = torch.randn(1, 3, 32)
    with pytest.raises(ConfigError, match="need the tokens"):
        model.step(h_BTD, h_BTD, 0)
    with pytest.raises(ConfigError, match="need the ids"):
        model.embed(h_BTD, model.context(h_BTD))
