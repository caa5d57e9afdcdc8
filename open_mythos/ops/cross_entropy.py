"""Cross-entropy straight from hidden states and head weight: no logits of a whole batch.

The gradient is computed chunk by chunk together with the loss. One buffer holds the logits of a
chunk in the dtype of the products, and they become their own gradient in place, a block of rows at
a time in float32. :func:`linear_cross_entropy_reference` is the plain twin.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from open_mythos.errors import ConfigError, EnvironmentError_

logger = logging.getLogger(__name__)

REDUCTIONS = ("sum", "mean")
BACKENDS = ("auto", "chunked", "liger", "reference")

CHUNK_BYTES = 1 << 28
"""Bytes of logits that exist at a time on a CPU."""
ACCELERATOR_CHUNK_BYTES = 1 << 30
"""The same elsewhere. Every chunk adds its gradient to that of the whole head, whose bytes take as
long as the product itself where a chunk has a few hundred rows; with thousands they do not count.
"""
BLOCK_BYTES = 1 << 22
"""Bytes of float32 of a block on a CPU: its passes find it in the cache."""
ACCELERATOR_BLOCK_BYTES = 1 << 26
"""The same elsewhere, where starting a kernel takes as long as a pass over a few MiB."""


def linear_cross_entropy(
    hidden_BTD: Tensor,
    weight_VD: Tensor,
    targets_BT: Tensor,
    *,
    chunk: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` against the targets.

    The products run in the autocast dtype where autocast is on, softmax and sums in float32.

    Args:
        hidden_BTD: Final hidden states (..., D).
        weight_VD: Weight of the output head.
        targets_BT: (...) int64 class of each position.
        chunk: Positions whose logits exist at a time; by default :func:`chunk_rows`.
        ignore_index: Target of the positions that do not count.
        reduction: "sum" over positions, or their "mean"; 0 when no position counts.
        backend: "chunked"; "liger", the Triton kernels of the package liger-kernel, for CUDA, which
            wait for the device twice a call; "reference", all logits at once; or "auto": "liger"
            for half-precision products on CUDA where it is installed, "chunked" otherwise.

    Returns:
        A float32 scalar, in nats.

    Raises:
        ConfigError: The shapes do not belong together, a choice is unknown, or the backend cannot
            serve the call.
        EnvironmentError_: liger-kernel was asked for by name and is not installed.
    """
    _check(hidden_BTD, weight_VD, targets_BT, chunk, reduction)
    hidden_ND, targets_N = hidden_BTD.flatten(0, -2), targets_BT.flatten()
    dtype = _product_dtype(weight_VD)
    backend = _choose(backend, weight_VD.device, dtype)
    rows = chunk or chunk_rows(len(hidden_ND), len(weight_VD), dtype, weight_VD.device)
    if backend == "reference":
        total = _all_at_once(hidden_ND, weight_VD, targets_N, ignore_index)
    else:
        if not torch.is_grad_enabled():  # a custom function would prepare gradients all the same
            hidden_ND, weight_VD = hidden_ND.detach(), weight_VD.detach()
        find = partial(_FINDERS[backend], dtype=dtype, rows=rows, ignore=ignore_index)
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
    """The plain twin of :func:`linear_cross_entropy`: all logits at once."""
    return linear_cross_entropy(
        hidden_BTD, weight_VD, targets_BT,
        ignore_index=ignore_index, reduction=reduction, backend="reference",
    )  # fmt: skip


def chunk_rows(n_rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> int:
    """Positions whose logits should exist at a time: equal chunks within a number of bytes.

    Args:
        n_rows: Positions N in all.
        vocab: Logits V of a position.
        dtype: Of the logits.
        device: Where they are; it decides how many bytes.
    """
    limit = CHUNK_BYTES if device.type == "cpu" else ACCELERATOR_CHUNK_BYTES
    most = max(1, limit // (vocab * dtype.itemsize))
    return max(1, -(-n_rows // -(-n_rows // most))) if n_rows else 1


Found = tuple[Tensor, Tensor | None, Tensor | None]
"""The summed loss, float32, and its gradients for the hidden states and the weight, if needed."""


class _LossWithGradients(torch.autograd.Function):
    """Sum of the losses; the gradients are made in the forward pass and scaled in the backward."""

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
        # not in place: whoever keeps the graph may come here twice
        scaled = (
            None if found is None else (found * grad).to(dtype)
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs: tuple[bool, bool],
    *, dtype: torch.dtype, rows: int, ignore: int,
) -> Found:  # fmt: skip
    """At most ``rows`` rows of logits at a time."""
    (n_all, dim), vocab = hidden_ND.shape, len(weight_VD)
    counts_N1 = (targets_N != ignore).unsqueeze(-1)
    classes_N1 = torch.where(counts_N1, targets_N.unsqueeze(-1), 0)
    of_hidden = torch.empty_like(hidden_ND) if needs[0] else None
    # float32: a sum over many chunks in bfloat16 would lose the small ones
    of_weight = torch.empty_like(weight_VD, dtype=torch.float32) if needs[1] else None
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    weight = weight_VD.to(dtype)
    buffer = weight.new_empty(min(rows, n_all), vocab)
    block = BLOCK_BYTES if weight.device.type == "cpu" else ACCELERATOR_BLOCK_BYTES
    for start in range(0, max(1, n_all), rows):
        part = slice(start, start + rows)
        # what does not count is zero: its logits are finite and its gradient adds nothing
        hidden = hidden_ND[part].to(dtype).masked_fill(~counts_N1[part], 0)
        residual = torch.mm(hidden, weight.mT, out=buffer[: len(hidden)])
        pieces = (each.split(max(1, block // (4 * vocab)))
                  for each in (residual, classes_N1[part], counts_N1[part]))  # fmt: skip
        for logits, classes, counts in zip(*pieces, strict=True):
            total -= _to_residual(logits, classes, counts, any(needs))
        if of_hidden is not None:
            of_hidden[part] = residual @ weight
        if of_weight is not None:
            _add_product(of_weight, residual, hidden, max(1, block // (4 * dim)), start > 0)
    if of_hidden is not None:
        of_hidden.masked_fill_(~counts_N1, 0)
    return total, of_hidden, of_weight


def _to_residual(logits: Tensor, classes_N1: Tensor, counts_N1: Tensor, needed: bool) -> Tensor:
    """Sum of the targets' log-probabilities; if ``needed``, the logits become the gradient of minus
    that sum: softmax less one at the target."""
    log_p = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    picked_N1 = log_p.gather(-1, classes_N1)
    if needed:
        residual = log_p.exp_()
        logits.copy_(residual.scatter_add_(-1, classes_N1, torch.full_like(picked_N1, -1.0)))
    return torch.where(counts_N1, picked_N1, 0).sum()


def _add_product(sum_VD: Tensor, residual: Tensor, hidden: Tensor, rows: int, more: bool) -> None:
    """``sum_VD`` plus (or, unless ``more``, set to) residual^T hidden."""
    if residual.dtype == torch.float32:
        sum_VD.addmm_(residual.mT, hidden, beta=int(more))
        return
    for total, part in zip(sum_VD.split(rows), residual.split(rows, dim=1), strict=True):
        product = part.mT @ hidden
        total.add_(product) if more else total.copy_(product)


def _liger(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, needs: tuple[bool, bool],
    *, dtype: torch.dtype, rows: int, ignore: int,
) -> Found:  # fmt: skip
    """Liger Kernel (arXiv 2410.10989): the same way through chunks, with a fused softmax."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    operands = [each.detach().to(dtype) for each in (hidden_ND, weight_VD)]
    operands[0].requires_grad_(any(needs))  # without it, the kernel makes no gradient at all
    operands[1].requires_grad_(needs[1])
    # its chunks take so many times the bytes of the hidden states
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


def _all_at_once(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, ignore_index: int
) -> Tensor:
    logits_NV = F.linear(hidden_ND, weight_VD).float()
    return F.cross_entropy(logits_NV, targets_N, ignore_index=ignore_index, reduction="sum")


def _choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves products in ``dtype`` on ``device``."""
    if backend not in BACKENDS:
        raise ConfigError(
            "unknown loss backend", where="backend", value=backend, allowed=", ".join(BACKENDS),
            fix='use "auto"',
        )  # fmt: skip
    if backend == "liger":
        _need_liger(device)
    if backend == "auto":
        fused = device.type == "cuda" and dtype != torch.float32 and _liger_installed()
        backend = "liger" if fused else "chunked"
    if not torch.compiler.is_compiling():
        _log_once(backend)
    return backend


def _need_liger(device: torch.device) -> None:
    if not _liger_installed():
        raise EnvironmentError_(
            "liger-kernel was asked for and is not installed", where="backend", value="liger",
            fix='pip install "open-mythos[kernels]", or use backend="auto"',
        )  # fmt: skip
    import triton

    # Triton's interpreter runs kernels anywhere: for tests
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError(
            "liger-kernel cannot serve this call", where="backend", value=f"tensors on {device}",
            allowed="tensors on CUDA", fix='use backend="auto"',
        )  # fmt: skip


def _product_dtype(weight_VD: Tensor) -> torch.dtype:
    device = weight_VD.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight_VD.dtype


def _count(targets_N: Tensor, ignore_index: int) -> Tensor:
    return (targets_N != ignore_index).sum().clamp_min(1)


def _check(
    hidden_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, chunk: int | None, reduction: str
) -> None:
    if reduction not in REDUCTIONS:
        raise ConfigError(
            "unknown reduction", where="reduction", value=reduction, allowed=" or ".join(REDUCTIONS)
        )
    if chunk is not None and chunk < 1:
        raise ConfigError("not a chunk size", where="chunk", value=chunk, allowed="an integer >= 1")
    if hidden_BTD.shape[:-1] != targets_BT.shape or hidden_BTD.shape[-1] != weight_VD.shape[-1]:
        raise ConfigError(
            "hidden states, head and targets do not belong together", where="linear_cross_entropy",
            value=tuple(tuple(x.shape) for x in (hidden_BTD, weight_VD, targets_BT)),
            allowed="(..., D), (V, D) and (...)",
        )  # fmt: skip


@cache
def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@cache
def _log_once(backend: str) -> None:
    logger.info("loss backend: %s", backend)


_FINDERS: dict[str, Callable[..., Found]] = {"chunked": _chunked, "liger": _liger}
