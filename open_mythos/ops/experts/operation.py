"""Routed experts as one operation of PyTorch, with its gradient.

To autograd and to ``torch.compile`` all kinds of product are the same operation. All that is kept
between forward and backward is the result of the first product; the rest is cheaper to compute
again than to keep.
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
    """:func:`open_mythos.ops.experts.grouped.forward` by any of :data:`KINDS`."""
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
    """:func:`forward` as an operation of PyTorch, with a gradient.

    The tokens are those of two :class:`LoopedStack`: the gradients of the stacks then wait.
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
    """:func:`open_mythos.ops.experts.grouped.backward` as an operation, by any of :data:`KINDS`.

    The last result is the gradient of the tokens.

    What it leaves to the last loop is a side effect, so nothing that a compiler may write over must
    be left: only tensors made in here.
    """
    tokens = [each for each in (gate_up_token, down_token) if each is not None]
    call = (
        grad_ND.contiguous(), x_ND, gate_up_EDF, down_EFD, weights_NC, gate_up, order, ends_E,
        tokens,
    )  # fmt: skip
    found = (
        batched.backward(*call, of_stacks)
        if kind == "batched"
        else grouped.backward(*call, kind, of_stacks)
    )
    return *found, torch.zeros((), dtype=torch.float64, device="cpu")


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
    """Return whether the number in ``token`` can be read: not while a compiler traces."""
    return type(token) is Tensor or getattr(token, "constant", None) is not None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, _ = inputs
    _, gate_up, order, ends_E = output
    # checkpointing around the whole call makes other stacks the second time: theirs are not meant
    marks = tensors[5:]
    ctx.numbers = [float(each) for each in marks] if _is_known(marks[0]) else None
    ctx.save_for_backward(*tensors, gate_up, order, ends_E)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_ND: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 9
    x, gate_up_EDF, down, weights, experts, *tokens, gate_up, order, ends = ctx.saved_tensors
    waits = tokens[0] is not None
    if ctx.numbers is not None:
        tokens = [torch.tensor(number, dtype=torch.float64) for number in ctx.numbers]
    if torch.is_grad_enabled():
        return _twice(ctx, grad_ND, x, gate_up_EDF, down, weights, experts, waits)
    wanted = ctx.needs_input_grad
    d_x, d_weights, d_gate_up, d_down, done = experts_backward_op(
        grad_ND, x, gate_up_EDF, down, weights, gate_up, order, ends, *tokens, ctx.kind,
        waits or wanted[1] or wanted[2],
    )  # fmt: skip
    if waits:
        return d_x, None, None, d_weights, None, done, done.clone(), None, None
    return d_x, d_gate_up, d_down, d_weights, None, None, None, None, None


def _twice(
    ctx: Any,
    grad_ND: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    experts: Tensor,
    waits: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again: those of the plain twin."""
    if waits:
        raise ConfigError(
            "experts whose gradients wait for all loops are not differentiated twice",
            where="moe_backend", value="a backward pass with create_graph=True",
            allowed="experts without gradient, or the plain twin",
            fix='set moe_backend to "reference"',
        )  # fmt: skip
    with torch.enable_grad():
        # views: the weights are themselves a function of the tokens, on a way that is not ours
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
    """The plain twin: one expert after the other, on the tokens that chose it."""
    out_ND = torch.zeros_like(x_ND)
    projections = zip(gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    for expert, (gate_up_DF, down_FD) in enumerate(projections):
        token, choice = (experts_NC == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[token] @ gate_up_DF).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down_FD
        out_ND = out_ND.index_add(0, token, y * weights_NC[token, choice].unsqueeze(-1))
    return out_ND
