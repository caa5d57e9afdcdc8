"""Routed experts as matmuls over rows sorted by expert.

*Grouped* runs one kernel without a host-device sync; *sorted* runs one matmul per expert and serves
any shape and dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.experts.looped_stack import Rows, defer_gradient, saved_rows
from open_mythos.ops.experts.rows import Call, activated, activated_backward, read_ends


def forward(kind: str, call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """Run the experts on the rows of their tokens.

    Args:
        kind: "grouped" or "sorted".
        call: The operands.
        keep: Whether to return the projections.

    Returns:
        (N C, D) weighted results; (N C, 2F) gate and up projections, or an empty tensor.
    """
    x_ND, gate_up_EDF, down_EFD, token, w, ends_E = call
    matmuls = ExpertMatmuls(ends_E, len(token), kind)
    gate_up = matmuls.multiply(x_ND.index_select(0, token), gate_up_EDF)
    y = matmuls.multiply(activated(gate_up, w), down_EFD)
    return y, gate_up if keep else gate_up.new_empty(0)


def backward(
    kind: str, call: Call, gate_up: Tensor, grad_ND: Tensor, tokens: Sequence[Tensor],
    of_stacks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of :func:`forward`.

    Args:
        kind: "grouped" or "sorted".
        call: The operands.
        gate_up: The projections.
        grad_ND: Gradient of each token's sum of rows.
        tokens: Tokens of the two :class:`LoopedStack` that defer the stacks' gradients, or none.
        of_stacks: Whether the stacks need gradients.

    Returns:
        Gradients of the rows of tokens (N C, D), of ``w``, gate_up_EDF and down_EFD; the last two
        are empty where they are deferred or not needed.
    """
    x_ND, gate_up_EDF, down_EFD, token, w, ends_E = call
    matmuls = ExpertMatmuls(ends_E, len(token), kind)
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
    return matmuls.multiply(d_gate_up, gate_up_EDF.mT), d_w, d_gate_up_stack, d_down


class ExpertMatmuls:
    """Matmuls of ``n_rows`` rows sorted by expert with a stack of one matrix per expert."""

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
