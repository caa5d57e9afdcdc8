"""The start of a loop: x = A h + drive, and the norm that the first block takes of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from open_mythos.ops.backend import CHECKS, HALF_OR_FLOAT, triton_serves
from open_mythos.ops.norm import rms_norm, rms_norm_gradients

WIDEST = 8192
"""Widest row that the kernel's backward pass holds in the registers of one multiprocessor."""


def hold_and_norm(
    h_BTD: Tensor,
    drive_BTD: Tensor,
    A_D: Tensor,
    weight_D: Tensor,
    eps: float,
    *,
    shift: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x = A h + drive (+ shift), and y = x / rms(x) * weight, in one pass over the state.

    "auto" is the Triton kernel on CUDA, and the plain form elsewhere, for rows wider than
    :data:`WIDEST`, and inside ``torch.compile``, which fuses the plain form by itself.

    Args:
        h_BTD: State; computed with in float32.
        drive_BTD: What the input adds, float32, of the state's shape.
        A_D: Decay of each channel, float32.
        weight_D: Of the norm, float32, bfloat16 or float16.
        eps: Added to the mean square.
        shift: Added to every position, float32: (D,), or (B, 1, D) or (1, 1, D) for states of three
            axes. Carries no gradient.
        dtype: Of y; the weight's by default.
        backend: "auto", "triton" or "reference".

    Returns:
        x float32 and y, both of the state's shape.

    Raises:
        ConfigError: Unknown backend, or a kernel asked for by name that cannot serve the call.
        EnvironmentError_: The kernel was asked for by name and Triton is not installed.
    """
    dtype = weight_D.dtype if dtype is None else dtype
    problem = _problem(h_BTD, drive_BTD, A_D, weight_D, dtype)
    if not triton_serves("hold_and_norm", backend, h_BTD, problem):
        norm = "reference" if backend == "reference" else "auto"
        return _plain(h_BTD, drive_BTD, A_D, weight_D, eps, shift, dtype, norm)
    h_ND, drive_ND = (_rows(part.float()) for part in (h_BTD, drive_BTD))
    shift_BD = None if shift is None else _rows(shift.detach()).contiguous()
    x_ND, y_ND = _HoldAndNorm.apply(
        h_ND, drive_ND, A_D.contiguous(), shift_BD, weight_D.contiguous(), eps, dtype
    )
    return x_ND.view(h_BTD.shape), y_ND.view(h_BTD.shape)


def _plain(
    h_BTD: Tensor,
    drive_BTD: Tensor,
    A_D: Tensor,
    weight_D: Tensor,
    eps: float,
    shift: Tensor | None,
    dtype: torch.dtype,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """The plain twin: one operation after the other."""
    x_BTD = A_D * h_BTD.float() + drive_BTD
    if shift is not None:
        x_BTD = x_BTD + shift.detach()
    y_BTD = rms_norm(x_BTD, weight_D.float(), eps, backend=norm)
    return x_BTD, y_BTD.to(weight_D.dtype).to(dtype)


class _HoldAndNorm(torch.autograd.Function):
    """The kernel and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: Tensor,
        drive_ND: Tensor,
        A_D: Tensor,
        shift_BD: Tensor | None,
        weight_D: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        from open_mythos.ops.kernels import injection

        x_ND, y_ND, scale_N = injection.forward(h_ND, drive_ND, A_D, shift_BD, weight_D, eps, dtype)
        ctx.save_for_backward(x_ND, scale_N, h_ND, A_D, weight_D)
        ctx.eps = eps
        return x_ND, y_ND

    @staticmethod
    def backward(ctx: Any, grad_x_ND: Tensor, grad_y_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, scale_N, h_ND, A_D, weight_D = ctx.saved_tensors
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, as for a Jacobian
            parts = _gradients(grad_x_ND, grad_y_ND, x_ND, h_ND, A_D, weight_D, ctx.eps)
        else:
            from open_mythos.ops.kernels import injection

            parts = injection.backward(
                grad_x_ND.contiguous(), grad_y_ND.contiguous(), x_ND, scale_N, h_ND, A_D, weight_D
            )
        grad_h_ND, grad_drive_ND, grad_A_D, grad_weight_D = parts
        return grad_h_ND, grad_drive_ND, grad_A_D, None, grad_weight_D, None, None


def _gradients(
    grad_x_ND: Tensor,
    grad_y_ND: Tensor,
    x_ND: Tensor,
    h_ND: Tensor,
    A_D: Tensor,
    weight_D: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the backward kernel computes, in operations that have gradients themselves."""
    through_norm_ND, grad_weight_D = rms_norm_gradients(
        grad_y_ND.float(), x_ND, weight_D.float(), eps
    )
    total_ND = grad_x_ND + through_norm_ND
    return A_D * total_ND, total_ND, (total_ND * h_ND).sum(0), grad_weight_D.to(weight_D.dtype)


def _problem(
    h_BTD: Tensor, drive_BTD: Tensor, A_D: Tensor, weight_D: Tensor, dtype: torch.dtype
) -> str | None:
    """Why the kernel cannot serve the call, or None."""
    if torch.compiler.is_compiling():
        return "a call inside torch.compile"
    if h_BTD.shape[-1] > WIDEST:
        return f"rows of {h_BTD.shape[-1]} elements, more than {WIDEST}"
    if h_BTD.shape != drive_BTD.shape:
        return f"a state {tuple(h_BTD.shape)} and a drive {tuple(drive_BTD.shape)}"
    if torch.float64 in (h_BTD.dtype, drive_BTD.dtype) or A_D.dtype != torch.float32:
        return f"a state of {h_BTD.dtype}, a drive of {drive_BTD.dtype}, A of {A_D.dtype}"
    if weight_D.dtype not in HALF_OR_FLOAT or dtype not in HALF_OR_FLOAT:
        return f"a norm of {weight_D.dtype}, wanted in {dtype}"
    return None


def _small_case(device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the kernel and of the plain form, for an odd size."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 129), (2, 3, 129), (129,), (129,))
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def results(backend: str) -> list[Tensor]:
        h, drive, decay, weight = leaves = [part.clone().requires_grad_() for part in inputs]
        with torch.enable_grad():
            out = hold_and_norm(h, drive, decay, weight, 1e-6, backend=backend)
            gradients = torch.autograd.grad(out, leaves, inputs[:2])
        return [part.detach() for part in (*out, *gradients)]

    return results("triton"), results("reference")


CHECKS["hold_and_norm"] = _small_case


def _rows(x_BTD: Tensor) -> Tensor:
    """(N, D) with unit stride along D; a view where the strides allow one."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    return x_ND if x_ND.stride(-1) == 1 else x_ND.contiguous()
