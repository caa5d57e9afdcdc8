"""FlexAttention (arXiv 2412.05496): a compiled kernel that skips fully masked blocks.

The block mask follows from positions, padding and documents, in memory linear in the context plus
one number per block; the full mask is never materialized.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from open_mythos.ops.attention.visibility import Visibility

BLOCK = 128
"""Queries, and keys, per block."""


def attend_flex(
    q_BTHK: Tensor, k_BSGK: Tensor, v_BSGV: Tensor, seen: Visibility | None, scale: float
) -> Tensor:
    """Return (B, T, H, V); compiled on CUDA, eager (and without gradient) on a CPU."""
    out = _kernel(q_BTHK)(
        q_BTHK.transpose(1, 2), k_BSGK.transpose(1, 2), v_BSGV.transpose(1, 2),
        block_mask=None if seen is None else block_mask(seen), scale=scale,
        enable_gqa=q_BTHK.shape[2] != k_BSGK.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def block_mask(seen: Visibility) -> BlockMask:
    """Classify blocks of queries and keys: masked, full, or skipped."""
    some, full = visible_blocks(seen)
    partial = some & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=_rule(seen),
        seq_lengths=(seen.n_queries, seen.n_columns),
    )  # fmt: skip


def visible_blocks(seen: Visibility) -> tuple[Tensor, Tensor]:
    """Return (B or 1, query blocks, key blocks): not fully masked, and fully visible.

    The first may overestimate, never underestimate; the second may underestimate.
    """
    column = torch.arange(seen.n_columns, device=seen.device).unsqueeze(0)
    query = seen.columns(0, seen.n_queries)
    query = query if query.dim() == 2 else query.unsqueeze(0)
    first, last = _ends(query)
    begin, end = _ends(column)
    some = begin.unsqueeze(1) <= last.unsqueeze(2)
    # a block whose columns do not all exist is not full
    whole = torch.arange(end.shape[1], device=seen.device) < seen.n_columns // BLOCK
    full = (end.unsqueeze(1) <= first.unsqueeze(2)) & whole
    if seen.run_BS is not None:
        least, most = _ends(seen.of_queries(seen.run_BS, 0, seen.n_queries))
        low, high = _ends(seen.run_BS)
        some = some & (low.unsqueeze(1) <= most.unsqueeze(2))
        some = some & (high.unsqueeze(1) >= least.unsqueeze(2))
        same = (low.unsqueeze(1) == least.unsqueeze(2)) & (high.unsqueeze(1) == most.unsqueeze(2))
        full = full & same & (least == most).unsqueeze(2)
    if seen.valid_BS is not None:
        full = full & _ends(seen.valid_BS.int())[0].bool().unsqueeze(1)
    if seen.window:
        number = _numbers(seen)
        each = number.expand(max(len(query), len(number)), -1)
        least, most = _ends(seen.of_queries(each, 0, seen.n_queries))
        low, high = _ends(number)
        some = some & (high.unsqueeze(1) > least.unsqueeze(2) - seen.window)
        full = full & (low.unsqueeze(1) > most.unsqueeze(2) - seen.window)
    some, full = torch.broadcast_tensors(some, full)
    return some, full & some


def _numbers(seen: Visibility) -> Tensor:
    """Return (B or 1, S): how many real columns there are up to each."""
    if seen.valid_BS is None:
        return torch.arange(seen.n_columns, device=seen.device).unsqueeze(0)
    return seen.valid_BS.long().cumsum(1)


def _ends(x_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, blocks) minimum and maximum of each block; pads with the last value."""
    missing = -x_BN.shape[1] % BLOCK
    last = x_BN[:, -1:].expand(-1, missing)
    blocks = torch.cat((x_BN, last), dim=1).unflatten(1, (-1, BLOCK))
    return blocks.amin(2), blocks.amax(2)


def _listed(blocks_BQK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, 1, Q) key blocks per query block, and (B, 1, Q, K) their indices first."""
    order = blocks_BQK.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BQK.sum(-1, dtype=torch.int32).unsqueeze(1), order.int().unsqueeze(1)


def _rule(seen: Visibility) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return the ``mask_mod``: whether query ``q`` of row ``b`` attends to column ``k``."""
    valid_BS, run_BS, columns_BT, first = seen.valid_BS, seen.run_BS, seen.columns_BT, seen.first
    number_BS = _numbers(seen) if seen.window else None

    window = seen.window

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        at = q + first if columns_BT is None else columns_BT[b, q]
        seen = k <= at
        if valid_BS is not None:
            seen = seen & valid_BS[b, k]
        if run_BS is not None:
            seen = seen & (run_BS[b, at] == run_BS[b, k])
        if number_BS is not None:
            row = b if len(number_BS) > 1 else 0
            seen = seen & (number_BS[row, at] - number_BS[row, k] < window)
        return seen if valid_BS is None else seen | (k == at)

    return sees


def _kernel(q_BTHK: Tensor) -> Callable[..., Tensor]:
    if torch.compiler.is_compiling():
        return flex_attention
    return _compiled() if q_BTHK.is_cuda else _plain


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


def _plain(*tensors: Any, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(*tensors, **arguments)
