"""Absorbed latent attention against the reference implementation: values and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_differs, assert_same
from torch import Tensor

from open_mythos.ops.attention import latent as latent_attention
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.latent import latent_attend, latent_values

SHAPES = {  # B, T, S, H, R, W
    "one token": (2, 1, 13, 3, 5, 7),
    "chunk": (3, 4, 9, 2, 8, 12),
    "square": (2, 7, 7, 4, 6, 9),
    "one head": (1, 1, 6, 1, 3, 4),
}


def inputs(name: str) -> tuple[Tensor, Tensor]:
    b, t, s, h, _, w = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    slot = torch.randn(b, s + 3, w, generator=generator)
    return torch.randn(b, t, h, w, generator=generator), slot[:, :s]


def seen(name: str) -> Tensor:
    b, t, s = SHAPES[name][:3]
    mask = torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(1)) < 0.6
    return mask | (torch.arange(s) == torch.arange(s - t, s)[:, None])


def run(name: str, backend: str, **arguments: object) -> tuple[Tensor, list[Tensor]]:
    q, entry = (x.requires_grad_() for x in inputs(name))
    out = latent_attend(q, entry, rank=SHAPES[name][4], backend=backend, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), (q, entry)))


@pytest.mark.parametrize("backend", ["batched", "rows", "auto"])
@pytest.mark.parametrize("visibility", ["all", "mask", "one mask", "causal"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_reference(name, visibility, backend):
    if visibility == "causal" and SHAPES[name][1] != SHAPES[name][2]:
        pytest.skip("causal means as many queries as entries")
    mask = {"mask": seen(name), "one mask": seen(name)[:1]}.get(visibility)
    arguments = {"mask": mask, "causal": visibility == "causal"}
    expected, slow = run(name, "reference", **arguments)
    out, fast = run(name, backend, **arguments)
    assert_same(out, expected)
    for gradient, other in zip(fast, slow, strict=True):
        assert_same(gradient, other)


@pytest.mark.parametrize("backend", ["batched", "rows", "reference"])
def test_is_attention_with_one_key_head_whose_values_are_the_latents(backend):
    q, entry = inputs("chunk")
    rank = SHAPES["chunk"][4]
    expected = attend(
        q,
        entry[:, :, None],
        entry[:, :, None, :rank],
        seen("chunk"),
        scale=1.0,
        backend="reference",
    )
    assert_same(latent_attend(q, entry, seen("chunk"), rank=rank, backend=backend), expected)


@pytest.mark.parametrize("backend", ["batched", "rows", "reference"])
def test_a_mask_matters(backend):
    q, entry = inputs("chunk")
    out = latent_attend(q, entry, rank=8, backend=backend)
    assert_differs(out, latent_attend(q, entry, seen("chunk"), rank=8, backend=backend))


def test_half_precision_stays_near_the_reference():
    q, entry = (x.bfloat16() for x in inputs("chunk"))
    expected = latent_attend(q, entry, seen("chunk"), rank=8, backend="reference").float()
    for backend in ("batched", "rows"):
        out = latent_attend(q, entry, seen("chunk"), rank=8, backend=backend)
        assert out.dtype == torch.bfloat16
        assert (out.float() - expected).norm() < 1e-2 * expected.norm()


def test_rows_are_taken_one_by_one_where_histories_are_long_and_half_precision(monkeypatch):
    monkeypatch.setattr(latent_attention, "ROW_BYTES", 200)
    _, entry = inputs("chunk")  # 9 x 12 elements to a row
    assert latent_attention._rows_pay(entry.bfloat16())
    assert not latent_attention._rows_pay(entry)
    assert not latent_attention._rows_pay(entry[:1].bfloat16())
    assert not latent_attention._rows_pay(entry[:, :4].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_every_head(dtype):
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(4, 12, 6, generator=generator).to(dtype)[:, 7:].requires_grad_()
    mixed = torch.randn(2, 3, 4, 6, generator=generator).to(dtype).requires_grad_()
    out = latent_values(mixed, up)
    expected = (up.float()[None, None] * mixed.float().unsqueeze(-2)).sum(-1)
    assert out.shape == (2, 3, 4, 5)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
    weights = torch.randn(out.shape, generator=generator)
    for one, other in zip(
        torch.autograd.grad((out.float() * weights).sum(), (mixed, up)),
        torch.autograd.grad((expected * weights).sum(), (mixed, up)),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
