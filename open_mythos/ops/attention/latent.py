"""Attention that never leaves the latent space: absorbed multi-head latent attention.

Keys and values of all heads are one latent vector per token (DeepSeek-V2, arXiv 2405.04434, section
2.1.2). With the up-projections folded into the query and the output, all heads read the same entry
of the cache: it is key (latent and rotary key) and value (latent) at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.attention.latent_decode import kernel_serves, latent_decode

logger = logging.getLogger(__name__)


def latent_attend(
    q_BTHW: Tensor,
    entry_BSW: Tensor,
    mask: Tensor | None = None,
    *,
    rank: int,
    causal: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Mix the latents of a history by the attention of H queries per token.

    Args:
        q_BTHW: Scaled queries: latent part (``rank``), then rotary part.
        entry_BSW: The history, of the queries' dtype: latents, then rotary keys.
        mask: Boolean, broadcastable to (B, 1, T, S), true where a query may look.
        causal: Query i sees entries 0 .. i; needs T = S and no mask.
        rank: Width R of a latent.
        backend: "auto", "batched", "rows", "triton" (one query per row) or "reference".

    Returns:
        (B, T, H, R), in the dtype of the history.

    Raises:
        ConfigError: Unknown backend, or one that cannot serve the call.
        EnvironmentError_: The kernel was asked for by name and Triton is not installed.
    """
    if backend == "auto":
        backend = "rows" if _rows_pay(entry_BSW) else "batched"
        single = q_BTHW.is_cuda and q_BTHW.shape[1] == 1
        if single and kernel_serves(q_BTHW[:, 0], entry_BSW.unsqueeze(0), rank):
            backend = "triton"
    if backend not in _BACKENDS:
        raise ConfigError(
            "unknown latent attention backend", where="latent_attend", value=backend,
            allowed=", ".join(("auto", *_BACKENDS)), fix='use "auto"',
        )  # fmt: skip
    if not torch.compiler.is_compiling():
        _log_once(backend)
    if causal:
        n_new = q_BTHW.shape[1]
        mask = torch.ones(n_new, n_new, dtype=torch.bool, device=q_BTHW.device).tril()[None, None]
    return _BACKENDS[backend](q_BTHW, entry_BSW, mask, rank)


def latent_values(mixed_BTHR: Tensor, value_up_HVR: Tensor) -> Tensor:
    """Mixed latents through each head's value projection, (B, T, H, V).

    Args:
        mixed_BTHR: What :func:`latent_attend` returned.
        value_up_HVR: Value projections.
    """
    batch, n_new = mixed_BTHR.shape[:2]
    if mixed_BTHR.device.type != "cpu" or mixed_BTHR.dtype == torch.float32:
        return torch.einsum("bthr,hvr->bthv", mixed_BTHR, value_up_HVR)
    # half-precision products on a CPU copy a transposed right side: the weight stands on the left
    mixed_HRN = mixed_BTHR.flatten(0, 1).permute(1, 2, 0)
    return (value_up_HVR @ mixed_HRN).permute(2, 0, 1).unflatten(0, (batch, n_new))


ROW_BYTES = 1 << 19
"""Bytes of one row's history from which "rows" is faster than "batched" in half precision."""


def _rows_pay(entry_BSW: Tensor) -> bool:
    """Batched half-precision products on a CPU first copy a history that is part of a larger slot.

    Product by product nothing is copied, and a row's second product finds it in the cache.
    """
    return (
        entry_BSW.device.type == "cpu"
        and entry_BSW.dtype != torch.float32
        and entry_BSW.shape[0] > 1
        and entry_BSW[0].nbytes >= ROW_BYTES
        and not entry_BSW.requires_grad
    )


def _reference(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """The plain twin: scores in float32, softmax, weighted sum."""
    scores = torch.einsum("bthw,bsw->bhts", q_BTHW.float(), entry_BSW.float())
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    mixed = torch.einsum("bhts,bsr->bthr", scores.softmax(-1), entry_BSW[..., :rank].float())
    return mixed.to(entry_BSW.dtype)


def _batched(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """Two products batched over the rows: (S, W) by (W, T H), and (T H, S) by (S, W)."""
    batch, n_new, heads, _ = q_BTHW.shape
    # the history stands on the left: bfloat16 products on a CPU would copy a transposed one
    scores_BSN = entry_BSW @ q_BTHW.reshape(batch, n_new * heads, -1).mT
    weights_BNS = _softmax(scores_BSN, n_new, mask, entry_BSW.dtype)
    # the rotary keys are mixed along and dropped: leaving them out first would copy the latents
    return (weights_BNS @ entry_BSW)[..., :rank].unflatten(1, (n_new, heads))


def _rows(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """The same, its products one row of the batch after the other."""
    batch, n_new, heads, width = q_BTHW.shape
    q_BNW, rows = q_BTHW.reshape(batch, n_new * heads, width), entry_BSW.unbind()
    scores_BSN = torch.stack([row @ q_NW.T for row, q_NW in zip(rows, q_BNW, strict=True)])
    weights_BNS = _softmax(scores_BSN, n_new, mask, entry_BSW.dtype)
    mixed_BNW = torch.stack([w_NS @ row for w_NS, row in zip(weights_BNS, rows, strict=True)])
    return mixed_BNW[..., :rank].unflatten(1, (n_new, heads))


def _softmax(scores_BSN: Tensor, n_new: int, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(B, T H, S) weights of the positions, from scores that lie position by position."""
    scores_BTHS = scores_BSN.mT.unflatten(1, (n_new, -1)).float()
    if mask is not None:
        scores_BTHS = scores_BTHS.masked_fill(~mask.transpose(1, 2), -torch.inf)
    return scores_BTHS.softmax(-1).to(dtype).flatten(1, 2)


def _triton(q_BTHW: Tensor, entry_BSW: Tensor, mask: Tensor | None, rank: int) -> Tensor:
    """One kernel for scores, softmax and mixing: the history is read once."""
    batch, n_new, positions = *q_BTHW.shape[:2], entry_BSW.shape[1]
    if n_new != 1:
        raise ConfigError(
            "the Triton kernel cannot serve this call", where="latent_attend", value=n_new,
            allowed="one query per row", fix='use "auto"',
        )  # fmt: skip
    valid_BS = None if mask is None else mask.expand(batch, 1, 1, positions)[:, 0, 0]
    out_BHR = latent_decode(
        q_BTHW[:, 0], entry_BSW.unsqueeze(0), None, None, rank, valid_BS=valid_BS, backend="triton"
    )
    return out_BHR.unsqueeze(1)


@cache
def _log_once(backend: str) -> None:
    logger.info("latent attention backend: %s", backend)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "batched": _batched,
    "rows": _rows,
    "triton": _triton,
    "reference": _reference,
}
