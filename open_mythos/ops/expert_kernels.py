"""What routed experts compute, forward and backward, and how PyTorch is told of it.

Tokens are sorted by expert, so that each expert's are rows that lie together. Two kinds of product
with all experts: *grouped* is one kernel and waits for nothing; *sorted* is one product after the
other, for every shape and dtype.

Both are one operation to autograd and to ``torch.compile``. All that is kept between forward and
backward is the result of the first product; the rest is cheaper to compute again than to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.errors import ConfigError
from open_mythos.ops.looped_stack import leave_use

KINDS = ("grouped", "sorted")


def forward(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    experts_NC: Tensor,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of each token's experts, by weight; carries no gradient.

    Args:
        x_ND: Tokens, of the dtype of the projections, as are the weights.
        gate_up_EDF: (E, D, 2F).
        down_EFD: (E, F, D).
        weights_NC: Weight of each choice.
        experts_NC: Chosen experts, int64.
        kind: One of :data:`KINDS`.
        keep: Whether a backward pass follows.

    Returns:
        (N, D) results; (N C, 2F) results of the first product in the order of the experts, empty
        unless kept; (N C,) choices in that order; (E,) int32 where each expert's choices end.
    """
    top_k, order = experts_NC.shape[1], experts_NC.flatten().argsort(stable=True)
    ends_E = expert_load(experts_NC, gate_up_EDF.shape[0]).cumsum(0).to(torch.int32)
    multiply = Products(ends_E, kind)
    gate_up = multiply.forward(x_ND.index_select(0, order // top_k), gate_up_EDF)
    hidden = _activated(gate_up, weights_NC.reshape(-1, 1).index_select(0, order))
    gate_up = gate_up if keep else gate_up.new_empty(0)
    return _to_tokens(multiply.forward(hidden, down_EFD), order, top_k), gate_up, order, ends_E


def backward(
    grad_ND: Tensor,
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    gate_up: Tensor,
    order: Tensor,
    ends_E: Tensor,
    tokens: Sequence[Tensor],
    kind: str,
    of_stacks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`forward`.

    Args:
        grad_ND: Gradient of its first result.
        x_ND: As there, and so on.
        gate_up_EDF: As there.
        down_EFD: As there.
        weights_NC: As there.
        gate_up: What it kept.
        order: What it returned.
        ends_E: What it returned.
        tokens: Of the two :class:`LoopedStack` that compute the stacks' gradients later, or none.
        kind: As there.
        of_stacks: Whether the stacks need gradients.

    Returns:
        Gradients of tokens (N, D), weights (N, C), gate_up_EDF and down_EFD; the last two are empty
        where they wait or are not needed.
    """
    top_k, multiply = weights_NC.shape[1], Products(ends_E, kind)
    token, w = order // top_k, weights_NC.reshape(-1, 1).index_select(0, order)
    grad = grad_ND.index_select(0, token)
    d_hidden = multiply.backward(grad, down_EFD)
    hidden, d_gate_up, d_w = _activated_backward(d_hidden, gate_up, w)
    d_down, d_gate_up_stack = x_ND.new_empty(0), x_ND.new_empty(0)
    if tokens:
        leave_use(tokens[1], hidden, grad, ends_E)
    elif of_stacks:
        d_down = multiply.weights(hidden, grad)
    del d_hidden, hidden, grad
    if of_stacks:
        x = x_ND.index_select(0, token)
        if tokens:
            leave_use(tokens[0], x, d_gate_up, ends_E)
        else:
            d_gate_up_stack = multiply.weights(x, d_gate_up)
        del x
    d_x_ND = _to_tokens(multiply.backward(d_gate_up, gate_up_EDF), order, top_k)
    d_weights_NC = torch.empty_like(d_w).index_copy_(0, order, d_w).view_as(weights_NC)
    return d_x_ND, d_weights_NC, d_gate_up_stack, d_down


class Products:
    """Products of rows, sorted by expert, with a stack of one matrix for each.

    Args:
        ends_E: (E,) int32 where each expert's rows end.
        kind: One of :data:`KINDS`.
    """

    def __init__(self, ends_E: Tensor, kind: str) -> None:
        self._ends_E, self._grouped = ends_E, kind == "grouped"
        ends = [] if self._grouped else ends_E.tolist()
        self._rows = [slice(*each) for each in zip([0, *ends], ends, strict=False)]

    def forward(self, x: Tensor, stack_EKM: Tensor) -> Tensor:
        """Rows (N C, K) times their experts' matrices, (N C, M)."""
        if self._grouped:
            return F.grouped_mm(x, stack_EKM, offs=self._ends_E)
        y = x.new_empty(x.shape[0], stack_EKM.shape[2])
        for expert, rows in enumerate(self._rows):
            if rows.start < rows.stop:
                torch.mm(x[rows], stack_EKM[expert], out=y[rows])
        return y

    def backward(self, grad: Tensor, stack_EKM: Tensor) -> Tensor:
        """Rows (N C, M) times their experts' matrices transposed, (N C, K)."""
        return self.forward(grad, stack_EKM.mT)

    def weights(self, x: Tensor, grad: Tensor) -> Tensor:
        """The sum over each expert's rows of x^T grad, (E, K, M)."""
        if self._grouped:
            return F.grouped_mm(x.t(), grad, offs=self._ends_E)
        out = x.new_empty(len(self._rows), x.shape[1], grad.shape[1])
        for expert, rows in enumerate(self._rows):
            torch.mm(x[rows].t(), grad[rows], out=out[expert])
        return out


def expert_load(experts_NC: Tensor, n_experts: int, valid_N: Tensor | None = None) -> Tensor:
    """(E,) float32 count of the tokens that chose each expert; padding is not counted.

    ``bincount`` would wait for the GPU to learn its output size; a scatter does not.
    """
    ones = torch.ones(experts_NC.shape, device=experts_NC.device)
    if valid_N is not None:
        ones = ones * valid_N.unsqueeze(-1)
    load = torch.zeros(n_experts, device=experts_NC.device)
    return load.scatter_add_(0, experts_NC.reshape(-1), ones.reshape(-1))


def _activated(gate_up: Tensor, w: Tensor) -> Tensor:
    """silu(gate) * up * w."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(w)


def _activated_backward(
    d_hidden: Tensor, gate_up: Tensor, w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The result of :func:`_activated` again, and the gradients of its operands.

    ``d_hidden`` is used up.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate_up, silu = torch.empty_like(gate_up), F.silu(gate)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    hidden = silu * up
    torch.mul(d_hidden, hidden, out=d_up)
    d_w = d_up.sum(dim=-1, keepdim=True)
    hidden.mul_(w)
    torch.mul(d_hidden.mul_(w), silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(d_hidden.mul_(up), gate, grad_input=d_gate)
    return hidden, d_gate_up, d_w


def _to_tokens(y: Tensor, order: Tensor, top_k: int) -> Tensor:
    """(N C, D) rows in the order of the experts -> (N, D), the sum of each token's rows.

    Rows are gathered, not scattered: no atomic additions make a result depend on the order of
    threads, and none are waited for.
    """
    inverse = torch.empty_like(order).scatter_(
        0, order, torch.arange(len(order), device=order.device)
    )
    if y.device.type == "cpu" and len(order):
        # the same in one pass; ten times as fast
        return F.embedding_bag(inverse.view(-1, top_k), y, mode="sum")
    return y.index_select(0, inverse).view(-1, top_k, y.shape[-1]).sum(1)


def one_token(
    x_1D: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_1C: Tensor, experts_1C: Tensor
) -> Tensor:
    """:func:`forward` of a single token on a CPU: nothing to sort, and no backward pass."""
    hidden = [
        (F.silu(gate).mul_(up).mul_(weight)) @ down_EFD[expert]
        for expert, weight in zip(experts_1C[0].tolist(), weights_1C[0].unbind(), strict=True)
        for gate, up in [(x_1D @ gate_up_EDF[expert]).chunk(2, dim=-1)]
    ]
    return torch.stack(hidden).sum(0)


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
    """:func:`backward` as an operation; the last result is the gradient of the tokens.

    What it leaves to the last loop is a side effect, so nothing that a compiler may write over must
    be left: only tensors made in here.
    """
    tokens = [each for each in (gate_up_token, down_token) if each is not None]
    found = backward(
        grad_ND.contiguous(), x_ND, gate_up_EDF, down_EFD, weights_NC, gate_up, order, ends_E,
        tokens, kind, of_stacks,
    )  # fmt: skip
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


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.kind, _ = inputs
    _, gate_up, order, ends_E = output
    # checkpointing around the whole call makes other stacks the second time: theirs are not meant
    marks = tensors[5:]
    ctx.numbers = [float(each) for each in marks] if type(marks[0]) is Tensor else None
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
