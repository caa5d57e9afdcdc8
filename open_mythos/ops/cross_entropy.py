"""Linear cross-entropy: the loss of a language-model head without materializing all logits.

The gradients are computed chunk by chunk in the forward pass. One buffer holds the logits of a
chunk in the dtype of the matmul, and is overwritten by their gradient in place, a block of rows at
a time in float32. ``torch.nn.functional.linear_cross_entropy`` (PyTorch 2.13) is similar, but in
bfloat16 it takes up to twice the memory and three times as long on a CPU, and it breaks the graph
of ``torch.compile``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from open_mythos.devices import autocast_dtype, is_transformed, kernel_device
from open_mythos.ops.backend import pick_backend

CHUNK_BYTES = 1 << 28
"""Most bytes of logits in memory at a time on a CPU."""
ACCELERATOR_CHUNK_BYTES = 1 << 30
"""The same on other devices. Each chunk reads and writes the gradient of the whole head, which
costs as much as the matmul itself at a few hundred rows per chunk and little at thousands."""
BLOCK_BYTES = 1 << 22
"""Bytes of float32 logits of a block on a CPU: small enough to stay in its cache."""
ACCELERATOR_BLOCK_BYTES = 1 << 26
"""The same on other devices, where launching a kernel costs as much as a pass over a few MiB."""


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    scale: float = 1.0,
    softcap: float = 0.0,
    chunk: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the cross-entropy of ``softmax(hidden @ weight.T)`` against the targets.

    Matmuls run in the autocast dtype where autocast is on; softmax and sums run in float32.

    Args:
        hidden_BTD: Final hidden states (..., D).
        weight_VD: Weight of the output head.
        targets_BT: (...) int64 class of each position.
        ignore_index: Target of positions to ignore.
        reduction: "sum" over positions, or their "mean"; 0 when all are ignored.
        scale: Factor on the logits.
        softcap: Bound c of the scaled logits, c tanh(logits / c); 0 for none. Not fused: the
            backward pass recomputes each chunk.
        chunk: Positions whose logits are in memory at a time; by default :func:`chunk_rows`.
        backend: "chunked", "liger" (Triton kernels of the package liger-kernel, CUDA only), or
            "auto": "liger" for half-precision matmuls on CUDA where it is installed.

    Returns:
        A float32 scalar, in nats.
    """
    assert reduction in ("sum", "mean"), reduction
    shapes = hidden_BTD.shape, weight_VD.shape, targets_BT.shape
    assert shapes[0][:-1] == shapes[2] and shapes[0][-1] == shapes[1][-1], shapes  # noqa: PT018
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    dtype, device = weight_VD.dtype, weight_VD.device
    served_by = torch.device(kernel_device(weight_VD))
    dtype = autocast_dtype(device) or dtype
    if backend == "auto":
        backend = _choose(device, dtype)
    rows = chunk or chunk_rows(len(hidden_ND), len(weight_VD), dtype, served_by)
    hidden_ND = hidden_ND if scale == 1 else hidden_ND * scale
    if is_transformed():
        logits_NV = _capped(hidden_ND, weight_VD, softcap)
        total = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
    elif softcap:
        head = partial(_capped, weight_VD=weight_VD, softcap=softcap)
        total = chunked_cross_entropy(
            head, hidden_ND, targets_N, ignore_index=ignore_index, chunk=rows
        )
    else:
        implementation = pick_backend("loss", backend, {"chunked": _chunked, "liger": _liger})
        find = partial(implementation, dtype=dtype, ignore=ignore_index, rows=rows)
        if not torch.is_grad_enabled():  # the custom function would compute gradients anyway
            hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        total = _LossWithGradients.apply(hidden_ND, weight_VD, targets_N, find)
    return total if reduction == "sum" else total / _count(targets_N, ignore_index)


def linear_cross_entropy_reference(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Reference implementation of :func:`linear_cross_entropy`: all logits at once."""
    logits_NV = F.linear(hidden_BTD, weight_VD).flatten(0, -2).float()
    targets_N = targets_BT.flatten()
    total = F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")
    return total if reduction == "sum" else total / _count(targets_N, ignore_index)


def cap_logits(logits: Tensor, softcap: float) -> Tensor:
    """Return c tanh(logits / c) for a cap c, or the logits themselves for 0."""
    return softcap * (logits / softcap).tanh() if softcap else logits


def chunked_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk: int = 1024,
) -> Tensor:
    """Sum the cross-entropy of ``softmax(head(hidden))`` in nats, float32.

    The form for heads that are not one matmul. ``chunk`` positions have logits at a time; the
    backward pass recomputes each chunk.
    """

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden).float()
        return F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")

    parts = hidden_BTD.flatten(0, -2).split(chunk), targets_BT.flatten().split(chunk)
    losses = [checkpoint(loss, *each, use_reentrant=False) for each in zip(*parts, strict=True)]
    return torch.stack(losses).sum()


def _capped(hidden_ND: Tensor, weight_VD: Tensor, softcap: float) -> Tensor:
    return cap_logits(F.linear(hidden_ND, weight_VD).float(), softcap)


def chunk_rows(n_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the positions per chunk: equal chunks of (N, V) logits within the limit of bytes."""
    limit = CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    most = max(1, limit // (vocab * dtype.itemsize))
    return max(1, -(-n_rows // -(-n_rows // most))) if n_rows else 1


def _choose(device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend for matmuls in ``dtype`` on ``device``."""
    fused = device.type == "cuda" and dtype != torch.float32 and _liger_installed()
    return "liger" if fused else "chunked"


@cache
def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _count(targets_N: Tensor, ignore_index: int) -> Tensor:
    return (targets_N != ignore_index).sum().clamp_min(1)


Found = tuple[Tensor, Tensor | None, Tensor | None]
"""The summed loss, float32, and its gradients for the hidden states and the weight, if needed."""


class _LossWithGradients(torch.autograd.Function):
    """Sum of the losses; the forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        find: Callable[..., Found],
    ) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            total, *grads = find(hidden_ND, weight_VD, targets_N, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*grads)
        ctx.dtypes = hidden_ND.dtype, weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: with retain_graph=True this runs again
        scaled = (
            None if found is None else (found * grad).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs: tuple[bool, bool],
    *, dtype: torch.dtype, rows: int, ignore: int,
) -> Found:  # fmt: skip
    """Compute at most ``rows`` rows of logits at a time."""
    (n_all, dim), vocab = hidden_ND.shape, len(weight_VD)
    counts_N1 = (targets_N != ignore).unsqueeze(-1)
    classes_N1 = torch.where(counts_N1, targets_N.unsqueeze(-1), 0)
    of_hidden = torch.empty_like(hidden_ND) if needs[0] else None
    # float32: a sum over many chunks in bfloat16 would lose the small ones
    of_weight = torch.empty_like(weight_VD, dtype=torch.float32) if needs[1] else None
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    weight = weight_VD.to(dtype)
    buffer = weight.new_empty(min(rows, n_all), vocab)
    block = BLOCK_BYTES if kernel_device(weight) == "cpu" else ACCELERATOR_BLOCK_BYTES
    for start in range(0, max(1, n_all), rows):
        part = slice(start, start + rows)
        # zero the ignored rows: their logits are finite and their gradient adds nothing
        hidden = hidden_ND[part].to(dtype).masked_fill(~counts_N1[part], 0)
        residual = torch.mm(hidden, weight.mT, out=buffer[: len(hidden)])
        pieces = (
            each.split(max(1, block // (4 * vocab)))
            for each in (residual, classes_N1[part], counts_N1[part])
        )
        for logits, classes, counts in zip(*pieces, strict=True):
            total -= _to_residual(logits, classes, counts, any(needs))
        if of_hidden is not None:
            of_hidden[part] = residual @ weight
        if of_weight is not None:
            _add_matmul(of_weight, residual, hidden, max(1, block // (4 * dim)), start > 0)
    if of_hidden is not None:
        of_hidden.masked_fill_(~counts_N1, 0)
    return total, of_hidden, of_weight


def _to_residual(logits: Tensor, classes_N1: Tensor, counts_N1: Tensor, needed: bool) -> Tensor:
    """Return the sum of the targets' log-probabilities.

    If ``needed``, overwrite the logits with the gradient of minus that sum: softmax - one_hot.
    """
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked_N1 = log_p.gather(-1, classes_N1)
    if needed:
        residual = log_p.exp_()
        logits.copy_(residual.scatter_add_(-1, classes_N1, torch.full_like(picked_N1, -1.0)))
    return torch.where(counts_N1, picked_N1, 0).sum()


def _add_matmul(sum_VD: Tensor, residual: Tensor, hidden: Tensor, rows: int, more: bool) -> None:
    """Add residual^T hidden to ``sum_VD``, or overwrite it unless ``more``."""
    if residual.dtype == torch.float32:
        sum_VD.addmm_(residual.mT, hidden, beta=int(more))
        return
    for total, part in zip(sum_VD.split(rows), residual.split(rows, dim=1), strict=True):
        gradient = part.mT @ hidden
        total.add_(gradient) if more else total.copy_(gradient)


def _liger(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs: tuple[bool, bool],
    *, dtype: torch.dtype, rows: int, ignore: int,
) -> Found:  # fmt: skip
    """Call Liger Kernel (arXiv 2410.10989): also chunked, with a fused softmax."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    operands = [each.detach().to(dtype) for each in (hidden_ND, weight_VD)]
    operands[0].requires_grad_(any(needs))  # without it, the kernel computes no gradient at all
    operands[1].requires_grad_(needs[1])
    # the kernel's chunks take this many times the bytes of the hidden states
    share = rows * len(weight_VD) // max(1, hidden_ND.numel())
    with torch.set_grad_enabled(any(needs)):
        total = liger_fused_linear_cross_entropy(
            *operands, targets_N, ignore_index=ignore, reduction="sum",
            accum_dtype=torch.float32, chunk_mem_const=max(1, share),
        )  # fmt: skip
        wanted = [each for each in operands if each.requires_grad]
        grads = torch.autograd.grad(total, wanted) if wanted else ()
    of_hidden, of_weight = (*grads, None, None)[:2]
    return total.detach(), of_hidden if needs[0] else None, of_weight
