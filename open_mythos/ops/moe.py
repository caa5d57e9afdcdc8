"""Routed experts: every token visits its chosen experts, the results are added by weight.

One signature, three ways to compute it. Each expert is a SwiGLU, ``down(silu(gate x) * up x)``, its
gate and up projections stored side by side so that they are one product.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError

logger = logging.getLogger(__name__)


def routed_experts(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    experts_NC: Tensor,
    weights_NC: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum over the C chosen experts of weight times expert output.

    Args:
        x_ND: Tokens.
        gate_up_EDF: (E, D, 2F) gate and up projections.
        down_EFD: (E, F, D) down projections.
        experts_NC: Chosen experts, int64, distinct within a token.
        weights_NC: Their weights.
        backend: "auto", "grouped", "sorted" or "reference".

    Returns:
        (N, D), in the dtype of the projections.

    Raises:
        ConfigError: Unknown backend, or one that cannot serve these shapes.
    """
    if backend == "auto":
        backend = "grouped" if _grouped_problem(gate_up_EDF, down_EFD) is None else "sorted"
    if backend not in _BACKENDS:
        raise ConfigError(
            "unknown expert backend", where="moe_backend", value=backend,
            allowed=", ".join(("auto", *_BACKENDS)), fix='set moe_backend to "auto"',
        )  # fmt: skip
    _log_once(backend)
    x_ND = x_ND.to(gate_up_EDF.dtype)
    return _BACKENDS[backend](x_ND, gate_up_EDF, down_EFD, experts_NC, weights_NC.to(x_ND.dtype))


def expert_load(experts_NC: Tensor, n_experts: int, valid_N: Tensor | None = None) -> Tensor:
    """(E,) float32 count of the tokens that chose each expert; padding is not counted.

    ``bincount`` would wait for the GPU to learn its output size; a scatter does not.
    """
    ones = torch.ones(experts_NC.shape, device=experts_NC.device)
    if valid_N is not None:
        ones = ones * valid_N.unsqueeze(-1)
    load = torch.zeros(n_experts, device=experts_NC.device)
    return load.scatter_add_(0, experts_NC.reshape(-1), ones.reshape(-1))


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _reference(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """The plain twin: one expert after the other, on the tokens that chose it."""
    out_ND = torch.zeros_like(x_ND)
    projections = zip(gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    for expert, (gate_up_DF, down_FD) in enumerate(projections):
        token, choice = (experts_NC == expert).nonzero(as_tuple=True)
        y = _swiglu(x_ND[token] @ gate_up_DF) @ down_FD
        out_ND = out_ND.index_add(0, token, y * weights_NC[token, choice].unsqueeze(-1))
    return out_ND


class _ToExperts(torch.autograd.Function):
    """(N, D) tokens -> (N C, D) one row per choice, in the order of the experts.

    This and its transpose :class:`_ToTokens` only ever gather rows, forward and backward: no atomic
    additions make a result depend on the order of threads, and none are waited for.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.n_tokens = x_ND.shape[0]
        return x_ND.index_select(0, order // (order.numel() // ctx.n_tokens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _ToTokens.apply(grad, *ctx.saved_tensors, ctx.n_tokens), None, None


class _ToTokens(torch.autograd.Function):
    """(N C, D) rows in the order of the experts -> (N, D), the sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, inverse: Tensor, n_tokens: int) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return y.index_select(0, inverse).view(n_tokens, -1, y.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _ToExperts.apply(grad, *ctx.saved_tensors), None, None, None


def _expert_order(experts_NC: Tensor) -> tuple[Tensor, Tensor]:
    """The permutation that sorts all choices by expert, and its inverse."""
    order = experts_NC.flatten().argsort(stable=True)
    numbers = torch.arange(order.numel(), device=order.device)
    return order, torch.empty_like(order).scatter_(0, order, numbers)


def _sorted(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Tokens sorted by expert, one dense product per expert; serves every shape and dtype."""
    order, inverse = _expert_order(experts_NC)
    xs = _ToExperts.apply(x_ND, order, inverse)
    ws = _ToExperts.apply(weights_NC.view(-1, 1), order, inverse)
    counts = expert_load(experts_NC, gate_up_EDF.shape[0]).long().tolist()
    # unbound once: a slice per expert would make the backward pass fill a whole stack each time
    projections = zip(gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    tokens = zip(xs.split(counts), ws.split(counts), projections, strict=True)
    y = torch.cat([(_swiglu(x @ gate_up) * w) @ down for x, w, (gate_up, down) in tokens])
    return _ToTokens.apply(y, order, inverse, x_ND.shape[0])


def _grouped(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Tokens sorted by expert, two grouped matrix products for all experts together."""
    problem = _grouped_problem(gate_up_EDF, down_EFD)
    if problem is not None:
        raise ConfigError(
            "grouped products cannot serve these experts", where="moe_backend", value=problem,
            allowed="rows of dim and of expert_dim in multiples of 16 bytes, at most 32-bit floats",
            fix='set moe_backend to "auto"',
        )  # fmt: skip
    order, inverse = _expert_order(experts_NC)
    xs = _ToExperts.apply(x_ND, order, inverse)
    ws = _ToExperts.apply(weights_NC.view(-1, 1), order, inverse)
    ends = expert_load(experts_NC, gate_up_EDF.shape[0]).cumsum(0).to(torch.int32)
    hidden = _swiglu(F.grouped_mm(xs, gate_up_EDF, offs=ends)) * ws
    y = F.grouped_mm(hidden, down_EFD, offs=ends)
    return _ToTokens.apply(y, order, inverse, x_ND.shape[0])


def _grouped_problem(gate_up_EDF: Tensor, down_EFD: Tensor) -> str | None:
    """Why the grouped kernel would refuse these weights, or None."""
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    if gate_up_EDF.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{gate_up_EDF.dtype} weights"
    for width in (gate_up_EDF.shape[1], gate_up_EDF.shape[2], down_EFD.shape[1]):
        if width * gate_up_EDF.element_size() % 16:
            return f"a row of {width} {gate_up_EDF.dtype} elements"
    return None


@cache
def _log_once(backend: str) -> None:
    logger.info("expert backend: %s", backend)


_BACKENDS = {"grouped": _grouped, "sorted": _sorted, "reference": _reference}
