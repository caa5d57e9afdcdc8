"""Routed experts as one product after another, over tokens sorted by expert.

Each expert's tokens are rows that lie together. *Grouped* products are one kernel and wait for
nothing; *sorted* ones are one product for every expert, of any shape and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.experts.looped_stack import Rows, kept_rows, leave_use
from open_mythos.ops.experts.rows import (
    activated,
    activated_backward,
    read_ends,
    sort_choices,
    to_tokens,
)


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
        kind: "grouped" or "sorted".
        keep: Whether a backward pass follows.

    Returns:
        (N, D) results; (N C, 2F) results of the first product in the order of the experts, empty
        unless kept; (N C,) choices in that order; (E,) int32 where each expert's choices end.
    """
    top_k, (order, ends_E) = experts_NC.shape[1], sort_choices(experts_NC, gate_up_EDF.shape[0])
    multiply = Products(ends_E, len(order), kind)
    gate_up = multiply.forward(x_ND.index_select(0, order // top_k), gate_up_EDF)
    hidden = activated(gate_up, weights_NC.reshape(-1, 1).index_select(0, order))
    gate_up = gate_up if keep else gate_up.new_empty(0)
    return to_tokens(multiply.forward(hidden, down_EFD), order, top_k), gate_up, order, ends_E


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
    top_k, multiply = weights_NC.shape[1], Products(ends_E, len(order), kind)
    token, w = order // top_k, weights_NC.reshape(-1, 1).index_select(0, order)
    grad = grad_ND.index_select(0, token)
    d_hidden = multiply.backward(grad, down_EFD)
    hidden, d_gate_up, d_w = activated_backward(d_hidden, gate_up, w)
    d_down, d_gate_up_stack = x_ND.new_empty(0), x_ND.new_empty(0)
    if tokens:
        leave_use(tokens[1], Rows(hidden), kept_rows(grad_ND, token), ends_E)
    elif of_stacks:
        d_down = multiply.weights(hidden, grad)
    del d_hidden, hidden, grad
    if tokens:
        leave_use(tokens[0], kept_rows(x_ND, token), Rows(d_gate_up), ends_E)
    elif of_stacks:
        d_gate_up_stack = multiply.weights(x_ND.index_select(0, token), d_gate_up)
    d_x_ND = to_tokens(multiply.backward(d_gate_up, gate_up_EDF), order, top_k)
    d_weights_NC = torch.empty_like(d_w).index_copy_(0, order, d_w).view_as(weights_NC)
    return d_x_ND, d_weights_NC, d_gate_up_stack, d_down


class Products:
    """Products of rows, sorted by expert, with a stack of one matrix for each.

    Args:
        ends_E: (E,) int32 where each expert's rows end.
        n_rows: Rows of all experts.
        kind: "grouped" or "sorted".
    """

    def __init__(self, ends_E: Tensor, n_rows: int, kind: str) -> None:
        self._ends_E, self._grouped = ends_E, kind == "grouped"
        ends = [] if self._grouped else read_ends(ends_E, n_rows)
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
