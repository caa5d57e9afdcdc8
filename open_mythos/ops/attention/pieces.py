"""Blockwise attention on a CPU: PyTorch's flash kernel on blocks of queries and keys.

Each block is an unmasked call, a causal call, or a call with a temporary mask. Partial results are
merged by their log-sum-exp. The backward pass (FlashAttention 2, arXiv 2307.08691, section 3.1)
recomputes the masks, so nothing is saved beyond what the kernel itself saves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_mythos.devices import as_autocast
from open_mythos.ops.attention.visibility import Visibility, additive

Place = tuple[slice, slice, slice]
"""Rows, heads, tokens."""

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

WHOLE_PAIRS = 1 << 20
"""Masks of up to so many elements are materialized once for all layers and loops."""
BLOCK_PAIRS = 1 << 22
"""Elements of the mask of a block of queries."""
BLOCK_QUERIES = (16, 256)
"""Fewest and most queries of a block; larger blocks compute more masked pairs."""
DOCUMENT_TOKENS = 64
"""Documents shorter than this on average are masked: one call per document would cost more."""
HALF_PAIRS = 1 << 16
"""In half precision the kernel's backward is slow on short sequences: documents are computed one by
one if queries times average length reach this."""


@dataclass(frozen=True)
class Piece:
    """A block of rows, queries and keys: ``causal``, masked, or unmasked."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool = False
    masked: bool = False


@dataclass(frozen=True)
class Plan:
    """The blocks that make up a call.

    Attributes:
        pieces: In order of computation.
        joined: Whether a query is in several blocks.
        shared: Whether a query or a key is in several blocks.
    """

    pieces: list[Piece]
    joined: bool = False
    shared: bool = False


def plan_pieces(seen: Visibility, dtype: torch.dtype) -> Plan | None:
    """Choose the blocks for ``seen`` on a CPU; None for one call with the full mask."""
    every = slice(None)
    documents = seen.documents if seen.n_queries >= DOCUMENT_TOKENS else None
    if documents and _tokens(documents) >= len(documents) * _least_average(seen, dtype):
        return Plan([
            Piece(slice(row, row + 1), slice(start, stop), slice(start, stop), causal=True)
            for row, start, stop in documents
        ])  # fmt: skip
    if seen.n_pairs <= WHOLE_PAIRS:
        return None
    if seen.plain:
        past, new = slice(0, seen.first), slice(seen.first, seen.n_columns)
        pieces = [Piece(every, every, new, causal=True)]
        if seen.first:
            pieces.append(Piece(every, every, past))
        return Plan(pieces, joined=len(pieces) > 1, shared=True)
    fewest, most = BLOCK_QUERIES
    size = min(most, max(fewest, BLOCK_PAIRS // (seen.batch * seen.n_columns)))
    return Plan(
        [
            Piece(every, slice(start, stop), slice(low, high), masked=True)
            for start, stop, low, high in seen.spans(size)
        ],
        shared=True,
    )


def _least_average(seen: Visibility, dtype: torch.dtype) -> float:
    """Return the least average length at which documents are computed one by one."""
    half = HALF_PAIRS / seen.n_queries if dtype.itemsize < 4 else 0
    return max(DOCUMENT_TOKENS, half)


def _tokens(documents: Sequence[tuple[int, int, int]]) -> int:
    return sum(stop - start for _, start, stop in documents)


def attend_pieces(
    q_BTHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    seen: Visibility,
    plan: Plan,
    scale: float,
) -> Tensor:
    """Compute (B, T, H, K) attention block by block; zeros for queries in no block."""
    parts = (as_autocast(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    return _Pieces.apply(*parts, seen, plan, scale)


class _Pieces(torch.autograd.Function):
    """Tensors inside are (B, heads, tokens, K), the layout of the kernel."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor,
        seen: Visibility, plan: Plan, scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        out = torch.zeros_like(q_BTHK).transpose(1, 2)
        lse_BHT = out.new_full(out.shape[:3], -torch.inf, dtype=_wide(q))
        if plan.joined:
            out = out.to(_wide(q))
        for piece, to_q, to_k in _places(plan):
            found, lse = _FORWARD(
                q[to_q], k[to_k], v[to_k], 0.0, piece.causal,
                attn_mask=_bias(seen, piece, q.dtype), scale=scale,
            )  # fmt: skip
            if plan.joined:
                before, alone = lse_BHT[to_q], lse
                lse = torch.logaddexp(before, alone)
                kept = out[to_q] * (before - lse).exp().unsqueeze(-1)
                found = kept + found * (alone - lse).exp().unsqueeze(-1)
            out[to_q], lse_BHT[to_q] = found, lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_BHT)
        ctx.call = seen, plan, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_BHT = ctx.saved_tensors
        seen, plan, scale = ctx.call
        grad = grad_BTHK.transpose(1, 2)
        # sums over several pieces lose digits in half precision
        dtype = _wide(q) if plan.shared else q.dtype
        grads = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
        for piece, to_q, to_k in _places(plan):
            parts = _BACKWARD(
                grad[to_q], q[to_q], k[to_k], v[to_k], out[to_q], lse_BHT[to_q], 0.0, piece.causal,
                attn_mask=_bias(seen, piece, q.dtype), scale=scale,
            )  # fmt: skip
            for total, part, place in zip(grads, parts, (to_q, to_k, to_k), strict=True):
                total[place] += part
        return *(x.to(q.dtype).transpose(1, 2) for x in grads), None, None, None


def _places(plan: Plan) -> Iterator[tuple[Piece, Place, Place]]:
    """Yield each block with the indices of its queries and of its keys."""
    for piece in plan.pieces:
        yield (
            piece,
            (piece.rows, slice(None), piece.queries),
            (piece.rows, slice(None), piece.keys),
        )


def _bias(seen: Visibility, piece: Piece, dtype: torch.dtype) -> Tensor | None:
    if not piece.masked:
        return None
    at, keys = piece.queries, piece.keys
    return additive(seen.rows(at.start, at.stop, keys.start, keys.stop), dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
