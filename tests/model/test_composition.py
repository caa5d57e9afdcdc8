"""Every architecture option keeps the invariants of the default."""

from __future__ import annotations

import copy
from dataclasses import fields

import pytest
import torch
from helpers import (
    assert_differs,
    assert_same,
    choices_of,
    random_ids,
    randomise,
    small_config,
)

from open_mythos import ConfigError, Depth, KVCache, MythosConfig, OpenMythos, SamplingParams
from open_mythos.accounting import account
from open_mythos.inference.decoding import decoder_factory
from open_mythos.inference.quantization import quantize
from open_mythos.model.dense import DenseTransformer, parameter_count
from open_mythos.model.generation import generate
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.model.layers.feed_forward import FEED_FORWARDS
from open_mythos.model.layers.injection import INJECTIONS
from open_mythos.ops.cross_entropy import linear_cross_entropy
from open_mythos.train.loss import next_token_loss

CHOICES: dict[str, dict] = {
    "concat": {"injection": "concat"},
    "concat, bias": {"injection": "concat", "injection_bias": True},
    "concat, diagonal": {"injection": "concat", "injection_matrix": "diagonal"},
    "identity carry": {"injection": "concat", "identity_carry": True},
    "add": {"injection": "add"},
    "none": {"injection": "none", "initial_state": "prelude"},
    **{
        f"norms {name}": {"block_norms": name} for name in choices_of("block_norms") if name != "in"
    },
    **{
        f"qk norm {name}": {"attn_type": "gqa", "qk_norm": name}
        for name in choices_of("qk_norm")[1:]
    },
    "qk norm eps": {"attn_type": "gqa", "qk_norm": "head", "qk_norm_eps": 0.1},
    "qkv bias": {"attn_type": "gqa", "qkv_bias": True},
    "head width": {"attn_type": "gqa", "gqa_head_dim": 6},
    **{f"ffn {name}": {"ffn_kind": name, "n_experts": 0} for name in choices_of("ffn_kind")[1:]},
    "embedding scale": {"embedding_scale": 3.0},
    "logit scale": {"logit_scale": 0.5},
    "logit cap": {"logit_softcap": 0.7},
    "attention scale": {"attn_type": "gqa", "attn_scale": 0.9},
    "linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 50.0},
    "llama3 rope": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "rope_theta": 50.0,
    },
    "no rope": {"rope_theta": 0},
    "window": {"window": 3},
    "window, gqa": {"window": 3, "attn_type": "gqa"},
    "state norm": {"state_norm": "loop"},
    "plain state norm": {"state_norm": "loop", "state_norm_weight": "plain"},
    "norm at the exit": {"state_norm": "exit"},
    "value embeddings": {"attn_type": "gqa", "value_embedding": True},
    "narrow initial state": {"initial_state": "normal", "initial_state_std": 3.0},
    "layers of their own": {
        "attn_type": "gqa",
        "layer_overrides": {
            0: {"window": 4, "rope_theta": 20.0, "rope_scaling": None},
            1: {"rope_theta": 0},
            2: {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "window": 2},
        },
    },
    "mean of the loops": {"relaxation": "mean"},
}
B, T, LOOPS = 3, 11, 3
choices = pytest.mark.parametrize("name", CHOICES)


def built(name: str, **changes: object) -> OpenMythos:
    """A randomised model of this choice, in evaluation mode."""
    choice = {"attn_type": "mla", **CHOICES[name]}
    return randomise(OpenMythos(small_config(**choice, **changes))).eval()


def test_every_new_field_is_tested():
    new = [field.name for field in fields(MythosConfig)]
    new = new[new.index("injection") :]
    assert set(new) - {"causal"} == {name for choice in CHOICES.values() for name in choice} - {
        "attn_type", "n_experts", "initial_state", "injection_matrix", "rope_theta",
    }  # fmt: skip


def test_tables_and_configuration_agree():
    assert set(choices_of("injection")) == set(INJECTIONS)
    assert set(choices_of("ffn_kind")) == set(FEED_FORWARDS)


@choices
def test_it_differs_from_the_default(name):
    """Control: the field is read."""
    changed = built(name)
    reset = {
        field: MythosConfig.__dataclass_fields__[field].default
        for field in CHOICES[name]
        if field not in ("attn_type", "n_experts", "initial_state")
        and (field != "rope_theta" or not CHOICES[name][field])
    }
    plain = OpenMythos(small_config(**{"attn_type": "mla", **CHOICES[name], **reset})).eval()
    shapes = {key: value.shape for key, value in plain.state_dict().items()}
    taken = {
        key: value for key, value in changed.state_dict().items() if value.shape == shapes.get(key)
    }
    randomise(plain).load_state_dict(taken, strict=False)
    ids = random_ids(B, T)
    with torch.no_grad():
        assert_differs(changed(ids, LOOPS), plain(ids, LOOPS))


@choices
def test_cached_equals_uncached_and_batched_equals_alone(name):
    model, ids = built(name), random_ids(B, T)
    with torch.no_grad():
        whole = model(ids, [1, LOOPS, 2])
    cache, parts = KVCache(), []
    for start, stop in ((0, 4), (4, 5), (5, T)):
        parts.append(model(ids[:, start:stop], [1, LOOPS, 2], cache, start))
    assert_same(torch.cat(parts, 1), whole)
    for row, depth in enumerate([1, LOOPS, 2]):
        with torch.no_grad():
            assert_same(model(ids[row : row + 1], depth), whole[row : row + 1])


@choices
def test_every_parameter_has_a_gradient(name):
    model = built(name).train()
    model(random_ids(B, T), LOOPS).square().mean().backward()
    dead = {
        key for key, value in model.named_parameters()
        if "halting" not in key and (value.grad is None or not value.grad.any())
    }  # fmt: skip
    # without an injection the input is read once, as the initial state
    assert dead <= {"recurrent.lora.down", "recurrent.lora.up"}


@choices
def test_the_static_decoder_generates_the_same_tokens(name):
    model, ids = built(name), random_ids(2, 5)
    call = ids, SamplingParams(6, temperature=0.0), Depth(LOOPS)
    static = generate(model, *call, decoder=decoder_factory("static"))
    assert torch.equal(static, generate(model, *call))


@choices
def test_every_parameter_is_counted(name):
    model = built(name)
    counted = account(model.cfg)
    assert counted.parameters == parameter_count(model)
    dense = DenseTransformer(model.cfg)
    assert account(dense).parameters == parameter_count(dense)


@choices
def test_int8_stays_close(name):
    model, ids = built(name), random_ids(B, T)
    model = model.to(torch.bfloat16)
    with torch.no_grad():
        exact = copy.deepcopy(model)(ids, LOOPS).float()
        rounded = quantize(model, "int8")(ids, LOOPS).float()
    assert (rounded - exact).norm() < 0.1 * exact.norm()


@choices
def test_bfloat16_keeps_the_state_in_float32(name):
    model = built(name).to(torch.bfloat16)
    ctx, ids = model.context(random_ids(B, T)), random_ids(B, T)
    with torch.no_grad():
        e_BTD = model.embed(ids, ctx)
        h_BTD = model.recurrent.initial_state(e_BTD, ctx)
        assert model.step(h_BTD, e_BTD, 0, ctx).dtype == torch.float32


@pytest.mark.parametrize("placement", choices_of("block_norms"))
def test_block_norms_are_where_the_name_says(placement):
    block = TransformerBlock(small_config(block_norms=placement))
    names = {name.split(".")[0] for name, _ in block.named_parameters() if "_norm." in name}
    suffix = {"in": "norm", "out": "out_norm", "sum": "sum_norm"}
    expected = {
        f"{branch}_{suffix[part]}" for branch in ("attn", "ffn") for part in placement.split("+")
    }
    assert names - {"attn", "ffn"} == expected


@pytest.mark.parametrize("placement", ["out", "in+out"])
def test_normed_branches_do_not_start_at_zero(placement):
    """The gradient of a norm at zero is 1 / sqrt(eps)."""
    model = OpenMythos(small_config(block_norms=placement))
    ends = [p for key, p in model.named_parameters() if key.endswith("attn.out_proj.weight")]
    assert ends
    assert all(weight.any() for weight in ends)


def test_concat_is_one_matrix_times_both():
    model = built("concat, bias")
    injection = model.recurrent.injection
    h, e = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    both = torch.cat((injection.A, injection.B), dim=1)
    torch.testing.assert_close(injection(h, e), torch.cat((h, e), -1) @ both.mT + injection.bias)
    expected = torch.linalg.eigvals(injection.A).abs().max()
    torch.testing.assert_close(injection.spectral_radius(), expected)


@pytest.mark.parametrize("name", ["add", "none", "identity carry"])
def test_the_identity_has_spectral_radius_one(name):
    injection = built(name).recurrent.injection
    torch.testing.assert_close(injection.spectral_radius().detach(), torch.tensor(1.0))
    torch.testing.assert_close(injection.get_A(), torch.eye(32))


@pytest.mark.parametrize(("scale", "cap"), [(0.5, 0.0), (1.0, 0.7), (2.0, 3.0)])
def test_the_loss_sees_scale_and_cap(scale, cap):
    model = built("add", logit_scale=scale, logit_softcap=cap)
    ids, targets = random_ids(B, T), random_ids(B, T, seed=1)
    targets[0, :4] = -100
    loss = next_token_loss(model, ids, targets, step_tokens=1, step_sequences=1, depth=Depth(2))
    loss.total.backward()
    grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(ids, 2).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss.total, expected)
    expected.backward()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[key].grad)


def test_a_capped_loss_does_not_depend_on_the_chunk():
    hidden, weight, targets = torch.randn(7, 5), torch.randn(11, 5), torch.arange(7)
    losses = [
        linear_cross_entropy(hidden, weight, targets, softcap=2.0, chunk=chunk) for chunk in (2, 7)
    ]
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"injection": "lto"}, "injection"),
        ({"injection": "add", "injection_matrix": "diagonal"}, "injection_matrix"),
        ({"injection": "concat", "injection_rule": "euler"}, "injection_rule"),
        ({"identity_carry": True}, "identity_carry"),
        ({"injection": "add", "injection_bias": True}, "injection_bias"),
        ({"block_norms": "pre"}, "block_norms"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"attn_type": "gqa", "qk_norm_eps": 1e-5}, "qk_norm_eps"),
        ({"qkv_bias": True}, "qkv_bias"),
        ({"gqa_head_dim": 8}, "gqa_head_dim"),
        ({"attn_type": "gqa", "gqa_head_dim": 7}, "head_dim"),
        ({"ffn_kind": "relu2"}, "ffn_kind"),
        ({"embedding_scale": 0.0}, "embedding_scale"),
        ({"logit_softcap": -1.0}, "logit_softcap"),
        ({"attn_scale": 0.5}, "attn_scale"),
        ({"attn_type": "gqa", "attn_scale": -0.5}, "attn_scale"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"window": -1}, "window"),
        ({"state_norm": "always"}, "state_norm"),
        ({"state_norm_weight": "plain"}, "state_norm_weight"),
        ({"value_embedding": True}, "value_embedding"),
        ({"layer_overrides": {0: {"value_embedding": True}}}, "value_embedding"),
        ({"attn_type": "gqa", "value_embedding": True, "dim": 16}, "dim"),
        ({"initial_state_std": 0.1}, "initial_state_std"),
        ({"layer_overrides": {3: {"window": 2}}}, "layer_overrides"),
        ({"layer_overrides": {"a": {"window": 2}}}, "layer_overrides"),
        ({"layer_overrides": {0: {"dim": 2}}}, "layer_overrides"),
        ({"layer_overrides": {0: {"window": -2}}}, "window"),
        ({"layer_overrides": [0]}, "layer_overrides"),
    ],
)
def test_unsupported_choices_are_rejected(choice, field):
    with pytest.raises(ConfigError) as caught:
        OpenMythos(small_config(**{"attn_type": "mla", **choice}))
    assert caught.value.where == f"MythosConfig.{field}"
    assert caught.value.allowed
