"""Prefill: a prompt of many tokens, in one call and in chunks on a cache."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.measure import Finding, Measured, Row, attempt, compare, dtype_name, floor, gate
from benchmarks.models import Scale, build, dense_like, random_ids
from benchmarks.plain import common_parts, plain_twin
from benchmarks.roofline import forward_work
from benchmarks.training import REST
from open_mythos.model.cache import KVCache
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos

LOOPS = 4
"""Of a model that was made for more: cost is proportional to them."""
GATE_TOKENS = 67
TURNS = 2


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    experts, chosen = scale.experts[0]
    return (
        f"prefill of one prompt, dim {scale.dim}, {LOOPS} loops, {experts} experts top-{chosen}, "
        f"MLA; chunks of {scale.chunk} tokens"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """Compare, for every length, one call with plain, and chunks with one call."""
    for dtype in (torch.float32, torch.bfloat16):
        fast = build(scale, "mla", scale.experts[0]).to(dtype).eval()
        reference = plain_twin(build(scale, "mla", scale.experts[0])).eval()
        errors = _gate(scale, fast, reference, dtype)
        for tokens in scale.prompts:
            name = f"{tokens} tokens in one call"
            yield attempt(name, dtype, partial(_whole, scale, fast, tokens, dtype, name, errors))
            if tokens > scale.chunk:
                name = f"{tokens} tokens in chunks"
                yield attempt(
                    name, dtype, partial(_chunks, scale, fast, tokens, dtype, name, errors)
                )


def _gate(
    scale: Scale, fast: OpenMythos, reference: OpenMythos, dtype: torch.dtype
) -> tuple[float, float]:
    """Check the logits of one call and of chunks against plain float32."""
    ids = random_ids(1, GATE_TOKENS)
    expected = list(_prefill(reference, ids)[0])
    plain = list(_prefill(plain_twin(fast), ids)[0])
    return max(
        gate("prefill", list(logits[0]), plain, reference=expected, dtype=dtype)
        for logits in (_prefill(fast, ids), _prefill(fast, ids, GATE_TOKENS // 3))
    )


@torch.no_grad()
def _prefill(model: OpenMythos | DenseTransformer, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Logits (B, T, V), or with a chunk those of one chunk after the other on a cache."""
    depth = {"n_loops": LOOPS} if isinstance(model, OpenMythos) else {}
    cache = KVCache(ids.shape[1])
    parts = ids.split(chunk or ids.shape[1], dim=1)
    return torch.cat(
        [model(part, kv_cache=cache, start_pos=cache.length, **depth) for part in parts], dim=1
    )


def _whole(
    scale: Scale,
    fast: OpenMythos,
    tokens: int,
    dtype: torch.dtype,
    name: str,
    errors: tuple[float, float],
) -> Row:
    ids = random_ids(1, tokens)
    plain, rest = plain_twin(fast), common_parts(fast, attention=False)
    dense = dense_like(fast.cfg, LOOPS).to(dtype).eval()
    return compare(
        name,
        dtype,
        lambda: _prefill(fast, ids),
        lambda: _prefill(plain, ids),
        dense=lambda: _prefill(dense, ids),
        rest=(REST, lambda: _prefill(rest, ids)),
        alternations=TURNS,
        untimed=int(dtype == torch.bfloat16),
        goal=None,
        errors=errors,
        work=forward_work(fast.cfg, LOOPS, 1, tokens, dtype.itemsize),
        numbers={"tokens": tokens},
    )


def _chunks(
    scale: Scale,
    fast: OpenMythos,
    tokens: int,
    dtype: torch.dtype,
    name: str,
    errors: tuple[float, float],
) -> Finding:
    """Report time in chunks over time in one call."""
    ids = random_ids(1, tokens)
    row = compare(
        name,
        dtype,
        lambda: _prefill(fast, ids, scale.chunk),
        lambda: _prefill(fast, ids),
        alternations=TURNS,
        untimed=int(dtype == torch.bfloat16),
        goal=None,
        errors=errors,
    )
    return Finding(
        name, dtype_name(dtype), row.fast_seconds / row.plain_seconds, "x the time of one call",
        threads=row.threads, error=row.error, seconds=row.fast_seconds,
        floor=floor(forward_work(fast.cfg, LOOPS, 1, tokens, dtype.itemsize), dtype),
        numbers={"tokens": tokens, "one_call_seconds": row.plain_seconds},
    )  # fmt: skip
