"""Rotary positions as rotations of complex numbers, near and a million tokens away."""

from __future__ import annotations

import pytest
import torch

from open_mythos import apply_rope, precompute_rope_freqs
from open_mythos.ops.rope import rope_table

THETA = 500000.0


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("width", [2, 4, 10])
def test_is_a_complex_rotation(width, batched):
    positions = torch.tensor([[0, 3, 17], [999_999, 5, 5]]) if batched else torch.tensor([0, 3, 17])
    x = torch.randn(2, 3, 4, width)
    first, second = x.double().chunk(2, -1)
    frequency = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = positions[..., None, None] * frequency
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1).float()
    table = rope_table(positions, width, THETA)
    assert table.shape == (2, *positions.shape, width // 2)
    assert table.dtype == torch.float32
    torch.testing.assert_close(apply_rope(x, table), expected, rtol=1e-4, atol=1e-5)


def test_keeps_lengths_and_the_first_position():
    x = torch.randn(2, 5, 3, 8)
    turned = apply_rope(x, precompute_rope_freqs(8, 5))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0], x[:, 0])
    assert not torch.allclose(turned[:, 1], x[:, 1])


@pytest.mark.parametrize("start", [0, 1000, 999_000])
def test_scores_depend_on_the_distance_alone(start):
    q, k = torch.randn(2, 1, 1, 1, 16)

    def product(at: int, to: int) -> torch.Tensor:
        tables = [rope_table(torch.tensor([start + i]), 16, THETA) for i in (at, to)]
        return (apply_rope(q, tables[0]) * apply_rope(k, tables[1])).sum()

    torch.testing.assert_close(product(7, 2), product(105, 100), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(product(7, 2), product(8, 2), atol=1e-3)


def test_precomputed_table():
    assert torch.equal(precompute_rope_freqs(8, 5), rope_table(torch.arange(5), 8, THETA))
    assert precompute_rope_freqs(8, 5, 100.0).shape == (2, 5, 4)
    assert not torch.equal(precompute_rope_freqs(8, 5, 100.0), precompute_rope_freqs(8, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_type_of_the_result(dtype):
    x = torch.randn(1, 3, 2, 4).to(dtype)
    assert apply_rope(x, precompute_rope_freqs(4, 3)).dtype == dtype
