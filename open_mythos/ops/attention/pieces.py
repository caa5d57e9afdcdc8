"""Blockwise attention on a CPU: PyTorch's flash kernel on blocks of queries and keys.

Each block is an unmasked call, a causal call, or a call with a temporary mask. Partial results are
merged by their log-sum-exp. The backward pass (FlashAttention 2, arXiv 2307.08691, section 3.1)
recomputes the masks, so nothing is saved beyond what the kernel itself saves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_mythos.devices import as_autocast
from open_mythos.ops.attention.visibility import Visibility, additive

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

    @property
    def at_q(self) -> tuple[slice, slice, slice]:
        """Index of its queries in (B, heads, T)."""
        return self.rows, slice(None), self.queries

    @property
    def at_k(self) -> tuple[slice, slice, slice]:
        """Index of its keys in (B, heads, S)."""
        return self.rows, slice(None), self.keys

    def bias(self, seen: Visibility, dtype: torch.dtype) -> Tensor | None:
        """Return the block of the mask as an additive bias; None unless ``masked``."""
        if not self.masked:
            return None
        span = self.queries.start, self.queries.stop, self.keys.start, self.keys.stop
        return additive(seen.rows(*span), dtype)


def plan_pieces(seen: Visibility, dtype: torch.dtype) -> list[Piece] | None:
    """Choose the blocks for ``seen`` on a CPU; None for one call with the full mask."""
    every = slice(None)
    documents = seen.documents if seen.n_queries >= DOCUMENT_TOKENS else None
    if documents:
        n_tokens = sum(stop - start for _, start, stop in documents)
        half = HALF_PAIRS / seen.n_queries if dtype.itemsize < 4 else 0
        if n_tokens >= len(documents) * max(DOCUMENT_TOKENS, half):
            return [
                Piece(slice(row, row + 1), slice(start, stop), slice(start, stop), causal=True)
                for row, start, stop in documents
            ]
    if seen.n_pairs <= WHOLE_PAIRS:
        return None
    if seen.plain:
        new = Piece(every, every, slice(seen.first, seen.n_columns), causal=True)
        return [new, Piece(every, every, slice(0, seen.first))] if seen.first else [new]
    fewest, most = BLOCK_QUERIES
    size = min(most, max(fewest, BLOCK_PAIRS // (seen.batch * seen.n_columns)))
    return [
        Piece(every, slice(start, stop), slice(low, high), masked=True)
        for start, stop, low, high in seen.spans(size)
    ]


def attend_pieces(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, seen: Visibility, pieces: list[Piece],
    scale: float,
) -> Tensor:  # fmt: skip
    """Compute (B, T, H, K) attention block by block; zeros for queries in no block."""
    parts = (as_autocast(x) for x in (q_BTHK, k_BSGK, v_BSGK))
    return _Pieces.apply(*parts, seen, pieces, scale)


class _Pieces(torch.autograd.Function):
    """Tensors inside are (B, heads, tokens, K), the layout of the kernel."""

    @staticmethod
    def forward(
        ctx: Any, q_BTHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor,
        seen: Visibility, pieces: list[Piece], scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros_like(q_BTHK).transpose(1, 2)
        lse_BHT = out.new_full(out.shape[:3], -torch.inf, dtype=wide)
        joined = seen.plain and len(pieces) > 1  # every query is in both pieces
        if joined:
            out = out.to(wide)
        for piece in pieces:
            at_q, at_k = piece.at_q, piece.at_k
            found, lse = _FORWARD(
                q[at_q], k[at_k], v[at_k], 0.0, piece.causal,
                attn_mask=piece.bias(seen, q.dtype), scale=scale,
            )  # fmt: skip
            if joined:
                before, alone = lse_BHT[at_q], lse
                lse = torch.logaddexp(before, alone)
                kept = out[at_q] * (before - lse).exp().unsqueeze(-1)
                found = kept + found * (alone - lse).exp().unsqueeze(-1)
            out[at_q], lse_BHT[at_q] = found, lse
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse_BHT)
        ctx.call = seen, pieces, scale
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse_BHT = ctx.saved_tensors
        seen, pieces, scale = ctx.call
        grad = grad_BTHK.transpose(1, 2)
        # sums over several pieces lose digits in half precision; documents are not summed
        summed = seen.plain or pieces[0].masked
        dtype = torch.promote_types(q.dtype, torch.float32) if summed else q.dtype
        grads = [torch.zeros_like(x, dtype=dtype) for x in (q, k, v)]
        for piece in pieces:
            at_q, at_k = piece.at_q, piece.at_k
            parts = _BACKWARD(
                grad[at_q], q[at_q], k[at_k], v[at_k], out[at_q], lse_BHT[at_q], 0.0, piece.causal,
                attn_mask=piece.bias(seen, q.dtype), scale=scale,
            )  # fmt: skip
            for total, part, at in zip(grads, parts, (at_q, at_k, at_k), strict=True):
                total[at] += part
        return *(x.to(q.dtype).transpose(1, 2) for x in grads), None, None, None
