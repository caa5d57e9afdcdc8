"""Kernel test cases: small sizes in the interpreter, real ones on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.ops.attention.latent import latent_attend
from open_mythos.ops.attention.paged import PagedHistory, kv_paged, latent_paged
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


def pages(
    lengths: list[int], width: int, page: int, dtype: torch.dtype, device: str = "cpu"
) -> PagedHistory:
    """A history whose pages lie in random order, with NaN wherever no row looks."""
    counts = [-(-length // page) for length in lengths]
    order = (torch.randperm(sum(counts)) + 1).split(counts)
    table = torch.nn.utils.rnn.pad_sequence(list(order), batch_first=True)
    pool = torch.full((sum(counts) + 1, page, width), torch.nan)
    for numbers, length in zip(order, lengths, strict=True):
        at = torch.arange(length)
        pool[numbers[at // page], at % page] = torch.randn(length, width)
    return PagedHistory(pool.to(device, dtype), table.to(device), torch.tensor(lengths).to(device))


def check_latents(heads: int, history: PagedHistory, rank: int) -> Tensor:
    """Assert that kernel and reference agree on latents; return the kernel's result."""
    rows, width = len(history), history.pool_NPW.shape[-1]
    q_RHW = queries((rows, heads, width), history.pool_NPW) / width**0.5
    return _agree(lambda name: latent_paged(q_RHW, history, rank, name))


def check_keys_and_values(heads: int, history: PagedHistory, kv_heads: int) -> Tensor:
    """The same for keys and values."""
    width = history.pool_NPW.shape[-1] // (2 * kv_heads)
    q_RHK = queries((len(history), heads, width), history.pool_NPW)
    return _agree(lambda name: kv_paged(q_RHK, history, kv_heads, name))


def check_unpaged(
    heads: int, entry_BSW: Tensor, rank: int, valid_BS: Tensor | None = None
) -> Tensor:
    """The same for one slot of contiguous latents per row."""
    batch, positions, width = entry_BSW.shape
    q_B1HW = queries((batch, 1, heads, width), entry_BSW) / width**0.5
    mask = None if valid_BS is None else valid_BS.view(batch, 1, 1, positions)
    return _agree(lambda name: latent_attend(q_B1HW, entry_BSW, mask, rank=rank, backend=name))


def queries(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return (3 * torch.randn(shape, device=like.device)).to(like.dtype)


def _agree(call: Callable[[str], Tensor]) -> Tensor:
    got, expected = call("triton"), call("reference")
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    assert error(got, expected) <= TOLERANCE[expected.dtype]
    return got
