"""Single ops against their reference implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import device
from benchmarks.measure import GateError, Measured, Row, attempt, compare, distances
from benchmarks.models import Scale
from benchmarks.roofline import Work
from open_mythos.ops.attention.attend import attend
from open_mythos.ops.attention.latent import latent_attend
from open_mythos.ops.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

HEADS = 8
VOCABULARY = 32_000
EQUAL = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest relative error against the float32 reference."""


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return f"operations against their reference implementations, {HEADS} heads, width {scale.dim}"


def rows(scale: Scale) -> Iterator[Measured]:
    """Latent attention of one new token, causal attention, cross-entropy from hidden states."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, take in (
            (f"latent attention, {scale.decode_batch} rows on {scale.contexts[0]}", _latent),
            (f"causal attention, {scale.tokens} tokens, forward and backward", _causal),
            (f"cross-entropy of {VOCABULARY}, forward and backward", _entropy),
        ):
            yield attempt(name, dtype, partial(take, scale, name, dtype))


def _latent(scale: Scale, name: str, dtype: torch.dtype) -> Row:
    rank, rope, context = scale.dim // 2, scale.dim // 16, scale.contexts[0]
    shapes = (scale.decode_batch, 1, HEADS, rank + rope), (scale.decode_batch, context, rank + rope)
    q_BTHW, entry_BSW = _randoms(shapes, dtype)
    size = entry_BSW.nbytes
    work = Work(4 * entry_BSW.numel() * HEADS, size, size)

    def call(dtype: torch.dtype, backend: str) -> list[Tensor]:
        return [latent_attend(q_BTHW.to(dtype), entry_BSW.to(dtype), rank=rank, backend=backend)]

    return _row(scale, name, dtype, call, call, work, plain_backend="reference")


def _causal(scale: Scale, name: str, dtype: torch.dtype) -> Row:
    width = scale.dim // HEADS
    shape = (scale.batch, scale.tokens, HEADS, width)
    tensors = _randoms((shape, shape, shape), dtype)
    scores = scale.batch * scale.tokens * (scale.tokens + 1) / 2 * HEADS
    # two matmuls forward, five backward (one of them recomputed)
    work = Work(7 * 2 * scores * width, 7 * tensors[0].nbytes, 7 * tensors[0].nbytes)

    def call(dtype: torch.dtype, backend: str) -> list[Tensor]:
        return _with_gradients(partial(attend, causal=True, backend=backend), tensors, dtype)

    return _row(scale, name, dtype, call, call, work, plain_backend="reference")


def _entropy(scale: Scale, name: str, dtype: torch.dtype) -> Row:
    n = scale.batch * scale.tokens
    tensors = _randoms(((n, scale.dim), (VOCABULARY, scale.dim)), dtype)
    targets = torch.arange(n, device=device()) * 7 % VOCABULARY
    size = tensors[1].nbytes

    def call(form: Callable[..., Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
        return _with_gradients(lambda x, w: form(x, w / scale.dim**0.5, targets), tensors, dtype)

    fast = partial(call, linear_cross_entropy)
    plain = partial(call, linear_cross_entropy_reference)
    work = Work(6 * n * scale.dim * VOCABULARY, 3 * size, size)
    return _row(scale, name, dtype, fast, plain, work, plain_backend="auto")


def _row(
    scale: Scale,
    name: str,
    dtype: torch.dtype,
    fast: Callable[..., list[Tensor]],
    plain: Callable[..., list[Tensor]],
    work: Work,
    plain_backend: str,
) -> Row:
    reference = plain(torch.float32, plain_backend)
    errors = tuple(max(distances(results, reference)) for results in
                   (fast(dtype, "auto"), plain(dtype, plain_backend)))  # fmt: skip
    if not errors[0] <= EQUAL[dtype]:
        raise GateError(f"{name}: off by {errors[0]:.2e}, allowed {EQUAL[dtype]:.0e}")
    return compare(
        name, dtype, lambda: fast(dtype, "auto"), lambda: plain(dtype, plain_backend),
        alternations=scale.turns, goal=None, errors=(errors[0], errors[1]), work=work,
    )  # fmt: skip


def _randoms(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Return normal tensors of these shapes, exactly representable in bfloat16."""
    generator = torch.Generator(device()).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=device()).bfloat16().to(dtype)
        for shape in shapes
    ]


def _with_gradients(
    form: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """Return the result and the gradients of all tensors."""
    leaves: list[Any] = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    out = form(*leaves)
    out.backward(torch.ones((), device=out.device) if out.dim() == 0 else leaves[0].detach())
    return [out.detach(), *(leaf.grad for leaf in leaves)]
