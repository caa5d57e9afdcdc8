"""The mixture layer: routing in odd cases, balance, shared experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_differs, assert_same, randomise, small_config
from torch import Tensor

from open_mythos import ConfigError, LoopTrace, MoEFFN
from open_mythos.model.context import Context
from open_mythos.model.layers.experts import Experts


def mixture(seed: int = 0, **changes: object) -> MoEFFN:
    return randomise(MoEFFN(small_config(**changes)), seed)


def slow(layer: MoEFFN, x: Tensor) -> Tensor:
    """The definition, token by token."""
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        score = (layer.router.weight @ token).sigmoid()
        chosen = (score + layer.router_bias).argsort(descending=True)[: layer.top_k]
        total = score[chosen].sum() if layer.top_k > 1 else 1.0
        y = torch.zeros_like(token)
        for expert in chosen:
            gate, up = (token @ layer.gate_up[expert]).chunk(2)
            y = y + score[expert] / total * ((F.silu(gate) * up) @ layer.down[expert])
        out.append(y + layer.shared(token) if layer.shared is not None else y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_shared_experts": 0}, {"n_experts_per_tok": 1}, {"n_experts_per_tok": 8},
     {"n_experts": 1, "n_experts_per_tok": 1}, {"expert_dim": 7, "n_experts": 5}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 9, 32), (1, 1, 32)], ids=["many tokens", "one token"])
def test_against_the_definition(changes, shape):
    layer, x = mixture(**changes), torch.randn(shape)
    torch.testing.assert_close(layer(x), slow(layer, x), rtol=1e-4, atol=1e-5)


def test_routing_is_varied():
    """Control of the layer's own tests: different tokens choose different experts."""
    _, chosen, weights = mixture().route(torch.randn(200, 32))
    assert chosen.unique().numel() == 8
    assert weights.std() > 0.03


class TestRouter:
    def test_weights_sum_to_one_and_experts_are_distinct(self):
        scores, chosen, weights = mixture(n_experts_per_tok=3).route(torch.randn(50, 32))
        assert scores.shape == (50, 8)
        torch.testing.assert_close(weights.sum(-1), torch.ones(50))
        assert all(len(set(row)) == 3 for row in chosen.tolist())

    def test_bias_chooses_and_does_not_weigh(self):
        layer, x = mixture(), torch.randn(50, 32)
        layer.router_bias.zero_()
        layer.router_bias[5] = 10.0
        scores, chosen, weights = layer.route(x)
        assert (chosen == 5).any(-1).all()
        expected = scores.gather(-1, chosen)
        torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))

    def test_all_equal_logits(self):
        layer, x = mixture(), torch.randn(6, 32)
        torch.nn.init.zeros_(layer.router.weight)
        layer.router_bias.zero_()
        _, chosen, weights = layer.route(x)
        torch.testing.assert_close(weights, torch.full((6, 2), 0.5))
        assert all(len(set(row)) == 2 for row in chosen.tolist())

    @pytest.mark.parametrize("size", [1e3, 1e30])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_saturated_scores(self, size, sign):
        """Every score exactly 1, or so close to 0 that their sum underflows."""
        layer = mixture()
        with torch.no_grad():
            layer.router.weight.copy_(sign * layer.router.weight.abs() * size)
        x = torch.rand(5, 32) + 0.1
        assert layer(x.unsqueeze(0)).isfinite().all()

    def test_all_experts_chosen(self):
        layer, x = mixture(n_experts_per_tok=8), torch.randn(10, 32)
        scores, chosen, weights = layer.route(x)
        assert chosen.sort(-1).values.tolist() == [list(range(8))] * 10
        torch.testing.assert_close(
            weights, (scores / scores.sum(-1, keepdim=True)).gather(-1, chosen)
        )

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("backend", ["reference", "sorted", "grouped"])
    def test_a_bad_token_stays_alone(self, bad, backend):
        layer, x = mixture(moe_backend=backend), torch.randn(1, 9, 32)
        clean = layer(x)
        x[0, 4, 7] = bad
        spoilt = layer(x)
        others = [i for i in range(9) if i != 4]
        assert_same(spoilt[:, others].detach(), clean[:, others].detach(), tolerance=1e-5)
        assert not spoilt[0, 4].isfinite().all()

    def test_float32_scores_in_half_precision(self):
        layer = mixture().bfloat16()
        tokens = torch.randn(5, 32, dtype=torch.bfloat16)
        scores, _, weights = layer.route(tokens)
        assert scores.dtype == weights.dtype == torch.float32
        exact = tokens.float() @ layer.router.weight.detach().float().mT
        torch.testing.assert_close(scores, exact.sigmoid(), rtol=1e-6, atol=1e-6)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores, _, _ = mixture().route(torch.randn(5, 32))
        assert scores.dtype == torch.float32

    @pytest.mark.parametrize("top_k", [1, 2, 8])
    def test_the_router_learns_and_the_bias_does_not(self, top_k):
        """A single weight renormalized would be the constant 1."""
        layer = mixture(n_experts_per_tok=top_k)
        layer(torch.randn(1, 20, 32)).square().sum().backward()
        assert not layer.router_bias.requires_grad
        assert layer.router.weight.grad.abs().sum() > 0


class TestBalance:
    def test_update(self):
        layer = mixture()
        layer.router_bias.zero_()
        layer.update_bias(torch.tensor([4.0, 0, 2, 2, 2, 2, 2, 2]), 0.1)
        assert layer.router_bias.tolist() == pytest.approx([-0.1, 0.1, 0, 0, 0, 0, 0, 0])

    def test_evens_out_the_load_while_the_router_learns(self):
        """A task that pulls all tokens to few experts; with the bias all stay in use."""
        shares = {}
        for speed in (0.0, 0.02):
            layer, generator = mixture(n_shared_experts=0), torch.Generator().manual_seed(0)
            layer.router_bias.zero_()
            favourite = torch.zeros(8)
            favourite[:2] = 2.0
            optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.5)
            total = torch.zeros(8)
            for step in range(200):
                x = torch.randn(1, 64, 32, generator=generator) + 0.5
                trace = LoopTrace(keep_routing=True)
                layer(x, trace=trace)
                loss = -(trace.scores[0, 0] * favourite).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                layer.update_bias(trace.load[0, 0], speed)
                total += trace.load[0, 0] if step >= 150 else 0
            shares[speed] = total / total.mean()
        assert shares[0.0].min() < 0.1  # without the bias some experts get nearly nothing
        assert shares[0.02].min() > 0.5
        assert shares[0.02].max() < 1.6


def test_records_belong_to_layer_and_loop():
    layer = MoEFFN(small_config(), layer=7)
    trace = LoopTrace(keep_routing=True)
    layer(torch.randn(2, 5, 32), loop=3, trace=trace)
    assert set(trace.load) == set(trace.scores) == set(trace.experts) == {(7, 3)}
    assert trace.scores[7, 3].shape == (2, 5, 8)
    assert trace.experts[7, 3].shape == (2, 5, 2)


def test_shared_experts_see_every_token():
    layer, x = mixture(), torch.randn(1, 6, 32)
    torch.nn.init.zeros_(layer.down)
    torch.testing.assert_close(layer(x), layer.shared(x))
    assert_differs(mixture()(x).detach(), layer.shared(x).detach())


class TestExact:
    """With ``Context.exact`` and a constant number of rows, bits do not depend on other rows."""

    @torch.no_grad()
    @pytest.mark.parametrize("changes", [{}, {"n_shared_experts": 0}, {"n_experts_per_tok": 1}])
    def test_a_row_among_others(self, changes):
        layer, own = mixture(**changes), torch.randn(1, 1, 32)
        ctx = replace(Context.of(own, small_config()), exact=True)
        found = []
        for seed in range(40):
            others = torch.randn(15, 1, 32, generator=torch.Generator().manual_seed(seed))
            at = seed % 16
            x = torch.cat((others[:at], own, others[at:]))
            found.append(layer(x, ctx)[at])
        assert all(torch.equal(each, found[0]) for each in found)
        torch.testing.assert_close(found[0], layer(own)[0], rtol=1e-4, atol=1e-5)

    def test_it_is_the_context_that_asks(self, monkeypatch):
        layer, x, asked = mixture(), torch.randn(4, 1, 32), []
        exactly = layer.experts.exactly
        monkeypatch.setattr(layer.experts, "exactly", lambda *a: asked.append(1) or exactly(*a))
        ctx = Context.of(x, small_config())
        with torch.no_grad():
            layer(x, ctx)
            assert not asked
            layer(x, replace(ctx, exact=True))
        assert asked

    def test_other_experts_refuse(self):
        layer, x = mixture(), torch.randn(4, 1, 32)
        layer.experts = Experts()
        layer.experts.operands = lambda *_: (None, None)
        with pytest.raises(ConfigError, match="no exact form"):
            layer(x, replace(Context.of(x, small_config()), exact=True))
