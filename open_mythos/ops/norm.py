"""Root-mean-square normalization: x / rms(x) * weight (arXiv 1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.devices import is_transformed


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Normalize the last axis.

    In eager mode on a CPU, PyTorch runs ``F.rms_norm`` as separate operations and saves the result
    of each for the backward pass. There this function makes fewer passes over memory and saves
    only ``x`` and one number per row. On CUDA and inside ``torch.compile`` or a transform, it is
    ``F.rms_norm``.

    Args:
        x: (..., D) float32.
        weight_D: (D,) float32.
        eps: Added to the mean square.

    Returns:
        (..., D) float32.
    """
    if x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_transformed()):
        if not torch.is_grad_enabled():
            return _normalized(x, weight_D, eps)[0]  # an autograd function costs twice as much
        return _FusedNorm.apply(x, weight_D, eps)
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def _normalized(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalized tensor and 1 / rms (..., 1)."""
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, root).mul_(weight_D), root


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        y, root = _normalized(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, root)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight_D, root = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives
            root = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
            scaled = grad * weight_D
            d_x = root * (scaled - x * root.square() * (scaled * x).mean(-1, keepdim=True))
            return d_x, (grad * x * root).flatten(0, -2).sum(0), None
        # the backward kernel of a layer norm with mean 0 also subtracts the mean of weight * grad
        wants = [*ctx.needs_input_grad[:2], False]
        d_x, d_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight_D.shape, torch.zeros_like(root), root, weight_D, None, wants
        )
        if wants[0]:
            d_x.add_((grad @ weight_D).unsqueeze(-1).div_(x.shape[-1]).mul_(root))
        return d_x, d_weight_D, None
