"""Routed experts as matmuls over tokens sorted by expert, so that each expert's rows are adjacent.

*Grouped* runs one kernel without a host-device sync; *sorted* runs one matmul per expert and serves
any shape and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.experts.looped_stack import Rows, defer_gradient, saved_rows
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
    """Compute the weighted sum of each token's experts, without autograd.

    Args:
        x_ND: Tokens, in the dtype of the projections, like the weights.
        gate_up_EDF: (E, D, 2F).
        down_EFD: (E, F, D).
        weights_NC: Weight of each choice.
        experts_NC: Chosen experts, int64.
        kind: "grouped" or "sorted".
        keep: Whether a backward pass follows.

    Returns:
        (N, D) results; (N C, 2F) gate and up projections in expert order, empty unless kept; (N C,)
        choices in that order; (E,) int32 end of each expert's choices.
    """
    top_k, (order, ends_E) = experts_NC.shape[1], sort_choices(experts_NC, gate_up_EDF.shape[0])
    matmuls = ExpertMatmuls(ends_E, len(order), kind)
    gate_up = matmuls.multiply(x_ND.index_select(0, order // top_k), gate_up_EDF)
    hidden = activated(gate_up, weights_NC.reshape(-1, 1).index_select(0, order))
    gate_up = gate_up if keep else gate_up.new_empty(0)
    return to_tokens(matmuls.multiply(hidden, down_EFD), order, top_k), gate_up, order, ends_E


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
    """Compute the gradients of :func:`forward`, from its arguments and results.

    Args:
        grad_ND: Gradient of its first result.
        tokens: Tokens of the two :class:`LoopedStack` that defer the stacks' gradients, or none.
        of_stacks: Whether the stacks need gradients.

    Returns:
        Gradients of tokens (N, D), weights (N, C), gate_up_EDF and down_EFD; the last two are empty
        where they are deferred or not needed.
    """
    top_k, matmuls = weights_NC.shape[1], ExpertMatmuls(ends_E, len(order), kind)
    token, w = order // top_k, weights_NC.reshape(-1, 1).index_select(0, order)
    grad = grad_ND.index_select(0, token)
    d_hidden = matmuls.multiply(grad, down_EFD.mT)
    hidden, d_gate_up, d_w = activated_backward(d_hidden, gate_up, w)
    d_down, d_gate_up_stack = x_ND.new_empty(0), x_ND.new_empty(0)
    if tokens:
        defer_gradient(tokens[1], Rows(hidden), saved_rows(grad_ND, token), ends_E)
    elif of_stacks:
        d_down = matmuls.weight_gradient(hidden, grad)
    del d_hidden, hidden, grad
    if tokens:
        defer_gradient(tokens[0], saved_rows(x_ND, token), Rows(d_gate_up), ends_E)
    elif of_stacks:
        d_gate_up_stack = matmuls.weight_gradient(x_ND.index_select(0, token), d_gate_up)
    d_x_ND = to_tokens(matmuls.multiply(d_gate_up, gate_up_EDF.mT), order, top_k)
    d_weights_NC = torch.empty_like(d_w).index_copy_(0, order, d_w).view_as(weights_NC)
    return d_x_ND, d_weights_NC, d_gate_up_stack, d_down


class ExpertMatmuls:
    """Matmuls of rows sorted by expert with a stack of one matrix per expert.

    Args:
        ends_E: (E,) int32 end of each expert's rows.
        n_rows: Rows of all experts.
        kind: "grouped" or "sorted".
    """

    def __init__(self, ends_E: Tensor, n_rows: int, kind: str) -> None:
        self._ends_E, self._grouped = ends_E, kind == "grouped"
        ends = [] if self._grouped else read_ends(ends_E, n_rows)
        self._rows = [slice(*each) for each in zip([0, *ends], ends, strict=False)]

    def multiply(self, x: Tensor, stack_EKM: Tensor) -> Tensor:
        """Multiply rows (N C, K) by their experts' matrices; returns (N C, M)."""
        if self._grouped:
            return F.grouped_mm(x, stack_EKM, offs=self._ends_E)
        y = x.new_empty(x.shape[0], stack_EKM.shape[2])
        for expert, rows in enumerate(self._rows):
            if rows.start < rows.stop:
                torch.mm(x[rows], stack_EKM[expert], out=y[rows])
        return y

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Compute x^T grad over each expert's rows, (E, K, M)."""
        if self._grouped:
            return F.grouped_mm(x.t(), grad, offs=self._ends_E)
        out = x.new_empty(len(self._rows), x.shape[1], grad.shape[1])
        for expert, rows in enumerate(self._rows):
            torch.mm(x[rows].t(), grad[rows], out=out[expert])
        return out


def one_token(
    x_1D: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, weights_1C: Tensor, experts_1C: Tensor
) -> Tensor:
    """Run :func:`forward` for one token on a CPU: no sorting, no backward pass."""
    hidden = [
        (F.silu(gate).mul_(up).mul_(weight)) @ down_EFD[expert]
        for expert, weight in zip(experts_1C[0].tolist(), weights_1C[0].unbind(), strict=True)
        for gate, up in [(x_1D @ gate_up_EDF[expert]).chunk(2, dim=-1)]
    ]
    return torch.stack(hidden).sum(0)
