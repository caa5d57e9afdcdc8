"""Root-mean-square normalisation: x / rms(x) * weight (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError

BACKENDS = ("auto", "fused", "reference")


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, backend: str = "auto") -> Tensor:
    """Normalise the last axis.

    On a CPU PyTorch computes this step by step and keeps every step for the backward pass. "fused"
    takes few passes over the memory and keeps what came in and a number for each row. On CUDA, and
    inside ``torch.compile``, PyTorch's own form is as good.

    Args:
        x: (..., D) float32.
        weight_D: float32.
        eps: Added to the mean square.
        backend: "fused", "reference", or "auto", which is the first for tensors on a CPU.

    Returns:
        (..., D) float32.

    Raises:
        ConfigError: Unknown backend.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            "unknown backend of rms_norm", where="backend", value=backend,
            allowed=", ".join(BACKENDS), fix='use "auto"',
        )  # fmt: skip
    if backend == "auto":
        here = x.device.type == "cpu" and not torch.compiler.is_compiling()
        backend = "fused" if here else "reference"
    if backend == "fused":
        return _FusedNorm.apply(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, root)
        ctx.eps = eps
        return torch.mul(x, root).mul_(weight_D)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, root = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*rms_norm_gradients(grad, x, weight_D, ctx.eps), None)
        # the backward pass of a layer norm of mean 0, which is one kernel, subtracts the mean of
        # weight * grad as well
        wants = [*ctx.needs_input_grad[:2], False]
        d_x, d_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight_D.shape, torch.zeros_like(root), root, weight_D, None, wants
        )
        if wants[0]:
            d_x.add_((grad @ weight_D).unsqueeze(-1).div_(x.shape[-1]).mul_(root))
        return d_x, d_weight_D, None


def rms_norm_gradients(
    grad: Tensor, x: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``weight_D`` in operations that can be differentiated again."""
    root = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = grad * weight_D
    d_x = root * (scaled - x * root.square() * (scaled * x).mean(-1, keepdim=True))
    return d_x, (grad * x * root).flatten(0, -2).sum(0)
