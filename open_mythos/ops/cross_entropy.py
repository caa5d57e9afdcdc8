"""Cross-entropy straight from hidden states and head weight: no logits of a whole batch.

The gradient is computed chunk by chunk together with the loss, so that at most ``chunk`` rows of
logits exist at any time. :func:`linear_cross_entropy_reference` is the plain twin.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_mythos.errors import ConfigError

REDUCTIONS = ("sum", "mean")


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    chunk: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` against the targets.

    The products run in the autocast dtype where autocast is on, softmax and sums in float32.

    Args:
        hidden_BTD: Final hidden states (..., D).
        weight_VD: Weight of the output head.
        targets_BT: (...) int64 class of each position.
        chunk: Positions whose logits exist at a time.
        ignore_index: Target of the positions that do not count.
        reduction: "sum" over positions, or their "mean"; 0 when no position counts.

    Returns:
        A float32 scalar, in nats.

    Raises:
        ConfigError: The shapes do not belong together, or a choice is unknown.
    """
    _check(hidden_BTD, weight_VD, targets_BT, chunk, reduction)
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    if not torch.is_grad_enabled():  # a custom function would prepare gradients all the same
        hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
    total: Tensor = _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, chunk, ignore_index)
    return total if reduction == "sum" else total / _count(targets_N, ignore_index)


def linear_cross_entropy_reference(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """The plain twin of :func:`linear_cross_entropy`: all logits at once."""
    _check(hidden_BTD, weight_VD, targets_BT, 1, reduction)
    logits_NV = F.linear(hidden_BTD.flatten(0, -2), weight_VD).float()
    targets_N = targets_BT.flatten()
    total = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
    return total if reduction == "sum" else total / _count(targets_N, ignore_index)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients are made in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: int, ignore: int
    ) -> Tensor:
        device = hidden_ND.device.type
        dtype = weight_VD.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden_ND) if needs_hidden else None
        # float32: a sum over many chunks in bfloat16 would lose the small ones
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        with torch.autocast(device, enabled=False):
            weight = weight_VD.to(dtype)
            for start in range(0, hidden_ND.shape[0], chunk):
                rows = slice(start, start + chunk)
                hidden = hidden_ND[rows].to(dtype)
                loss, residual = _chunk_loss(hidden @ weight.mT, targets_N[rows], ignore)
                total += loss
                if grad_hidden is not None:
                    grad_hidden[rows] = residual.to(dtype) @ weight
                if grad_weight is not None:
                    grad_weight += residual.to(dtype).mT @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _chunk_loss(logits_NV: Tensor, targets_N: Tensor, ignore: int) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk and its gradient with respect to the logits, both float32."""
    log_p_NV = torch.log_softmax(logits_NV, dim=-1, dtype=torch.float32)
    counts_N1 = (targets_N != ignore).unsqueeze(-1)
    classes_N1 = torch.where(counts_N1, targets_N.unsqueeze(-1), 0)
    picked_N1 = log_p_NV.gather(-1, classes_N1)
    loss = -torch.where(counts_N1, picked_N1, 0).sum()
    residual_NV = log_p_NV.exp_()
    residual_NV.scatter_add_(-1, classes_N1, torch.full_like(picked_N1, -1.0))
    return loss, torch.where(counts_N1, residual_NV, 0)


def _count(targets_N: Tensor, ignore_index: int) -> Tensor:
    return (targets_N != ignore_index).sum().clamp_min(1)


def _check(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, chunk: int, reduction: str
) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(
            "unknown reduction", where="reduction", value=reduction, allowed=" or ".join(REDUCTIONS)
        )
    if chunk < 1:
        raise ConfigError("not a chunk size", where="chunk", value=chunk, allowed="an integer >= 1")
    if hidden_BTD.shape[:-1] != targets_BT.shape or hidden_BTD.shape[-1] != weight_VD.shape[-1]:
        raise ConfigError(
            "hidden states, head and targets do not belong together", where="linear_cross_entropy",
            value=tuple(tuple(x.shape) for x in (hidden_BTD, weight_VD, targets_BT)),
            allowed="(..., D), (V, D) and (...)",
        )  # fmt: skip
