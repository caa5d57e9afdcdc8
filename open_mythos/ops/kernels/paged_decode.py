"""Attention of one new token per row over pages, with split-K over the history.

A program serves a tile of the query heads that share a key head, so each entry is read once: by all
heads, and for latents as key and as value. Decoding is memory-bound: the positions of a row are
split over programs (flash decoding). Each keeps a running maximum, sum and output, and a second
kernel merges them.

**A row's bits depend on its own length alone.** A split is a fixed number of positions, not a share
of the longest row or of the GPU, and the merge adds a row's splits in order.

For 16 heads, a latent of 512 and a rotary key of 64 in bfloat16, a program holds the output
accumulator (32 KiB, float32) in registers and the queries (18 KiB) and two pipelined blocks of 32
entries (72 KiB) in shared memory, so two programs fit a multiprocessor of an H100. The sizes below
follow from this arithmetic: no autotuning is needed and nothing spills. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ENTRY_BYTES = 40 << 10
"""Largest block of entries, in bytes."""
_MIX = 32 * 512
"""Largest accumulator, in elements: 64 registers of each of 256 threads."""
_THREE_STAGES = 160 << 10
"""Shared memory of a multiprocessor that fits two blocks beside the queries."""
_SPLIT = 256
"""Positions of a split: a few blocks, so that merging costs little more than it saves."""


def decode(
    q_RGHK: Tensor, pool_NPW: Tensor, table_RM: Tensor | None, lengths_R: Tensor | None,
    valid_RS: Tensor | None, rank: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Launch the kernel; see :func:`open_mythos.ops.attention.paged.decode`.

    Queries are contiguous and of the pool's dtype.
    """
    (rows, kv_heads, heads, width), page = q_RGHK.shape, pool_NPW.shape[1]
    values = width if rank is None else rank
    out = q_RGHK.new_empty((rows, kv_heads, heads, values))
    if not out.numel():
        return out
    positions = page * (1 if table_RM is None else table_RM.shape[1])
    main = triton.next_power_of_2(max(values, 16))
    rest = triton.next_power_of_2(max(width - values, 16))
    other = main if rank is None else rest  # elements that a block holds beside the keys' main part
    tile, block, warps = _sizes(heads, main, other, pool_NPW.element_size())
    splits = triton.cdiv(positions, _SPLIT)
    mix, weight = out, out
    if splits > 1:
        mix = out.new_empty((splits, *out.shape), dtype=torch.float32)
        weight = out.new_empty((splits, *out.shape[:-1]), dtype=torch.float32)
    # a missing argument is never read, but the launch needs some tensor
    lengths = out if lengths_R is None else lengths_R.contiguous()
    _attend[(rows * kv_heads, triton.cdiv(heads, tile), splits)](
        q_RGHK, pool_NPW, out if table_RM is None else table_RM, lengths,
        out if valid_RS is None else valid_RS.view(torch.uint8), mix, weight,
        kv_heads, heads, positions, page, values, width - values, scale,
        pool_NPW.stride(0), pool_NPW.stride(1),
        *((0, 0) if table_RM is None else table_RM.stride()),
        *((0, 0) if valid_RS is None else valid_RS.stride()),
        TABLE=table_RM is not None, LENGTHS=lengths_R is not None, VALID=valid_RS is not None,
        LATENT=rank is not None, MERGED=splits > 1, SPLIT=_SPLIT,
        HEADS=tile, MAIN=main, REST=rest, BLOCK=block,
        num_warps=warps, num_stages=3 if _shared_memory(out.device) >= _THREE_STAGES else 2,
    )  # fmt: skip
    if splits > 1:
        _merge[(rows * kv_heads * heads,)](
            mix, weight, lengths, out, kv_heads * heads, positions, values,
            LENGTHS=lengths_R is not None, SPLIT=_SPLIT, MAIN=main, TOGETHER=8, num_warps=4,
        )  # fmt: skip
    return out


decode_op = torch.library.custom_op("open_mythos::paged_decode", decode, mutates_args=())
"""The same as one opaque operation for ``torch.compile``."""


@decode_op.register_fake
def _(
    q_RGHK: Tensor, pool_NPW: Tensor, table_RM: Tensor | None, lengths_R: Tensor | None,
    valid_RS: Tensor | None, rank: int | None, scale: float,
) -> Tensor:  # fmt: skip
    return q_RGHK.new_empty((*q_RGHK.shape[:3], q_RGHK.shape[3] if rank is None else rank))


def _sizes(heads: int, main: int, other: int, element: int) -> tuple[int, int, int]:
    """Return heads per tile, entries per block, and warps."""
    if element == 4:
        # float32 dots do not use tensor cores: larger tiles would spill
        return 16, 16, 8
    tile = min(max(16, triton.next_power_of_2(heads)), 32, _MIX // main)
    fits = _ENTRY_BYTES // ((main + other) * element)
    block = max(16, min(128, triton.next_power_of_2(fits + 1) // 2))
    return tile, block, 8 if tile * main > _MIX // 2 else 4


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory of a multiprocessor; 0 in the interpreter."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@triton.jit
def _attend(
    q: tl.tensor, pool: tl.tensor, table: tl.tensor, lengths: tl.tensor, valid: tl.tensor,
    mix: tl.tensor, weight: tl.tensor,
    kv_heads: tl.tensor, heads: tl.tensor, positions: tl.tensor, page: tl.tensor,
    main_width: tl.tensor, rest_width: tl.tensor, scale: tl.tensor,
    pool_page: tl.tensor, pool_position: tl.tensor,
    table_row: tl.tensor, table_page: tl.tensor, valid_row: tl.tensor, valid_position: tl.tensor,
    TABLE: tl.constexpr, LENGTHS: tl.constexpr, VALID: tl.constexpr, LATENT: tl.constexpr,
    MERGED: tl.constexpr, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = (tl.program_id(0) // kv_heads).to(tl.int64)  # rows times their stride can pass 2^31
    kv_head = tl.program_id(0) % kv_heads
    length = positions
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row).to(tl.int32), positions)
    begin = tl.program_id(2) * SPLIT
    if MERGED and begin >= length:  # the merge does not read it
        return
    end = tl.minimum(begin + SPLIT, length)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, MAIN)
    turn = tl.arange(0, REST)
    in_heads = (head < heads)[:, None]
    in_main = (col < main_width)[None, :]
    in_rest = (turn < rest_width)[None, :]
    place = tl.program_id(0).to(tl.int64) * heads + head
    q_at = q + place[:, None] * (main_width + rest_width)
    q_main = tl.load(q_at + col[None, :], mask=in_heads & in_main, other=0.0)
    if LATENT:
        q_rest = tl.load(q_at + main_width + turn[None, :], mask=in_heads & in_rest, other=0.0)
        key_at = 0
    else:
        key_at = kv_head * main_width
    value_at = kv_heads * main_width + key_at

    highest = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    mixed = tl.zeros((HEADS, MAIN), dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        seen = position < end
        # past the length a page is not read: it may hold anything, NaN included
        real = seen[:, None]
        if TABLE:
            at_table = table + row * table_row + (position // page) * table_page
            held = tl.load(at_table, mask=seen, other=0)
            within = position % page
        else:
            held = row
            within = position
        entry = pool + (held * pool_page + within.to(tl.int64) * pool_position)[:, None]
        key = tl.load(entry + key_at + col[None, :], mask=real & in_main, other=0.0)
        scores = tl.dot(q_main, tl.trans(key), input_precision="ieee")
        if LATENT:
            rest = tl.load(entry + main_width + turn[None, :], mask=real & in_rest, other=0.0)
            scores = tl.dot(q_rest, tl.trans(rest), scores, input_precision="ieee")
            value = key
        else:
            value = tl.load(entry + value_at + col[None, :], mask=real & in_main, other=0.0)
        if VALID:
            at = row * valid_row + position.to(tl.int64) * valid_position
            seen = seen & (tl.load(valid + at, mask=seen, other=0) != 0)
        scores = tl.where(seen[None, :], scores * (scale * LOG2_E), float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        share = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(share, axis=1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(share.to(value.dtype), value, mixed, input_precision="ieee")
        highest = higher

    total = tl.where(total > 0, total, 1.0)  # nothing seen: a mix of zeros, of weight 2^-inf
    mixed = mixed / total[:, None]
    if MERGED:
        place += tl.program_id(2).to(tl.int64) * tl.num_programs(0) * heads
        tl.store(weight + place, highest + tl.log2(total), mask=head < heads)
    at_mix = mix + place[:, None] * main_width + col[None, :]
    tl.store(at_mix, mixed.to(mix.dtype.element_ty), mask=in_heads & in_main)


@triton.jit
def _merge(
    mix: tl.tensor, weight: tl.tensor, lengths: tl.tensor, out: tl.tensor,
    heads: tl.tensor, positions: tl.tensor, width: tl.tensor,
    LENGTHS: tl.constexpr, SPLIT: tl.constexpr, MAIN: tl.constexpr, TOGETHER: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    length = positions
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + head // heads).to(tl.int32), positions)
    splits = tl.cdiv(length, SPLIT)
    some = tl.arange(0, TOGETHER)
    col = tl.arange(0, MAIN)
    highest = tl.full((TOGETHER,), float("-inf"), dtype=tl.float32)
    for first in range(0, splits, TOGETHER):
        at = (first + some).to(tl.int64) * tl.num_programs(0) + head
        found = tl.load(weight + at, mask=first + some < splits, other=float("-inf"))
        highest = tl.maximum(highest, found)
    top = tl.max(highest, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((TOGETHER,), dtype=tl.float32)
    merged = tl.zeros((MAIN,), dtype=tl.float32)
    for first in range(0, splits, TOGETHER):
        at = (first + some).to(tl.int64) * tl.num_programs(0) + head
        real = first + some < splits
        share = tl.exp2(tl.load(weight + at, mask=real, other=float("-inf")) - base)
        part = tl.load(
            mix + at[:, None] * width + col[None, :],
            mask=real[:, None] & (col < width)[None, :], other=0.0,
        )  # fmt: skip
        total += share
        merged += tl.sum(share[:, None] * part, axis=0)
    whole = tl.sum(total, axis=0)
    merged = merged / tl.where(whole > 0, whole, 1.0)
    tl.store(out + head * width + col, merged.to(out.dtype.element_ty), mask=col < width)
