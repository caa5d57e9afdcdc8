"""Kernel test cases: small sizes in the interpreter, real ones on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from open_mythos.ops.attention.latent_decode import latent_decode
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Largest error by dtype; the interpreter truncates bfloat16 instead of rounding."""


def error(got: Tensor, expected: Tensor) -> float:
    """Return the relative norm of the difference; infinity if it is not finite."""
    difference = (got.double() - expected.double()).norm()
    scaled = difference / expected.double().norm().clamp_min(1e-12)
    return scaled.item() if scaled.isfinite() else float("inf")


def expert_rows(
    counts: list[list[int]], k: int, m: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return rows, gradients and ends of loops where expert e got ``counts[loop][e]`` rows."""
    ends = [torch.tensor(loop, device=device).cumsum(0).to(torch.int32) for loop in counts]
    xs = [torch.randn(sum(loop), k, device=device).to(dtype) for loop in counts]
    grads = [torch.randn(sum(loop), m, device=device).to(dtype) for loop in counts]
    return xs, grads, ends


def check_weight_gradient(xs: list[Tensor], grads: list[Tensor], ends: list[Tensor]) -> Tensor:
    """Assert that kernel and reference agree; return the kernel's result."""
    got = grouped_weight_gradient(xs, grads, ends, backend="triton")
    expected = grouped_weight_gradient(xs, grads, ends, backend="reference")
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert error(got, expected) <= TOLERANCE[expected.dtype]
    return got


def slots(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: str = "cpu", strided: bool = False
) -> Tensor:
    """(L, B, S, W) entries; strided ones are part of a larger tensor that holds rows first."""
    n_loops, batch, positions, width = shape
    if not strided:
        return torch.randn(shape, device=device).to(dtype)
    whole = torch.randn(batch, n_loops, positions + 3, width + 8, device=device).to(dtype)
    return whole[:, :, 1:-2, :width].transpose(0, 1)


def check_decode(
    heads: int,
    slots_LBSW: Tensor,
    loops: list[int] | None,
    lengths: list[int] | None,
    rank: int,
    valid_BS: Tensor | None = None,
) -> Tensor:
    """Assert that kernel and reference agree; return the kernel's result."""
    device, (_, batch, _, width) = slots_LBSW.device, slots_LBSW.shape
    q_BHW = torch.randn(batch, heads, width, device=device).mul(3 / width**0.5).to(slots_LBSW.dtype)
    loops_B, lengths_B = (
        None if part is None else torch.tensor(part, device=device) for part in (loops, lengths)
    )
    got, expected = (
        latent_decode(q_BHW, slots_LBSW, loops_B, lengths_B, rank, valid_BS=valid_BS, backend=name)
        for name in ("triton", "reference")
    )
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert error(got, expected) <= TOLERANCE[expected.dtype]
    return got
