"""Both attention layers against their equations, and the two ways of latent attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import (
    ATTENTION_TYPES,
    assert_differs,
    assert_same,
    choices_of,
    randomise,
    small_config,
)
from torch import Tensor

from open_mythos import GQAttention, KVCache, MLAttention, apply_rope
from open_mythos.model.context import Context
from open_mythos.model.layers.block import ATTENTION
from open_mythos.ops.attention.paged import PagedHistory
from open_mythos.ops.attention.pieces import plan_pieces

B, T = 2, 9


def context(n_new: int, layer: GQAttention | MLAttention, **arguments: object) -> Context:
    return Context.build(n_new, layer.cfg.rotaries, torch.device("cpu"), **arguments)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One head, one sequence, causal: (T, K), (T, K), (T, V) -> (T, V)."""
    scores = q @ k.T / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.ones(len(q), len(q)).tril().bool(), -torch.inf).softmax(-1) @ v


def by_head_gqa(layer: GQAttention, x: Tensor) -> Tensor:
    cfg, rope = layer.cfg, context(T, layer).rope
    heads = []
    for head in range(cfg.n_heads):
        group = head // (cfg.n_heads // cfg.n_kv_heads)
        wq = layer.q_proj.weight.view(cfg.n_heads, cfg.head_dim, -1)[head]
        wk, wv = layer.kv_proj.weight.view(2, cfg.n_kv_heads, cfg.head_dim, -1)[:, group]
        q, k = (apply_rope((x @ w.T)[None, :, None], rope)[0, :, 0] for w in (wq, wk))
        heads.append(softmax_attention(q, k, x @ wv.T))
    return layer.out_proj(torch.cat(heads, -1))


def by_head_mla(layer: MLAttention, x: Tensor) -> Tensor:
    """DeepSeek-V2, equations 9-19, one head at a time."""
    cfg, rope = layer.cfg, context(T, layer).rope
    query = layer.q_norm(layer.q_down(x)) if cfg.q_lora_rank else x
    latent, key = layer.kv_down(x).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
    latent, key = layer.kv_norm(latent), apply_rope(key[None, :, None], rope)[0, :, 0]
    heads = []
    for head in range(cfg.n_heads):
        wq = layer.q_up.weight.view(cfg.n_heads, -1, query.shape[-1])[head]
        up = layer.kv_up.weight.view(cfg.n_heads, -1, cfg.kv_lora_rank)[head]
        nope, rotary = (query @ wq.T).split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        q = torch.cat((nope, apply_rope(rotary[None, :, None], rope)[0, :, 0]), -1)
        k, v = (latent @ up.T).split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        heads.append(softmax_attention(q, torch.cat((k, key), -1), v))
    return layer.out_proj(torch.cat(heads, -1))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_gqa_against_its_equations(n_kv_heads):
    layer, x = (
        randomise(GQAttention(small_config("gqa", n_kv_heads=n_kv_heads))),
        torch.randn(T, 32),
    )
    assert_same(layer(x[None])[0].detach(), by_head_gqa(layer, x).detach())


@pytest.mark.parametrize("q_lora_rank", [0, 12])
def test_mla_against_its_equations(q_lora_rank):
    layer, x = randomise(MLAttention(small_config(q_lora_rank=q_lora_rank))), torch.randn(T, 32)
    assert_same(layer(x[None])[0].detach(), by_head_mla(layer, x).detach())


def test_table():
    assert ATTENTION["gqa"] is GQAttention
    assert ATTENTION["mla"] is MLAttention
    assert set(ATTENTION) == set(ATTENTION_TYPES) == set(choices_of("attn_type"))


class TestCache:
    def test_mla_keeps_the_normalised_latent_and_one_rotary_key(self):
        layer, x = randomise(MLAttention(small_config(), layer=3)), torch.randn(B, T, 32)
        cache = KVCache()
        ctx = context(T, layer, cache=cache)
        layer(x, ctx, loop=0)
        held = cache._slots[3, 0]
        assert held.shape == (B, T, 20 + 4)
        latent, key = layer.kv_down(x).split([20, 4], -1)
        torch.testing.assert_close(held[..., :20], layer.kv_norm(latent))
        torch.testing.assert_close(
            held[..., 20:], apply_rope(key.unsqueeze(2), ctx.rope).squeeze(2)
        )

    def test_gqa_keeps_rotated_keys_and_values(self):
        layer, x = randomise(GQAttention(small_config("gqa"), layer=3)), torch.randn(B, T, 32)
        cache = KVCache()
        ctx = context(T, layer, cache=cache)
        layer(x, ctx, loop=0)
        held = cache._slots[3, 0].view(B, T, 2, 2, 8)
        key, value = layer.kv_proj(x).view(B, T, 2, 2, 8).unbind(2)
        torch.testing.assert_close(held[:, :, 0], apply_rope(key, ctx.rope))
        torch.testing.assert_close(held[:, :, 1], value)


class TestAbsorption:
    """Latent attention without leaving the latent space equals the expanded form."""

    def both(
        self, n_new: int, n_old: int, dtype: torch.dtype = torch.float32, **arguments: object
    ) -> tuple[MLAttention, list[tuple[Tensor, dict[str, Tensor]]]]:
        layer = randomise(MLAttention(small_config())).to(dtype)
        cache = KVCache()
        cache.columns = cache.columns.extend(n_old, None, None)
        ctx = context(n_new, layer, start_pos=n_old, cache=cache, **arguments)
        x = torch.randn(B, n_old + n_new, 32, dtype=dtype)
        entries = layer.entry(x, context(n_old + n_new, layer).rope)
        query, results = layer.query(x[:, n_old:], ctx.rope), []
        weights = torch.randn(B, n_new, 4, 10)
        for attend in (layer.expanded, layer._absorbed_in_blocks):
            q, entry = (t.detach().requires_grad_() for t in (query, entries))
            layer.zero_grad()
            out = attend(q, entry, ctx)
            (out.float() * weights).sum().backward()
            gradients = {"q": q.grad, "entry": entry.grad, "up": layer.kv_up.weight.grad.clone()}
            results.append((out.detach(), gradients))
        return layer, results

    @pytest.mark.parametrize(("n_new", "n_old"), [(2, 0), (1, 7), (9, 0), (4, 5)])
    def test_values_and_gradients(self, n_new, n_old):
        _, ((expanded, slow), (absorbed, fast)) = self.both(n_new, n_old)
        assert absorbed.shape == expanded.shape == (B, n_new, 4, 10)
        assert_same(absorbed, expanded)
        for name, gradient in slow.items():
            assert_same(fast[name], gradient)

    def test_with_padding(self):
        mask = torch.ones(B, T, dtype=torch.bool)
        mask[0, :4] = False
        _, ((expanded, _), (absorbed, _)) = self.both(T, 0, valid_BT=mask)
        assert_same(absorbed, expanded)

    def test_half_precision(self):
        _, ((expanded, _), (absorbed, _)) = self.both(4, 5, torch.bfloat16)
        assert absorbed.dtype == expanded.dtype == torch.bfloat16
        assert (absorbed.float() - expanded.float()).abs().max() < 0.1 * expanded.float().std()

    def test_causality_is_needed(self):
        """Control: what a later token adds is visible in the last query and in no other."""
        layer = randomise(MLAttention(small_config()))
        ctx, x = context(T, layer), torch.randn(B, T, 32)
        query, entry = layer.query(x, ctx.rope), layer.entry(x, ctx.rope)
        changed = entry.clone()
        changed[:, -1] += 1
        for attend in (layer.expanded, layer.absorbed):
            first, second = (attend(query, kept, ctx).detach() for kept in (entry, changed))
            assert_same(second[:, :-1], first[:, :-1])
            assert_differs(second[:, -1], first[:, -1])

    @pytest.mark.parametrize(
        ("n_new", "n_all", "absorb"), [(1, 4096, True), (4096, 4096, False), (64, 4096, True)]
    )
    def test_choice_at_real_widths(self, n_new, n_all, absorb):
        """Decoding is absorbed, prefill and training are expanded, by the FLOP count."""
        with torch.device("meta"):
            layer = MLAttention(small_config(
                n_heads=16, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64,
                v_head_dim=128,
            ))  # fmt: skip
        assert layer.absorbing_is_cheaper(n_new, n_all) is absorb

    def test_both_ways_are_taken(self):
        """Control of every cached test: small models too expand prefill and absorb decoding."""
        layer = randomise(MLAttention(small_config()))
        assert not layer.absorbing_is_cheaper(T, T)
        assert layer.absorbing_is_cheaper(1, T)


@pytest.mark.parametrize(("attn_type", "kind"), [("gqa", "document_BT"), ("mla", "valid_BT")])
def test_padding_and_documents_compile_whole(attn_type, kind):
    """Without a graph break; long enough that uncompiled they are computed one by one."""
    layer, n = randomise(ATTENTION[attn_type](small_config(attn_type))), 160
    x, second = torch.randn(B, n, 32), torch.arange(n).expand(B, n) >= 70
    ctx = context(n, layer, **{kind: second if kind == "valid_BT" else second.long()})
    real = second if kind == "valid_BT" else torch.ones_like(second)
    assert plan_pieces(ctx.mask, x.dtype) is not None
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        part = x.clone().requires_grad_()
        y = call(part, ctx, 0)
        (y[real] ** 2).sum().backward()
        results.append((y.detach()[real], part.grad[real]))
    for found, right in zip(*reversed(results), strict=True):
        assert_same(found, right)


class Pages:
    """One level of a paged cache, of rows of unequal length."""

    def __init__(self, width: int, lengths: list[int], page: int) -> None:
        self.page, self.lengths = page, torch.tensor(lengths)
        counts = ((self.lengths + page) // page).tolist()
        order = (torch.randperm(sum(counts)) + 1).split(counts)
        self.table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
        self.pool = torch.full((sum(counts) + 1, page, width), torch.nan)

    def put(self, row: int, start: int, entry_TW: Tensor) -> None:
        at = torch.arange(start, start + len(entry_TW))
        self.pool[self.table[row, at // self.page], at % self.page] = entry_TW

    def write(self, layer: int, loop: object, entry_BTW: Tensor, active: object) -> PagedHistory:
        for row, length in enumerate(self.lengths.tolist()):
            self.put(row, length, entry_BTW[row])
        return PagedHistory(self.pool, self.table, self.lengths + 1)


@pytest.mark.parametrize("attn_type", ATTENTION_TYPES)
@torch.no_grad()
def test_a_new_token_attends_to_pages_as_to_a_cache_of_its_own(attn_type):
    lengths, cfg = [2, 6, 7], small_config(attn_type)
    layer = randomise(ATTENTION[attn_type](cfg))
    pages, expected = Pages(cfg.cache_width, lengths, page=4), []
    x_BTD = torch.randn(len(lengths), max(lengths) + 1, cfg.dim)
    for row, length in enumerate(lengths):
        x, cache = x_BTD[row : row + 1, : length + 1], KVCache()
        ctx = context(length + 1, layer, cache=cache)
        expected.append(layer(x, ctx)[0, -1:])
        pages.put(row, 0, cache._slots[0, 0][0, :length])
    rope = torch.cat([context(1, layer, start_pos=n).rope for n in lengths], dim=1).unsqueeze(2)
    new = torch.stack([x[n : n + 1] for x, n in zip(x_BTD, lengths, strict=True)])
    ctx = replace(context(1, layer), ropes={layer.cfg.rotary: rope}, cache=pages)
    assert_same(layer(new, ctx), torch.stack(expected))
