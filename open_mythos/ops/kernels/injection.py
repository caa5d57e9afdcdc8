"""Injection and norm in one pass over the rows, forward and backward.

A program holds whole rows in registers, so every element is read and written once: 14 bytes in the
forward and 22 in the backward for a bfloat16 norm, where one operation after the other moves 34 and
more. The gradients that are sums over rows (A, norm weight) are added up in two stages: a fixed
number of programs each add up their rows, then the partial sums are added. No atomics, and neither
stage depends on the GPU, so a result is the same on every run.

Tiles are powers of two and 2,048 to 8,192 elements wide: no search for sizes is needed where every
byte is touched once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 256
"""Programs of the backward pass: about two for each multiprocessor of a large GPU."""
_TILE = 2048


def forward(
    h_ND: Tensor,
    drive_ND: Tensor,
    A_D: Tensor,
    shift_BD: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D) float32, y (N, D) of ``dtype``, and 1 / rms(x) (N,) float32.

    Args:
        h_ND: State, float32, unit stride along D.
        drive_ND: What is added to A h, float32, unit stride along D.
        A_D: Decay, float32.
        shift_BD: Added to the rows, float32, contiguous: each of its B rows to N / B in turn.
        weight_D: Of the norm.
        eps: Added to the mean square.
        dtype: Of y.
    """
    rows, width = h_ND.shape
    x_ND = torch.empty((rows, width), dtype=torch.float32, device=h_ND.device)
    y_ND = torch.empty((rows, width), dtype=dtype, device=h_ND.device)
    scale_N = torch.empty(rows, dtype=torch.float32, device=h_ND.device)
    if rows:
        tile = _tile(width)
        _forward[(triton.cdiv(rows, tile["ROWS"]),)](
            h_ND, drive_ND, A_D, A_D if shift_BD is None else shift_BD, weight_D,
            x_ND, y_ND, scale_N,
            rows, width, rows if shift_BD is None else rows // len(shift_BD),
            h_ND.stride(0), drive_ND.stride(0), eps,
            SHIFT=shift_BD is not None, **tile,
        )  # fmt: skip
    return x_ND, y_ND, scale_N


def backward(
    grad_x_ND: Tensor,
    grad_y_ND: Tensor,
    x_ND: Tensor,
    scale_N: Tensor,
    h_ND: Tensor,
    A_D: Tensor,
    weight_D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for h and drive (N, D) and for A (D,), float32, and for the weight (D,).

    Args:
        grad_x_ND: Gradient of x, float32, contiguous.
        grad_y_ND: Gradient of y, contiguous.
        x_ND: From the forward pass.
        scale_N: From the forward pass.
        h_ND: State, float32, unit stride along D.
        A_D: Decay, float32.
        weight_D: Of the norm.
    """
    rows, width = x_ND.shape
    grad_h_ND, grad_drive_ND = torch.empty_like(x_ND), torch.empty_like(x_ND)
    tile = _tile(width)
    programs = min(PROGRAMS, triton.cdiv(rows, tile["ROWS"]))
    partial = torch.empty((2, programs, width), dtype=torch.float32, device=x_ND.device)
    if rows:
        _backward[(programs,)](
            grad_x_ND, grad_y_ND, x_ND, scale_N, h_ND, A_D, weight_D,
            grad_h_ND, grad_drive_ND, partial[0], partial[1],
            rows, width, h_ND.stride(0), **tile,
        )  # fmt: skip
    grad_A_D, grad_weight_D = partial.sum(1).unbind()
    return grad_h_ND, grad_drive_ND, grad_A_D, grad_weight_D.to(weight_D.dtype)


def _tile(width: int) -> dict[str, Any]:
    """Rows and columns of a tile, and warps that hold it: 16 elements to a thread."""
    block = triton.next_power_of_2(width)
    return {
        "ROWS": max(1, min(32, _TILE // block)),
        "WIDTH": block,
        "num_warps": min(16, max(4, block // 512)),
        "enable_fp_fusion": False,  # x is then that of the plain form, bit for bit
    }


@triton.jit
def _forward(
    h: tl.tensor,
    drive: tl.tensor,
    decay: tl.tensor,
    shift: tl.tensor,
    weight: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    scale: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    shift_rows: tl.tensor,
    h_stride: tl.tensor,
    drive_stride: tl.tensor,
    eps: tl.tensor,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    in_width = col < width
    mask = (row < n_rows)[:, None] & in_width[None, :]
    # 64 bits: rows times their stride can pass 2^31
    at = row.to(tl.int64)[:, None]
    col_1D = col[None, :]

    a = tl.load(decay + col, mask=in_width, other=0.0)[None, :]
    held = a * tl.load(h + at * h_stride + col_1D, mask=mask, other=0.0)
    value = held + tl.load(drive + at * drive_stride + col_1D, mask=mask, other=0.0)
    if SHIFT:
        value += tl.load(shift + at // shift_rows * width + col_1D, mask=mask, other=0.0)
    mean_square = tl.sum(value * value, axis=1) / width
    inverse = 1.0 / tl.sqrt(mean_square + eps)
    w = tl.load(weight + col, mask=in_width, other=0.0)[None, :].to(tl.float32)
    normed = value * inverse[:, None] * w

    tl.store(x + at * width + col_1D, value, mask=mask)
    tl.store(y + at * width + col_1D, normed.to(y.dtype.element_ty), mask=mask)
    tl.store(scale + row, inverse, mask=row < n_rows)


@triton.jit
def _backward(
    grad_x: tl.tensor,
    grad_y: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    h: tl.tensor,
    decay: tl.tensor,
    weight: tl.tensor,
    grad_h: tl.tensor,
    grad_drive: tl.tensor,
    partial_decay: tl.tensor,
    partial_weight: tl.tensor,
    n_rows: tl.tensor,
    width: tl.tensor,
    h_stride: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    col = tl.arange(0, WIDTH)
    in_width = col < width
    col_1D = col[None, :]
    sum_decay = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    sum_weight = tl.zeros((ROWS, WIDTH), dtype=tl.float32)

    for tile in range(program, tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < n_rows)[:, None] & in_width[None, :]
        at = row.to(tl.int64)[:, None]
        place = at * width + col_1D
        inverse = tl.load(scale + row, mask=row < n_rows, other=0.0)[:, None]
        unit = tl.load(x + place, mask=mask, other=0.0) * inverse
        from_y = tl.load(grad_y + place, mask=mask, other=0.0).to(tl.float32)
        from_x = tl.load(grad_x + place, mask=mask, other=0.0)
        state = tl.load(h + at * h_stride + col_1D, mask=mask, other=0.0)

        # read again for every row, from the cache: kept, they would not leave enough registers
        w = tl.load(weight + col, mask=in_width, other=0.0)[None, :].to(tl.float32)
        wanted = from_y * w
        along = tl.sum(wanted * unit, axis=1) / width  # the norm takes this direction out
        total = from_x + inverse * (wanted - unit * along[:, None])
        tl.store(grad_drive + place, total, mask=mask)
        a = tl.load(decay + col, mask=in_width, other=0.0)[None, :]
        tl.store(grad_h + place, a * total, mask=mask)
        sum_decay += total * state
        sum_weight += from_y * unit

    place_D = program.to(tl.int64) * width + col
    tl.store(partial_decay + place_D, tl.sum(sum_decay, axis=0), mask=in_width)
    tl.store(partial_weight + place_D, tl.sum(sum_weight, axis=0), mask=in_width)
