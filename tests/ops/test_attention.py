"""Attention kernels against the plain twin, values and gradients, at odd sizes too."""

from __future__ import annotations

import logging

import pytest
import torch
from helpers import assert_differs, assert_same
from torch import Tensor

from open_mythos.ops import attention
from open_mythos.ops.attention import attend

SHAPES = {  # B, T, S, H, G, K, V
    "square": (2, 8, 8, 4, 4, 16, 16),
    "grouped": (2, 7, 7, 6, 2, 8, 8),
    "one key head": (3, 5, 5, 4, 1, 4, 4),
    "narrow values": (2, 9, 9, 3, 3, 12, 5),
    "wide values": (2, 9, 9, 4, 2, 5, 12),
    "one token": (1, 1, 1, 2, 1, 3, 3),
    "decoding": (2, 1, 13, 4, 2, 8, 8),
    "chunk": (2, 5, 13, 4, 2, 8, 6),
}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, t, s, h, g, k, v = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, t, h, k), (b, s, g, k), (b, s, g, v))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def run(name: str, backend: str, **arguments: object) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients."""
    parts = [part.requires_grad_() for part in inputs(name)]
    out = attend(*parts, backend=backend, **arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    return out.detach(), [part.grad for part in parts]


def random_mask(name: str) -> Tensor:
    b, t, s = SHAPES[name][:3]
    mask = torch.rand(b, 1, t, s, generator=torch.Generator().manual_seed(2)) < 0.6
    return mask | (torch.arange(s) == torch.arange(s - t, s)[:, None])


@pytest.mark.parametrize("backend", ["sdpa", "auto"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("visibility", ["causal", "mask", "all"])
def test_equals_the_plain_twin(name, visibility, scale, backend):
    if visibility == "causal" and SHAPES[name][1] != SHAPES[name][2]:
        pytest.skip("causal means as many queries as keys")
    arguments = {"causal": visibility == "causal", "scale": scale}
    arguments["mask"] = random_mask(name) if visibility == "mask" else None
    expected, slow = run(name, "reference", **arguments)
    out, fast = run(name, backend, **arguments)
    assert out.shape == expected.shape
    if expected.numel() > 20:
        assert_same(out, expected)
    for gradient, reference in zip(fast, slow, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-4)


def test_the_twin_is_the_definition():
    q, k, v = inputs("grouped")
    out = attend(q, k, v, causal=True, backend="reference")
    for head in range(6):
        for i in range(7):
            scores = k[0, : i + 1, head // 3] @ q[0, i, head] / 8**0.5
            expected = scores.softmax(0) @ v[0, : i + 1, head // 3]
            torch.testing.assert_close(out[0, i, head], expected)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_mask_causality_and_scale_matter(backend):
    """Control."""
    q, k, v = inputs("square")
    plain = attend(q, k, v, backend=backend)
    assert_differs(attend(q, k, v, causal=True, backend=backend), plain)
    assert_differs(attend(q, k, v, random_mask("square"), backend=backend), plain)
    assert_differs(attend(q, k, v, scale=2.0, backend=backend), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["grouped", "narrow values"])
def test_half_precision(name, dtype):
    exact = attend(*inputs(name), causal=True, backend="reference")
    for backend in ("reference", "sdpa"):
        out = attend(*inputs(name, dtype), causal=True, backend=backend)
        assert out.dtype == dtype
        assert (out.float() - exact).abs().max() < 0.05


def test_the_choice_is_logged_once(caplog):
    attention._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="open_mythos.ops.attention"):
        for _ in range(3):
            attend(*inputs("square"), causal=True)
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["square", "grouped", "narrow values", "decoding", "chunk"])
def test_gpu_equals_cpu(name):
    parts = inputs(name)
    mask = random_mask(name)
    expected = attend(*parts, mask, backend="reference")
    out = attend(*(part.cuda() for part in parts), mask.cuda())
    assert_same(out.cpu(), expected, tolerance=1e-3)
