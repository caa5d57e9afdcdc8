"""Norm, feed-forward, adapter and loop embedding against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from open_mythos import Expert, LoRAAdapter, RMSNorm, loop_index_embedding


class TestNorm:
    def test_formula(self):
        norm, x = RMSNorm(6, eps=0.1), torch.randn(2, 3, 6)
        torch.nn.init.normal_(norm.weight)
        expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_has_the_type_of_its_weight(self, dtype):
        norm = RMSNorm(6).to(dtype)
        for given in (torch.float32, torch.bfloat16):
            assert norm(torch.randn(2, 6, dtype=given)).dtype == dtype

    def test_computes_in_float32(self):
        """Squares of large half-precision numbers would overflow."""
        x = torch.full((1, 6), 3e4, dtype=torch.float16)
        torch.testing.assert_close(RMSNorm(6).half()(x), torch.ones(1, 6, dtype=torch.float16))


class TestExpert:
    def test_formula(self):
        expert, x = Expert(6, 5), torch.randn(2, 3, 6)
        gate, up = expert.gate_up.weight.split(5)
        hidden = F.silu(x @ gate.T) * (x @ up.T)
        torch.testing.assert_close(expert(x), hidden @ expert.down.weight.T)


class TestLoRA:
    def test_starts_as_nothing(self):
        assert not LoRAAdapter(6, 2, 3)(torch.randn(4, 6), 1).any()

    def test_each_depth_has_its_own_and_the_last_is_kept(self):
        adapter, x = LoRAAdapter(6, 2, 3), torch.randn(4, 6)
        torch.nn.init.normal_(adapter.up)
        for t in range(3):
            torch.testing.assert_close(adapter(x, t), x @ adapter.down[t] @ adapter.up[t])
        assert not torch.allclose(adapter(x, 0), adapter(x, 1))
        for t in (3, 4, 1000):
            assert torch.equal(adapter(x, t), adapter(x, 2))

    def test_a_loop_for_every_row(self):
        """Loops that only the device knows: outputs and gradients as row by row."""
        adapter, x = LoRAAdapter(7, 2, 3), torch.randn(4, 5, 7, requires_grad=True)
        torch.nn.init.normal_(adapter.up)
        loops = [2, 0, 5, 1]
        parameters = (x, adapter.down, adapter.up)
        together = adapter(x, torch.tensor(loops))
        single = torch.stack([adapter(row, t) for row, t in zip(x, loops, strict=True)])
        torch.testing.assert_close(together, single)
        weight = torch.randn_like(single)
        for got, expected in zip(
            torch.autograd.grad((together * weight).sum(), parameters),
            torch.autograd.grad((single * weight).sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(got, expected)

    @pytest.mark.parametrize("t", [0, 2, 9])
    def test_one_loop_for_all_rows(self, t):
        adapter, x = LoRAAdapter(7, 2, 3), torch.randn(4, 5, 7)
        torch.nn.init.normal_(adapter.up)
        torch.testing.assert_close(adapter(x, torch.tensor([t])), adapter(x, t))


class TestLoopEmbedding:
    def test_formula(self):
        h = torch.randn(2, 3, 8)
        signal = (loop_index_embedding(h, 5, 4) - h)[0, 0].tolist()
        slow = 5 * 10000**-0.5  # two wavelengths: 1 and sqrt(theta)
        expected = [math.sin(5), math.sin(slow), math.cos(5), math.cos(slow), 0, 0, 0, 0]
        assert signal == pytest.approx(expected, abs=1e-6)

    def test_is_the_same_for_every_token(self):
        h = torch.zeros(2, 3, 16)
        signal = loop_index_embedding(h, 2, 6)
        assert torch.equal(signal, signal[:1, :1].expand_as(signal))

    def test_tells_loops_apart(self):
        h = torch.zeros(1, 1, 16)
        signals = [loop_index_embedding(h, t, 8) for t in range(64)]
        for t, signal in enumerate(signals):
            assert not any(torch.allclose(signal, other, atol=1e-3) for other in signals[:t])

    def test_a_loop_for_every_row(self):
        h, loops = torch.randn(3, 2, 9), [4, 0, 7]
        rows = [loop_index_embedding(row, t, 6) for row, t in zip(h, loops, strict=True)]
        torch.testing.assert_close(
            loop_index_embedding(h, torch.tensor(loops), 6), torch.stack(rows)
        )
        torch.testing.assert_close(
            loop_index_embedding(h, torch.tensor([4]), 6), loop_index_embedding(h, 4, 6)
        )

    @pytest.mark.parametrize("loop_dim", [0, 1, 2, 7, 8])
    def test_any_width(self, loop_dim):
        h = torch.randn(2, 3, 8, dtype=torch.bfloat16)
        out = loop_index_embedding(h, 3, loop_dim)
        assert out.shape == h.shape
        assert out.dtype == h.dtype
        changed = (out != h).any(0).any(0).sum()
        assert changed <= 2 * (loop_dim // 2)
