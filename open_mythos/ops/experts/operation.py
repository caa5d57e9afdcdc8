"""Routed experts as one custom op with its gradient, for autograd and ``torch.compile``.

Only the gate and up projections are saved for the backward pass; the rest is cheaper to recompute
than to store.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.experts import batched, grouped

KINDS = ("batched", "grouped", "sorted")


def forward(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    experts_NC: Tensor,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`open_mythos.ops.experts.grouped.forward` by any of :data:`KINDS`."""
    call = x_ND, gate_up_EDF, down_EFD, weights_NC, experts_NC
    if kind == "batched":
        return batched.forward(*call, keep)
    return grouped.forward(*call, kind, keep)


@torch.library.custom_op("open_mythos::experts", mutates_args=())
def experts_op(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    experts_NC: Tensor,
    gate_up_token: Tensor | None,
    down_token: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`forward` as a differentiable custom op.

    With the tokens of two :class:`LoopedStack`, the gradients of the stacks are deferred.
    """
    return forward(x_ND, gate_up_EDF, down_EFD, weights_NC, experts_NC, kind, keep)


@experts_op.register_fake
def _(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    experts_NC: Tensor,
    gate_up_token: Tensor | None,
    down_token: Tensor | None,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_rows, (n_experts, _, width) = experts_NC.numel(), gate_up_EDF.shape
    gate_up = x_ND.new_empty(n_rows, width) if keep else x_ND.new_empty(0)
    order = experts_NC.new_empty(n_rows)
    return torch.empty_like(x_ND), gate_up, order, order.new_empty(n_experts, dtype=torch.int32)


@torch.library.custom_op("open_mythos::experts_backward", mutates_args=())
def experts_backward_op(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    gate_up: Tensor,
    order: Tensor,
    ends_E: Tensor,
    gate_up_token: Tensor | None,
    down_token: Tensor | None,
    kind: str,
    of_stacks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run :func:`open_mythos.ops.experts.grouped.backward` by any of :data:`KINDS`, as a custom op.

    Its last result is the gradient of the tokens. Deferring gradients is a side effect: a compiler
    may overwrite the operands, so only tensors allocated in here may be saved.
    """
    tokens = [each for each in (gate_up_token, down_token) if each is not None]
    call = (
        grad_ND.contiguous(), x_ND, gate_up_EDF, down_EFD, weights_NC, gate_up, order, ends_E,
        tokens,
    )  # fmt: skip
    grads = (
        batched.backward(*call, of_stacks)
        if kind == "batched"
        else grouped.backward(*call, kind, of_stacks)
    )
    return *grads, torch.zeros((), dtype=torch.float64, device="cpu")


@experts_backward_op.register_fake
def _(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    gate_up: Tensor,
    order: Tensor,
    ends_E: Tensor,
    gate_up_token: Tensor | None,
    down_token: Tensor | None,
    kind: str,
    of_stacks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    now = of_stacks and gate_up_token is None
    d_gate_up, d_down = (
        each.new_empty(each.shape if now else (0,)) for each in (gate_up_EDF, down_EFD)
    )
    done = torch.zeros((), dtype=torch.float64, device="cpu")
    d_x, d_weights = (each.new_empty(each.shape) for each in (x_ND, weights_NC))
    return d_x, d_weights, d_gate_up, d_down, done


def _is_known(token: Tensor | None) -> bool:
    """Return whether the value of ``token`` can be read: not while a compiler traces."""
    return type(token) is Tensor or getattr(token, "constant", None) is not None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, _ = inputs
    _, gate_up, order, ends_E = output
    # activation checkpointing creates new stacks when it recomputes: keep the original numbers
    tokens = tensors[5:]
    ctx.numbers = [float(each) for each in tokens] if _is_known(tokens[0]) else None
    ctx.save_for_backward(*tensors, gate_up, order, ends_E)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_ND: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 9
    x, gate_up_EDF, down, weights, experts, *tokens, gate_up, order, ends = ctx.saved_tensors
    deferred = tokens[0] is not None
    if ctx.numbers is not None:
        tokens = [torch.tensor(number, dtype=torch.float64) for number in ctx.numbers]
    if torch.is_grad_enabled():
        return _differentiable_gradients(
            ctx, grad_ND, x, gate_up_EDF, down, weights, experts, deferred
        )
    wanted = ctx.needs_input_grad
    d_x, d_weights, d_gate_up, d_down, done = experts_backward_op(
        grad_ND, x, gate_up_EDF, down, weights, gate_up, order, ends, *tokens, ctx.kind,
        deferred or wanted[1] or wanted[2],
    )  # fmt: skip
    if deferred:
        return d_x, None, None, d_weights, None, done, done.clone(), None, None
    return d_x, d_gate_up, d_down, d_weights, None, None, None, None, None


def _differentiable_gradients(
    ctx: Any,
    grad_ND: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    deferred: bool,
) -> tuple[Tensor | None, ...]:
    """Return gradients that can be differentiated twice: those of the reference implementation."""
    if deferred:
        raise ConfigError(
            "experts with deferred gradients cannot be differentiated twice",
            where="moe_backend", value="a backward pass with create_graph=True",
            allowed="experts without gradient, or the reference implementation",
            fix='set moe_backend to "reference"',
        )  # fmt: skip
    with torch.enable_grad():
        # views: the routing weights depend on the tokens too, outside of this op
        x, gate_up, down, weights = (each.view_as(each) for each in (x, gate_up, down, weights))
        y_ND = reference(x, gate_up, down, experts, weights)
        inputs = (x, gate_up, down, weights)
    wanted = [each for each, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y_ND, wanted, grad_ND, create_graph=True))
    grads = [next(found) if needed else None for needed in ctx.needs_input_grad[:4]]
    return (*grads, None, None, None, None, None)


experts_op.register_autograd(_gradients, setup_context=_setup)


def reference(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Reference implementation: expert by expert, on the tokens that chose it."""
    out_ND = torch.zeros_like(x_ND)
    projections = zip(gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    for expert, (gate_up_DF, down_FD) in enumerate(projections):
        token, choice = (experts_NC == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[token] @ gate_up_DF).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down_FD
        out_ND = out_ND.index_add(0, token, y * weights_NC[token, choice].unsqueeze(-1))
    return out_ND
