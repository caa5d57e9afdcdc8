"""The dense baseline matches the looped model in parameters or depth."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same, random_ids, randomise, small_config

from open_mythos import DenseTransformer, KVCache, MythosConfig, OpenMythos, mythos_nano
from open_mythos.model.dense import parameter_count

B, T = 3, 9


@pytest.fixture
def dense(attn_type) -> DenseTransformer:
    return randomise(DenseTransformer(small_config(attn_type))).eval()


def test_stores_as_many_blocks_by_default(attn_type):
    cfg = small_config(attn_type, prelude_layers=2, recurrent_layers=3, coda_layers=1)
    assert len(DenseTransformer(cfg).blocks) == 6
    assert len(DenseTransformer(cfg, n_layers=2).blocks) == 2


@pytest.mark.parametrize(
    "cfg",
    [
        small_config("mla"), small_config("gqa"), mythos_nano(),
        small_config("gqa", ffn_kind="relu2", n_experts=0),
    ],
    ids=["mla", "gqa", "nano", "relu2"],
)  # fmt: skip
def test_same_parameters(cfg: MythosConfig):
    looped, dense = OpenMythos(cfg), DenseTransformer.like(cfg)
    unit = (2 if cfg.ffn_kind == "relu2" else 3) * cfg.dim * len(dense.blocks)
    assert abs(parameter_count(dense) - parameter_count(looped)) <= unit / 2
    assert len(dense.blocks) == cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers


@pytest.mark.parametrize("n_loops", [None, 1, 7])
def test_same_depth(n_loops):
    cfg = small_config(recurrent_layers=2)
    dense = DenseTransformer.like(cfg, match="depth", n_loops=n_loops)
    assert len(dense.blocks) == 1 + 2 * (n_loops or cfg.max_loop_iters) + 1
    active = (cfg.n_shared_experts * cfg.n_experts_per_tok + cfg.n_experts_per_tok) * cfg.expert_dim
    assert dense.blocks[0].ffn.down.in_features == active


def test_same_depth_of_a_loop_without_experts():
    cfg = small_config(n_experts=0, ffn_dim=11)
    assert DenseTransformer.like(cfg, match="depth").blocks[0].ffn.down.in_features == 11


def test_no_experts_and_no_loop(dense):
    assert all("lora" not in name and "router" not in name for name in dense.state_dict())


def test_cached_equals_whole(dense):
    ids, cache = random_ids(B, T), KVCache()
    parts = [
        dense(ids[:, now], cache, now.start) for now in (slice(0, 4), slice(4, 5), slice(5, T))
    ]
    assert_same(torch.cat(parts, 1), dense(ids).detach())


def test_padded_and_packed_equal_alone(dense):
    ids, mask = random_ids(B, T), torch.ones(B, T, dtype=torch.bool)
    mask[1, :5] = False
    alone = dense(ids[1:2, 5:]).detach()
    assert_same(dense(ids, attention_mask=mask)[1:2, 5:].detach(), alone)
    documents = torch.tensor([[0] * 5 + [1] * 4] * B)
    packed = dense(ids, document_ids=documents).detach()
    assert_same(packed[1:2, 5:], alone)
    assert_differs(dense(ids).detach()[1:2, 5:], alone)


def test_every_parameter_matters(dense):
    dense(random_ids(B, T)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in dense.parameters())


def test_a_fresh_model_reads_its_embedding_alone(attn_type):
    """Every block begins as the identity."""
    model, ids = DenseTransformer(small_config(attn_type)), random_ids(B, T)
    expected = model.head(model.final_norm(model.embedding(ids)))
    torch.testing.assert_close(model(ids), expected)
