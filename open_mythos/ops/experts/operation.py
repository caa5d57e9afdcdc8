"""Routed experts as one custom op with its gradient, for autograd and ``torch.compile``.

Tokens are sorted by expert, so that each expert's rows are adjacent. Only the gate and up
projections are saved for the backward pass; the rest is cheaper to recompute than to store.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.devices import is_transformed
from open_mythos.errors import ConfigError
from open_mythos.ops.experts import batched, grouped, tiles
from open_mythos.ops.experts.rows import Call, sort_choices, to_tokens

KINDS = ("batched", "grouped", "sorted", "tiles")


def forward(
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
    """Compute the weighted sum of each token's experts, without autograd.

    Args:
        x_ND: Tokens, in the dtype of the projections, like the weights.
        gate_up_EDF: (E, D, 2F).
        down_EFD: (E, F, D).
        weights_NC: Weight of each choice.
        experts_NC: Chosen experts, int64.
        gate_up_token: Token of the :class:`LoopedStack` that defers the gradient of
            ``gate_up_EDF``, or None.
        down_token: The same of ``down_EFD``.
        kind: One of :data:`KINDS`.
        keep: Whether a backward pass follows; "tiles" has none.

    Returns:
        (N, D) results; (N C, 2F) gate and up projections in expert order, empty unless kept; (N C,)
        choices in that order; (E,) int32 end of each expert's choices.
    """
    top_k, (order, ends_E) = experts_NC.shape[1], sort_choices(experts_NC, gate_up_EDF.shape[0])
    w = weights_NC.reshape(-1, 1).index_select(0, order)
    call = Call(x_ND, gate_up_EDF, down_EFD, order // top_k, w, ends_E)
    if kind == "tiles":
        y, gate_up = tiles.forward(call), x_ND.new_empty(0)
    else:
        run = batched.forward if kind == "batched" else partial(grouped.forward, kind)
        y, gate_up = run(call, keep)
    return to_tokens(y, order, top_k), gate_up, order, ends_E


experts_op = torch.library.custom_op("open_mythos::experts", forward, mutates_args=())
"""The same as a differentiable custom op."""


@experts_op.register_fake
def _(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_NC: Tensor, experts_NC: Tensor,
    gate_up_token: Tensor | None, down_token: Tensor | None, kind: str, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n_rows, (n_experts, _, width) = experts_NC.numel(), gate_up_EDF.shape
    gate_up = x_ND.new_empty(n_rows, width) if keep else x_ND.new_empty(0)
    order = experts_NC.new_empty(n_rows)
    return torch.empty_like(x_ND), gate_up, order, order.new_empty(n_experts, dtype=torch.int32)


def backward(
    grad_ND: Tensor, saved: Sequence[Tensor], tokens: Sequence[Tensor], kind: str, of_stacks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of :func:`forward`.

    Deferring gradients is a side effect: a compiler may overwrite the operands, so only tensors
    allocated in here may be saved.

    Args:
        grad_ND: Gradient of its first result.
        saved: Its first four arguments and last three results.
        tokens: Tokens of the two :class:`LoopedStack` that defer the stacks' gradients, or none.
        kind: One of :data:`KINDS`.
        of_stacks: Whether the stacks need gradients.

    Returns:
        Gradients of tokens (N, D), weights (N, C), gate_up_EDF and down_EFD, the last two empty
        where they are deferred or not needed; gradient of the stacks' tokens.
    """
    x_ND, gate_up_EDF, down_EFD, weights_NC, gate_up, order, ends_E = saved
    top_k = weights_NC.shape[1]
    w = weights_NC.reshape(-1, 1).index_select(0, order)
    call = Call(x_ND, gate_up_EDF, down_EFD, order // top_k, w, ends_E)
    run = batched.backward if kind == "batched" else partial(grouped.backward, kind)
    d_x, d_w, d_gate_up_EDF, d_down_EFD = run(
        call, gate_up, grad_ND.contiguous(), tokens, of_stacks
    )
    d_weights_NC = torch.empty_like(d_w).index_copy_(0, order, d_w).view_as(weights_NC)
    done = torch.zeros((), dtype=torch.float64, device="cpu")
    return to_tokens(d_x, order, top_k), d_weights_NC, d_gate_up_EDF, d_down_EFD, done


backward_op = torch.library.custom_op("open_mythos::experts_backward", backward, mutates_args=())
"""The same as a custom op."""


@backward_op.register_fake
def _(
    grad_ND: Tensor, saved: Sequence[Tensor], tokens: Sequence[Tensor], kind: str, of_stacks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_ND, gate_up_EDF, down_EFD, weights_NC, *_ = saved
    now = of_stacks and not tokens
    d_gate_up, d_down = (
        each.new_empty(each.shape if now else (0,)) for each in (gate_up_EDF, down_EFD)
    )
    done = torch.zeros((), dtype=torch.float64, device="cpu")
    d_x, d_weights = (each.new_empty(each.shape) for each in (x_ND, weights_NC))
    return d_x, d_weights, d_gate_up, d_down, done


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *operands, experts_NC, gate_up_token, down_token, ctx.kind, _ = inputs
    tokens = gate_up_token, down_token
    # activation checkpointing creates new stacks when it recomputes: keep the original numbers,
    # which cannot be read while a compiler traces
    readable = type(tokens[0]) is Tensor or getattr(tokens[0], "constant", None) is not None
    ctx.numbers = [float(each) for each in tokens] if readable else None
    ctx.save_for_backward(experts_NC, *tokens, *operands, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_ND: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 9
    experts_NC, gate_up_token, down_token, *saved = ctx.saved_tensors  # may be read only once
    tokens = [each for each in (gate_up_token, down_token) if each is not None]
    needed = ctx.needs_input_grad
    if torch.is_grad_enabled():
        if tokens:
            raise ConfigError(
                "experts with deferred gradients cannot be differentiated twice",
                where="moe_backend", value="a backward pass with create_graph=True",
                allowed="experts without gradient, or the reference implementation",
                fix='set moe_backend to "reference"',
            )  # fmt: skip
        return *_differentiable_gradients(grad_ND, saved[:4], experts_NC, needed), *(None,) * 5
    if ctx.numbers is not None:
        tokens = [torch.tensor(number, dtype=torch.float64) for number in ctx.numbers]
    of_stacks = bool(tokens) or needed[1] or needed[2]
    d_x, d_weights, d_gate_up, d_down, done = backward_op(
        grad_ND, saved, tokens, ctx.kind, of_stacks
    )
    if tokens:
        return d_x, None, None, d_weights, None, done, done.clone(), None, None
    return d_x, d_gate_up, d_down, d_weights, None, None, None, None, None


def _differentiable_gradients(
    grad_ND: Tensor, operands: Sequence[Tensor], experts_NC: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return gradients that can be differentiated twice: those of the reference implementation."""
    with torch.enable_grad():
        # views: the routing weights depend on the tokens too, outside of this op
        inputs = x, gate_up, down, weights = [each.view_as(each) for each in operands]
        y_ND = reference(x, gate_up, down, experts_NC, weights)
    wanted = [each for each, need in zip(inputs, needed, strict=False) if need]
    found = iter(torch.autograd.grad(y_ND, wanted, grad_ND, create_graph=True))
    return [next(found) if need else None for need in needed[:4]]


experts_op.register_autograd(_gradients, setup_context=_setup)


def reference(
    x_ND: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, experts_NC: Tensor, weights_NC: Tensor
) -> Tensor:
    """Reference implementation: expert by expert, on the tokens that chose it.

    In a transform of ``torch.func``, on all tokens: the shapes must not depend on the values.
    """
    if is_transformed():
        share_NE = torch.zeros_like(x_ND[:, :1]).expand(-1, len(down_EFD))
        share_NE = share_NE.scatter_add(1, experts_NC, weights_NC)
        gate, up = torch.einsum("nd,edf->nef", x_ND, gate_up_EDF).chunk(2, dim=-1)
        return torch.einsum("nef,efd,ne->nd", F.silu(gate) * up, down_EFD, share_NE)
    out_ND = torch.zeros_like(x_ND)
    projections = zip(gate_up_EDF.unbind(), down_EFD.unbind(), strict=True)
    for expert, (gate_up_DF, down_FD) in enumerate(projections):
        token, choice = (experts_NC == expert).nonzero(as_tuple=True)
        gate, up = (x_ND[token] @ gate_up_DF).chunk(2, dim=-1)
        y = (F.silu(gate) * up) @ down_FD
        out_ND = out_ND.index_add(0, token, y * weights_NC[token, choice].unsqueeze(-1))
    return out_ND
