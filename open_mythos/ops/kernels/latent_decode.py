"""Absorbed latent attention of one new token per row, with split-K over the history.

All heads of a row read the same latents, so a program takes a tile of heads and reads each entry
once, as key and as value. Decoding is memory-bound: with few rows, the positions of a row are split
over as many programs as fill the GPU (flash decoding). Each keeps a running maximum, sum and
output, and a second kernel merges them.

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
_LEAST_SPLIT = 128
"""Shortest split, in positions: below it, merging costs more than it saves."""
_MOST_SPLITS = 128


def decode(
    q_BHW: Tensor, slots_LBSW: Tensor, loops_B: Tensor | None, lengths_B: Tensor | None,
    rank: int, valid_BS: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launch the kernel; see :func:`open_mythos.ops.attention.latent_decode.latent_decode`.

    Queries are contiguous and of the slots' dtype.
    """
    n_loops, batch, positions, width = slots_LBSW.shape
    heads = q_BHW.shape[1]
    out = torch.empty((batch, heads, rank), dtype=slots_LBSW.dtype, device=slots_LBSW.device)
    if not out.numel():
        return out
    latent = triton.next_power_of_2(max(rank, 16))
    rotary = triton.next_power_of_2(max(width - rank, 16))
    tile, block, warps = _sizes(heads, latent, rotary, slots_LBSW.element_size())
    head_tiles = triton.cdiv(heads, tile)
    processors, shared = _device(out.device)
    splits = _splits(processors, batch * head_tiles, positions)
    mix, weight = out, out
    if splits > 1:
        mix = out.new_empty((splits, batch, heads, rank), dtype=torch.float32)
        weight = out.new_empty((splits, batch, heads), dtype=torch.float32)
    # a missing argument is never read, but the launch needs some tensor
    valid = out if valid_BS is None else valid_BS.view(torch.uint8)
    _attend[(batch, head_tiles, splits)](
        q_BHW, slots_LBSW,
        out if loops_B is None else loops_B, out if lengths_B is None else lengths_B, valid,
        mix, weight,
        batch, heads, positions, n_loops, rank, width - rank,
        q_BHW.stride(0), q_BHW.stride(1),
        slots_LBSW.stride(0), slots_LBSW.stride(1), slots_LBSW.stride(2),
        *((0, 0) if valid_BS is None else valid_BS.stride()),
        LOOPS=loops_B is not None, LENGTHS=lengths_B is not None, VALID=valid_BS is not None,
        SPLIT=splits > 1, HEADS=tile, LATENT=latent, ROTARY=rotary, BLOCK=block,
        num_warps=warps, num_stages=3 if shared >= _THREE_STAGES else 2,
    )  # fmt: skip
    if splits > 1:
        _join[(batch * heads,)](
            mix, weight, out, splits, batch * heads, rank,
            SPLITS=triton.next_power_of_2(splits), LATENT=latent, TOGETHER=8, num_warps=4,
        )  # fmt: skip
    return out


decode_op = torch.library.custom_op("open_mythos::latent_decode", decode, mutates_args=())
"""The same as one opaque operation for ``torch.compile``."""


@decode_op.register_fake
def _(
    q_BHW: Tensor, slots_LBSW: Tensor, loops_B: Tensor | None, lengths_B: Tensor | None,
    rank: int, valid_BS: Tensor | None,
) -> Tensor:  # fmt: skip
    return slots_LBSW.new_empty((*q_BHW.shape[:2], rank))


def _sizes(heads: int, latent: int, rotary: int, element: int) -> tuple[int, int, int]:
    """Return heads per tile, entries per block, and warps."""
    if element == 4:
        # float32 dots do not use tensor cores: larger tiles would spill
        return 16, 16, 8
    tile = min(max(16, triton.next_power_of_2(heads)), 32, _MIX // latent)
    fits = _ENTRY_BYTES // ((latent + rotary) * element)
    block = max(16, min(128, triton.next_power_of_2(fits + 1) // 2))
    return tile, block, 8 if tile * latent > _MIX // 2 else 4


def _device(device: torch.device) -> tuple[int, int]:
    """Return the number of multiprocessors and the shared memory of each."""
    if device.type != "cuda":  # the interpreter
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_multiprocessor


def _splits(processors: int, programs: int, positions: int) -> int:
    """Return the number of splits: enough to fill the GPU twice, none too short to pay off."""
    wanted = triton.cdiv(2 * processors, programs)
    return max(1, min(wanted, _MOST_SPLITS, triton.cdiv(positions, _LEAST_SPLIT)))


@triton.jit
def _attend(
    q: tl.tensor, slots: tl.tensor,
    loops: tl.tensor, lengths: tl.tensor, valid: tl.tensor,
    mix: tl.tensor, weight: tl.tensor,
    batch: tl.tensor, heads: tl.tensor, positions: tl.tensor, n_loops: tl.tensor,
    rank: tl.tensor, rotary_width: tl.tensor,
    q_row: tl.tensor, q_head: tl.tensor,
    slot_loop: tl.tensor, slot_row: tl.tensor, slot_position: tl.tensor,
    valid_row: tl.tensor, valid_position: tl.tensor,
    LOOPS: tl.constexpr, LENGTHS: tl.constexpr, VALID: tl.constexpr, SPLIT: tl.constexpr,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROTARY: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)  # rows times their stride can pass 2^31
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    col = tl.arange(0, LATENT)
    turn = tl.arange(0, ROTARY)
    in_heads = (head < heads)[:, None]
    in_latent = (col < rank)[None, :]
    in_rotary = (turn < rotary_width)[None, :]

    length = positions
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + row).to(tl.int32), positions)
    blocks = tl.cdiv(tl.cdiv(length, BLOCK), tl.num_programs(2))
    begin = tl.program_id(2) * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, length)
    entries = slots + row * slot_row
    if LOOPS:
        loop = tl.load(loops + row).to(tl.int32)
        entries += tl.minimum(tl.maximum(loop, 0), n_loops - 1).to(tl.int64) * slot_loop

    q_at = q + row * q_row + head[:, None] * q_head
    q_latent = tl.load(q_at + col[None, :], mask=in_heads & in_latent, other=0.0)
    q_rotary = tl.load(q_at + rank + turn[None, :], mask=in_heads & in_rotary, other=0.0)
    highest = tl.full((HEADS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((HEADS,), dtype=tl.float32)
    mixed = tl.zeros((HEADS, LATENT), dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        seen = position < end
        # past the length a slot is not read: it may hold anything, NaN included
        real = seen[:, None]
        entry = entries + position.to(tl.int64)[:, None] * slot_position
        latent = tl.load(entry + col[None, :], mask=real & in_latent, other=0.0)
        rotary = tl.load(entry + rank + turn[None, :], mask=real & in_rotary, other=0.0)
        if VALID:
            at = row * valid_row + position.to(tl.int64) * valid_position
            seen = seen & (tl.load(valid + at, mask=seen, other=0) != 0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_rotary, tl.trans(rotary), scores, input_precision="ieee")
        scores = tl.where(seen[None, :], scores * LOG2_E, float("-inf"))

        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen so far
        share = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(share, axis=1)
        mixed = mixed * shrink[:, None]
        mixed = tl.dot(share.to(latent.dtype), latent, mixed, input_precision="ieee")
        highest = higher

    total = tl.where(total > 0, total, 1.0)  # nothing seen: a mix of zeros, of weight 2^-inf
    mixed = mixed / total[:, None]
    place = row * heads + head
    if SPLIT:
        place += tl.program_id(2).to(tl.int64) * batch * heads
        tl.store(weight + place, highest + tl.log2(total), mask=head < heads)
    at_mix = mix + place[:, None] * rank + col[None, :]
    tl.store(at_mix, mixed.to(mix.dtype.element_ty), mask=in_heads & in_latent)


@triton.jit
def _join(
    mix: tl.tensor, weight: tl.tensor, out: tl.tensor,
    n_splits: tl.tensor, n_heads: tl.tensor, rank: tl.tensor,
    SPLITS: tl.constexpr, LATENT: tl.constexpr, TOGETHER: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    col = tl.arange(0, LATENT)
    weights = tl.load(weight + split * n_heads + head, mask=split < n_splits, other=float("-inf"))
    highest = tl.max(weights, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(tl.exp2(weights - base), axis=0)
    joined = tl.zeros((LATENT,), dtype=tl.float32)
    for first in range(0, n_splits, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        at = some.to(tl.int64) * n_heads + head
        real = some < n_splits
        share = tl.exp2(tl.load(weight + at, mask=real, other=float("-inf")) - base)
        part = tl.load(
            mix + at[:, None] * rank + col[None, :],
            mask=real[:, None] & (col < rank)[None, :], other=0.0,
        )  # fmt: skip
        joined += tl.sum(share[:, None] * part, axis=0)
    joined = joined / tl.where(total > 0, total, 1.0)
    tl.store(out + head * rank + col, joined.to(out.dtype.element_ty), mask=col < rank)
