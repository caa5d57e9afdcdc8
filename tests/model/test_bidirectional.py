"""Models with ``causal=False``: every token attends to every other of its document."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from helpers import ATTENTION_TYPES, assert_differs, assert_same, random_ids, small_model

from open_mythos import ConfigError, DenseTransformer, LoopTrace, OpenMythos
from open_mythos.inference.engine import Engine
from open_mythos.model.exit_rules import exit_rule
from open_mythos.train import RunConfig, TrainConfig, build_run

B, T = 3, 7
both = pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
bidirectional = partial(small_model, causal=False)


@both
@torch.no_grad()
def test_the_first_token_sees_the_last(attn_type):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 50
    assert_differs(model(ids)[:, 0], model(changed)[:, 0])
    causal = small_model(attn_type, moe_backend="reference")
    assert_same(causal(ids)[:, 0], causal(changed)[:, 0])


@both
@torch.no_grad()
def test_without_positions_the_order_of_the_others_does_not_matter(attn_type):
    model, ids = bidirectional(attn_type, rope_theta=0.0), random_ids(B, T)
    order = torch.tensor([0, *range(T - 1, 0, -1)])
    assert_same(model(ids[:, order])[:, 0], model(ids)[:, 0])


@both
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_is_single(attn_type, side):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    n = 4
    real = slice(T - n, T) if side == "left" else slice(0, n)
    mask = torch.zeros(B, T, dtype=torch.bool)
    mask[0], mask[1:, real] = True, True
    out = model(ids, attention_mask=mask)
    assert out.isfinite().all()
    assert_same(out[:1], model(ids[:1]))
    assert_same(out[1:, real], model(ids[1:, real]))


@both
@torch.no_grad()
def test_a_document_is_alone(attn_type):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    out = model(ids, document_ids=torch.tensor([[0] * 3 + [1] * 4] * B))
    assert_same(out[:, :3], model(ids[:, :3]))
    assert_same(out[:, 3:], model(ids[:, 3:]))


@both
@torch.no_grad()
def test_a_row_is_alone_at_its_depth(attn_type):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    out = model(ids, n_loops=torch.tensor([1, 3, 2]))
    for row, depth in enumerate((1, 3, 2)):
        *_, (_, h_BTD) = model.unroll(ids[row : row + 1], depth)
        assert_same(out[row : row + 1], model.logits(h_BTD, model.context(ids[row : row + 1])))


@both
@pytest.mark.parametrize("backend", ["sdpa", "auto"])
def test_kernels_equal_the_reference(attn_type, backend):
    ids = random_ids(B, T)
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 5:] = False
    grads = []
    for name in ("reference", backend):
        model = bidirectional(attn_type, attn_backend=name)
        out = model(ids, attention_mask=mask)[mask]
        out.square().sum().backward()
        weight = model.recurrent.blocks[0].attn.out_proj.weight
        grads.append((out.detach(), weight.grad))
    assert_same(grads[1][0], grads[0][0])
    assert_same(grads[1][1], grads[0][1], tolerance=1e-4)


@both
@torch.no_grad()
def test_exits_batched_are_exits_alone(attn_type):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    rule, trace = exit_rule("change:0.3", model), LoopTrace()
    out = model(ids, 8, exit_rule=rule, trace=trace)
    assert trace.exits.unique().numel() > 1
    for row in range(B):
        one = LoopTrace()
        assert_same(model(ids[row : row + 1], 8, exit_rule=rule, trace=one), out[row : row + 1])
        assert torch.equal(one.exits[0], trace.exits[row])


@torch.no_grad()
def test_a_rule_that_never_stops_is_full_depth(attn_type):
    model, ids = bidirectional(attn_type), random_ids(B, T)
    assert_same(model(ids, 5, exit_rule=exit_rule("fixed:9", model)), model(ids, 5))


@torch.no_grad()
def test_dense():
    model, ids = DenseTransformer(small_model("gqa", causal=False).cfg).eval(), random_ids(B, T)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.out_proj.weight.normal_(std=0.2)
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 50
    assert_differs(model(ids)[:, 0], model(changed)[:, 0])


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(random_ids(1, 3), kv_cache={}),
        lambda model: model.generate(random_ids(1, 3), 2),
        lambda model: model.generate(random_ids(1, 3), 2, use_cache=False),
        lambda model: model.generate(random_ids(1, 3), 2, mode="static"),
        Engine,
        lambda model: build_run(RunConfig(model=model.cfg, train=TrainConfig(seq_len=64))),
    ],
    ids=["cache", "generate", "uncached", "static", "engine", "text"],
)
def test_next_tokens_are_refused(use):
    with pytest.raises(ConfigError, match="bidirectional"):
        use(bidirectional("gqa"))


def test_a_window_is_refused():
    with pytest.raises(ConfigError, match="window"):
        bidirectional("gqa", window=4)


def test_an_untrained_model_is_built_from_its_configuration():
    cfg = bidirectional("mla").cfg
    assert OpenMythos(type(cfg).from_dict(cfg.to_dict())).cfg.causal is False
