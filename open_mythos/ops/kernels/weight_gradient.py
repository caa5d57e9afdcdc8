"""Weight gradients of stacked experts over all loops, without gathering the rows first.

The rows of one expert are scattered over one buffer per loop. A program computes one tile of one
expert's gradient. It enumerates the expert's rows across loops and computes the loop and address of
each, so tensor cores always work on full tiles however few rows a loop routed to the expert, and
nothing is copied or reordered. The order of summation is fixed: loop by loop, row by row.

The buffers' addresses are a small table on the device, copied from pinned memory without a
host-device sync. One buffer for all rows would need a second copy of what every loop saved: about
13 GB for 16 loops, 16k tokens, 8 experts per token and 3,072 columns. Not measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from open_mythos.devices import to_device


def weight_gradient(xs: Sequence[Tensor], grads: Sequence[Tensor], ends_LE: Tensor) -> Tensor:
    """Launch the kernel for contiguous operands of one dtype and int32 ends.

    See :func:`open_mythos.ops.experts.weight_gradient.grouped_weight_gradient`.
    """
    n_loops, n_experts = ends_LE.shape
    k, m = xs[0].shape[1], grads[0].shape[1]
    out = torch.empty((n_experts, k, m), dtype=xs[0].dtype, device=xs[0].device)
    tile = _tile(out, k, m)
    tiles = triton.cdiv(k, tile["BLOCK_K"]) * triton.cdiv(m, tile["BLOCK_M"])
    addresses = [[part.data_ptr() for part in side] for side in (xs, grads)]
    table = to_device(torch.tensor(addresses, dtype=torch.int64), out.device)
    row_bytes = (k * out.element_size(), m * out.element_size())
    _sum_of_outer_products[(n_experts * tiles,)](
        out, table, F.pad(ends_LE, (1, 0)), n_loops, n_experts, k, m,
        LOOPS=triton.next_power_of_2(n_loops),
        ALIGNED=not any(each % 16 for each in (*addresses[0], *addresses[1], *row_bytes)),
        **tile,
    )  # fmt: skip
    return out


def _tile(out: Tensor, k: int, m: int) -> dict[str, Any]:
    """Choose the tile of the gradient, the rows per step, and the warps.

    128 x 128 gives 128 operations per element loaded, enough to keep tensor cores busy. Three
    stages of 64 rows take 96 KiB of shared memory on an H100, whose tensor cores read from it, and
    48 KiB on older GPUs. float32 needs twice the bytes and three matmuls instead of one.
    """
    half = out.element_size() == 2
    rows, width = (64, 128) if half else (32, 64)
    return {
        "ROWS": rows,
        "BLOCK_K": min(width, max(16, triton.next_power_of_2(k))),
        "BLOCK_M": min(width, max(16, triton.next_power_of_2(m))),
        "num_warps": 8 if half else 4,
        "num_stages": 3,
    }


@triton.jit
def _sum_of_outer_products(
    out: tl.tensor, addresses: tl.tensor, bounds: tl.tensor,
    n_loops: tl.tensor, n_experts: tl.tensor, k: tl.tensor, m: tl.tensor,
    LOOPS: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    element = out.dtype.element_ty
    tiles_k = tl.cdiv(k, BLOCK_K)
    tiles_m = tl.cdiv(m, BLOCK_M)
    expert = tl.program_id(0) // (tiles_k * tiles_m)
    tile = tl.program_id(0) % (tiles_k * tiles_m)
    col_k = (tile // tiles_m) * BLOCK_K + tl.arange(0, BLOCK_K)
    col_m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)

    # the expert's rows enumerated over all loops: loop l holds rows below[l] .. upto[l] - 1
    loop = tl.arange(0, LOOPS)
    known = loop < n_loops
    bound = bounds + loop * (n_experts + 1) + expert
    start = tl.load(bound, mask=known, other=0)
    end = tl.load(bound + 1, mask=known, other=0)
    upto = tl.cumsum(end - start, axis=0)
    below = upto - (end - start)
    n_rows = tl.sum(end - start, axis=0)
    x_base = tl.load(addresses + loop, mask=known, other=0)
    grad_base = tl.load(addresses + n_loops + loop, mask=known, other=0)
    size: tl.constexpr = element.primitive_bitwidth // 8
    # address of row 0, if the loop's rows began there
    x_base += (start - below).to(tl.int64) * k * size
    grad_base += (start - below).to(tl.int64) * m * size

    total = tl.zeros((BLOCK_K, BLOCK_M), dtype=tl.float32)
    for first in range(0, n_rows, ROWS):
        number = first + tl.arange(0, ROWS)
        here = (number[:, None] >= below[None, :]) & (number[:, None] < upto[None, :])
        x_at = tl.sum(tl.where(here, x_base[None, :], 0), axis=1)
        grad_at = tl.sum(tl.where(here, grad_base[None, :], 0), axis=1)
        x_row = (x_at + number.to(tl.int64) * k * size).to(tl.pointer_type(element))
        grad_row = (grad_at + number.to(tl.int64) * m * size).to(tl.pointer_type(element))
        if ALIGNED:
            x_row = tl.multiple_of(x_row, 16)
            grad_row = tl.multiple_of(grad_row, 16)
        real = (number < n_rows)[:, None]
        x = tl.load(x_row[:, None] + col_k[None, :], mask=real & (col_k < k)[None, :], other=0.0)
        grad = tl.load(
            grad_row[:, None] + col_m[None, :], mask=real & (col_m < m)[None, :], other=0.0
        )
        # "tf32x3" affects float32 only: three tensor-core matmuls, nearly exact
        total = tl.dot(tl.trans(x), grad, total, input_precision="tf32x3")

    place = expert.to(tl.int64) * k * m + col_k.to(tl.int64)[:, None] * m + col_m[None, :]
    tl.store(out + place, total.to(element), mask=(col_k < k)[:, None] & (col_m < m)[None, :])
