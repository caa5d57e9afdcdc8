"""Absorbed multi-head latent attention: scores and values computed in the latent space.

MLA caches one latent vector per token for the keys and values of all heads (DeepSeek-V2,
arXiv 2405.04434, section 2.1.2). With the up-projections folded into the query and the output, all
heads share one cache entry, which is key (latent and rotary key) and value (latent) at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from open_mythos.devices import at_least_float32
from open_mythos.ops.attention.paged import decode, kernel_serves
from open_mythos.ops.backend import pick_backend


def latent_attend(
    q_BTHW: Tensor,
    entry_BSW: Tensor,
    mask: Tensor | None = None,
    *,
    rank: int,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Attend H queries per token to a history of latents.

    Args:
        q_BTHW: Scaled queries: latent part (``rank``), then rotary part.
        entry_BSW: The history, of the queries' dtype: latents, then rotary keys.
        mask: Boolean, broadcastable to (B, 1, T, S), true where a query may attend.
        causal: Query i sees entries 0 .. i; needs T = S and no mask.
        rank: Width R of a latent.
        backend: "auto", "batched", "rows", "triton" (one query per row) or "reference".

    Returns:
        (B, T, H, R), in the dtype of the history.
    """
    if backend == "auto":
        backend = "rows" if _rows_pay(entry_BSW) else "batched"
        single = q_BTHW.is_cuda and q_BTHW.shape[1] == 1
        if single and kernel_serves(q_BTHW, entry_BSW, rank):
            backend = "triton"
    run = pick_backend("latent attention", backend, _BACKENDS)
    if causal:
        n_new = q_BTHW.shape[1]
        mask = torch.ones(n_new, n_new, dtype=torch.bool, device=q_BTHW.device).tril()[None, None]
    return run(q_BTHW, entry_BSW, mask, rank)


def latent_values(mixed_BTHR: Tensor, value_up_HVR: Tensor) -> Tensor:
    """Project results of :func:`latent_attend` to the values of each head, (B, T, H, V)."""
    batch, n_new = mixed_BTHR.shape[:2]
    if mixed_BTHR.device.type != "cpu" or mixed_BTHR.dtype == torch.float32:
        return torch.einsum("bthr,hvr->bthv", mixed_BTHR, value_up_HVR)
    # half-precision matmuls on a CPU copy a transposed right operand, so the weight is on the left
    mixed_HRN = mixed_BTHR.flatten(0, 1).permute(1, 2, 0)
    return (value_up_HVR @ mixed_HRN).permute(2, 0, 1).unflatten(0, (batch, n_new))


ROW_BYTES = 1 << 19
"""Smallest history of a row, in bytes, at which "rows" beats "batched" in half precision."""


def _rows_pay(entry_BSW: Tensor) -> bool:
    """Whether one matmul per row is faster than a batched one.

    Batched half-precision matmuls on a CPU first copy a history that is part of a larger slot. One
    matmul per row copies nothing, and the row's second matmul finds it in the CPU cache.
    """
    return (
        entry_BSW.device.type == "cpu"
        and entry_BSW.dtype != torch.float32
        and entry_BSW.shape[0] > 1
        and entry_BSW[0].nbytes >= ROW_BYTES
        and not entry_BSW.requires_grad
    )


def _reference(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """Reference implementation: scores in float32 at least, softmax, weighted sum."""
    wide_BSW = at_least_float32(entry_BSW)
    scores = torch.einsum("bthw,bsw->bhts", at_least_float32(q_BTHW), wide_BSW)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    mixed = torch.einsum("bhts,bsr->bthr", scores.softmax(-1), wide_BSW[..., :rank])
    return mixed.to(entry_BSW.dtype)


def _batched(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """Two batched matmuls: (S, W) by (W, T H), and (T H, S) by (S, W)."""
    batch, n_new, heads, _ = q_BTHW.shape
    # the history is the left operand: bfloat16 matmuls on a CPU would copy a transposed one
    scores_BSN = entry_BSW @ q_BTHW.reshape(batch, n_new * heads, -1).mT
    weights_BNS = _softmax(scores_BSN, n_new, mask, entry_BSW.dtype)
    # mix the rotary keys as well and drop them: slicing them off first would copy the latents
    return (weights_BNS @ entry_BSW)[..., :rank].unflatten(1, (n_new, heads))


def _rows(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """The same with one matmul per row of the batch."""
    batch, n_new, heads, width = q_BTHW.shape
    q_BNW, rows = q_BTHW.reshape(batch, n_new * heads, width), entry_BSW.unbind()
    scores_BSN = torch.stack([row @ q_NW.T for row, q_NW in zip(rows, q_BNW, strict=True)])
    weights_BNS = _softmax(scores_BSN, n_new, mask, entry_BSW.dtype)
    mixed_BNW = torch.stack([w_NS @ row for w_NS, row in zip(weights_BNS, rows, strict=True)])
    return mixed_BNW[..., :rank].unflatten(1, (n_new, heads))


def _softmax(scores_BSN: Tensor, n_new: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the (B, T H, S) attention weights of position-major scores."""
    scores_BTHS = at_least_float32(scores_BSN.mT.unflatten(1, (n_new, -1)))
    if mask is not None:
        scores_BTHS = scores_BTHS.masked_fill(~mask.transpose(1, 2), -torch.inf)
    return scores_BTHS.softmax(-1).to(dtype).flatten(1, 2)


def _triton(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """One kernel for scores, softmax and mixing, which reads a row's history as one page."""
    batch, n_new, positions = *q_BTHW.shape[:2], entry_BSW.shape[1]
    assert n_new == 1, "the Triton kernel serves one query per row"
    kernel_serves(q_BTHW, entry_BSW, rank, "triton")
    valid_BS = None if mask is None else mask.expand(batch, 1, 1, positions)[:, 0, 0]
    return decode(q_BTHW, entry_BSW, None, None, valid_BS, rank, 1.0)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "batched": _batched,
    "rows": _rows,
    "triton": _triton,
    "reference": _reference,
}
