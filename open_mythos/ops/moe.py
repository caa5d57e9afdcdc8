"""Routed experts: every token visits its chosen experts, the results are added by weight.

One signature, three ways to compute it. Each expert is a SwiGLU, ``down(silu(gate x) * up x)``, its
gate and up projections stored side by side so that they are one product.
"""

from __future__ import annotations

import logging
from functools import cache

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
        backend = "grouped" if _alignment_problem(gate_up_EDF, down_EFD) is None else "sorted"
    if backend not in _BACKENDS:
        raise ConfigError(
            "unknown expert backend", where="moe_backend", value=backend,
            allowed=", ".join(("auto", *_BACKENDS)),
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


def _in_expert_order(
    x_ND: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of the tokens sorted by expert, their weights, and the sorting permutation.

    Written with permutations alone: their gradients are permutations too, so no atomic additions
    make the result depend on the order of threads.
    """
    n_tokens, n_chosen = experts_NC.shape
    order = experts_NC.reshape(-1).argsort(stable=True)
    copies = x_ND.unsqueeze(1).expand(-1, n_chosen, -1).reshape(n_tokens * n_chosen, -1)
    return copies[order], weights_NC.reshape(-1)[order].unsqueeze(-1), order


def _in_token_order(y: Tensor, order: Tensor, shape_NC: torch.Size) -> Tensor:
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(order.numel(), device=order.device)
    )
    return y[inverse].view(*shape_NC, -1).sum(1)


def _sorted(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Tokens sorted by expert, one dense product per expert; serves every shape and dtype."""
    xs, ws, order = _in_expert_order(x_ND, experts_NC, weights_NC)
    counts = expert_load(experts_NC, gate_up_EDF.shape[0]).long().tolist()
    # unbound once: a slice per expert would make the backward pass fill a whole stack each time
    parts = zip(xs.split(counts), ws.split(counts), gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    y = torch.cat([(_swiglu(x @ gate_up) * w) @ down for x, w, gate_up, down in parts])
    return _in_token_order(y, order, experts_NC.shape)


def _grouped(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Tokens sorted by expert, two grouped matrix products for all experts together."""
    problem = _alignment_problem(gate_up_EDF, down_EFD)
    if problem is not None:
        raise ConfigError(
            "grouped products cannot serve these experts", where="moe_backend", value=problem,
            allowed="dim and expert_dim whose rows are multiples of 16 bytes",
            fix='set moe_backend to "auto"',
        )  # fmt: skip
    xs, ws, order = _in_expert_order(x_ND, experts_NC, weights_NC)
    ends = expert_load(experts_NC, gate_up_EDF.shape[0]).cumsum(0).to(torch.int32)
    hidden = _swiglu(F.grouped_mm(xs, gate_up_EDF, offs=ends)) * ws
    y = F.grouped_mm(hidden, down_EFD, offs=ends)
    return _in_token_order(y, order, experts_NC.shape)


def _alignment_problem(gate_up_EDF: Tensor, down_EFD: Tensor) -> str | None:
    """Why the grouped kernel would refuse these weights, or None."""
    if not hasattr(F, "grouped_mm"):
        return "this PyTorch has no grouped_mm"
    for width in (gate_up_EDF.shape[1], gate_up_EDF.shape[2], down_EFD.shape[1]):
        if width * gate_up_EDF.element_size() % 16:
            return f"a row of {width} {gate_up_EDF.dtype} elements"
    return None


@cache
def _log_once(backend: str) -> None:
    logger.info("expert backend: %s", backend)


_BACKENDS = {"grouped": _grouped, "sorted": _sorted, "reference": _reference}
