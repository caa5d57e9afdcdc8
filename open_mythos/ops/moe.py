"""Routed experts: every token visits its chosen experts, the results are added by weight.

One signature, three ways to compute it. Each expert is a SwiGLU, ``down(silu(gate x) * up x)``, its
gate and up projections stored side by side so that they are one product.

In a loop the same experts serve many calls. Their weight gradients can wait for the last of them
(:class:`LoopedStack`) and become one product over the tokens of all loops.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError

logger = logging.getLogger(__name__)


class LoopedStack:
    """A stack of expert weights whose gradient is computed once for all its uses in a loop.

    Every use would otherwise write a gradient as large as the whole stack. With few tokens per
    expert and loop that costs more than the products themselves; their inputs and output gradients
    are small, so they wait, and one product per expert over the tokens of all loops does the work.
    Exact but for the order of summation.

    Args:
        weight_EKM: (E, K, M) weights that require a gradient.
    """

    def __init__(self, weight_EKM: Tensor) -> None:
        self._uses: list[tuple[Tensor, Tensor, Tensor]] = []
        self.weight: Tensor = _GradientOfAllUses.apply(weight_EKM, self._uses)

    def product(self, x: Tensor, ends_E: Tensor) -> Tensor:
        """(N C, K) rows in expert order times the weights of their experts, (N C, M)."""
        return _DeferredProduct.apply(x, self.weight, ends_E, self._uses)


class _GradientOfAllUses(torch.autograd.Function):
    """The identity; its backward runs after those of all uses and computes their joint gradient."""

    @staticmethod
    def forward(ctx: Any, weight_EKM: Tensor, uses: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight_EKM.view_as(weight_EKM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        assert grad is None, "every use of a looped stack goes through product()"
        uses, ctx.uses[:] = list(ctx.uses), []
        return (_weight_gradient(uses) if uses else None), None


class _DeferredProduct(torch.autograd.Function):
    """A grouped product that leaves its weight gradient to :class:`_GradientOfAllUses`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_EKM: Tensor, ends_E: Tensor, uses: list[Any]) -> Tensor:
        ctx.save_for_backward(x, weight_EKM, ends_E)
        ctx.uses = uses
        return F.grouped_mm(x, weight_EKM, offs=ends_E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight_EKM, ends_E = ctx.saved_tensors
        grad = grad.contiguous()
        ctx.uses.append((x, grad, ends_E))
        return F.grouped_mm(grad, weight_EKM.mT, offs=ends_E), None, None, None


def _weight_gradient(uses: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """(E, K, M): for each expert, the sum over its tokens in all uses of x^T grad."""
    ends = torch.stack([ends_E for _, _, ends_E in uses])
    counts = ends.diff(dim=1, prepend=ends.new_zeros(len(uses), 1))
    if counts.is_cuda:
        experts = torch.arange(counts.shape[1], device=counts.device).repeat(len(uses))
        rows = sum(x.shape[0] for x, _, _ in uses)
        order = experts.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)
        x, grad = (torch.cat([use[i] for use in uses])[order] for i in (0, 1))
        return F.grouped_mm(x.t(), grad, offs=counts.sum(0).cumsum(0).to(torch.int32))
    # on a CPU the rows of one expert stay in the caches, in two buffers that all experts share
    (xs, grads), rows_E = ([use[i] for use in uses] for i in (0, 1)), counts.sum(0).tolist()
    splits = counts.tolist()
    parts = [[rows.split(n) for rows, n in zip(side, splits, strict=True)] for side in (xs, grads)]
    buffers = [side[0].new_empty(max(rows_E), side[0].shape[1]) for side in (xs, grads)]
    total = xs[0].new_empty(len(rows_E), xs[0].shape[1], grads[0].shape[1])
    for expert, rows in enumerate(rows_E):
        x, grad = (buffer[:rows] for buffer in buffers)
        for side, out in zip(parts, (x, grad), strict=True):
            torch.cat([loop[expert] for loop in side], out=out)
        torch.mm(x.t(), grad, out=total[expert])
    return total


DEFERRED_TOKENS = 192
"""Tokens per expert and use up to which deferring pays."""


def deferring_pays(
    n_choices: int, gate_up_EDF: Tensor, down_EFD: Tensor, backend: str = "auto"
) -> bool:
    """Whether a loop should use :class:`LoopedStack` for ``n_choices`` rows: a rule by shape."""
    return (
        n_choices <= DEFERRED_TOKENS * gate_up_EDF.shape[0]
        and torch.is_grad_enabled()
        and gate_up_EDF.requires_grad
        and down_EFD.requires_grad
        and backend in ("auto", "grouped")
        and _grouped_problem(gate_up_EDF, down_EFD) is None
    )


def routed_experts(
    x_ND: Tensor,
    gate_up_EDF: Tensor | LoopedStack,
    down_EFD: Tensor | LoopedStack,
    experts_NC: Tensor,
    weights_NC: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Sum over the C chosen experts of weight times expert output.

    Args:
        x_ND: Tokens.
        gate_up_EDF: (E, D, 2F) gate and up projections.
        down_EFD: (E, F, D) down projections; both may be a :class:`LoopedStack`.
        experts_NC: Chosen experts, int64, distinct within a token.
        weights_NC: Their weights.
        backend: "auto", "grouped", "sorted" or "reference".

    Returns:
        (N, D), in the dtype of the projections.

    Raises:
        ConfigError: Unknown backend, or one that cannot serve these shapes.
    """
    if isinstance(gate_up_EDF, LoopedStack) or isinstance(down_EFD, LoopedStack):
        backend = "grouped"
    elif backend == "auto":
        backend = "grouped" if _grouped_problem(gate_up_EDF, down_EFD) is None else "sorted"
    if backend not in _BACKENDS:
        raise ConfigError(
            "unknown expert backend", where="moe_backend", value=backend,
            allowed=", ".join(("auto", *_BACKENDS)), fix='set moe_backend to "auto"',
        )  # fmt: skip
    _log_once(backend)
    x_ND = x_ND.to(_weight(gate_up_EDF).dtype)
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
    x_ND: Tensor,
    gate_up_EDF: Tensor | LoopedStack,
    down_EFD: Tensor | LoopedStack,
    experts_NC: Tensor,
    weights_NC: Tensor,
) -> Tensor:
    """Tokens sorted by expert, two grouped matrix products for all experts together."""
    problem = _grouped_problem(_weight(gate_up_EDF), _weight(down_EFD))
    if problem is not None:
        raise ConfigError(
            "grouped products cannot serve these experts", where="moe_backend", value=problem,
            allowed="rows of dim and of expert_dim in multiples of 16 bytes, at most 32-bit floats",
            fix='set moe_backend to "auto"',
        )  # fmt: skip
    order, inverse = _expert_order(experts_NC)
    xs = _ToExperts.apply(x_ND, order, inverse)
    ws = _ToExperts.apply(weights_NC.view(-1, 1), order, inverse)
    n_experts = _weight(gate_up_EDF).shape[0]
    ends = expert_load(experts_NC, n_experts).cumsum(0).to(torch.int32)
    hidden = _swiglu(_product(xs, gate_up_EDF, ends)) * ws
    y = _product(hidden, down_EFD, ends)
    return _ToTokens.apply(y, order, inverse, x_ND.shape[0])


def _product(x: Tensor, stack: Tensor | LoopedStack, ends_E: Tensor) -> Tensor:
    if isinstance(stack, LoopedStack):
        return stack.product(x, ends_E)
    return F.grouped_mm(x, stack, offs=ends_E)


def _weight(stack: Tensor | LoopedStack) -> Tensor:
    return stack.weight if isinstance(stack, LoopedStack) else stack


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


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "grouped": _grouped,
    "sorted": _sorted,
    "reference": _reference,
}
