"""Weight gradients that wait for the last use of the weights, and are computed once.

Every use of a stack of experts in a loop would otherwise write a gradient as large as the whole
stack. With few tokens per expert and loop that costs more than the products themselves; their
inputs and output gradients are small, so they wait, and one product per expert over the tokens of
all loops does the work. Exact but for the order of summation.

What waits stays within bounds, however many loops there are: once it is :data:`WAITING` times as
large as the stack, products are long enough, and its part of the gradient is computed.
"""

from __future__ import annotations

from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.experts.rows import padded
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves

WAITING = 4
"""Elements that may wait for a stack, in units of its own."""


class LoopedStack:
    """A stack of expert weights whose gradient is computed once for all its uses in a loop.

    Attributes:
        weight: The weights, without gradient: products read them.
        token: A scalar through which autograd knows of the uses. It is a result of the weights and
            an operand of every use, so its backward runs after theirs. Its value names the list of
            the uses: a tensor, unlike a list, goes through a compiled graph, and is not part of it.

    Args:
        weight_EKM: (E, K, M) weights that require a gradient.
    """

    def __init__(self, weight_EKM: Tensor) -> None:
        self.token = _new_token(weight_EKM)
        self.weight = weight_EKM.detach()


@torch.compiler.disable  # what a graph makes once would be the same number in every call
def _new_token(weight_EKM: Tensor) -> Tensor:
    token: Tensor = _GradientOfAllUses.apply(weight_EKM, _Uses(weight_EKM.numel()))
    return token


class _Uses:
    """Operand, gradient of the result, and ends of the experts' rows, of each use."""

    def __init__(self, size: int) -> None:
        self.number, self._most = next(_numbers), WAITING * size
        self._task = -1
        self._total: Tensor | None = None
        self._left: list[list[Tensor]] = []
        _alive[self.number] = self

    def leave(self, use: list[Tensor]) -> None:
        """Add one use of the backward pass under way."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # one that did not come to its end may have left some of its own
            self._task, self._total, self._left = task, None, []
        self._left.append(use)
        if sum(x.numel() + grad.numel() for x, grad, _ in self._left) >= self._most:
            self._add_up()

    def take(self) -> Tensor | None:
        """The gradient of all uses that the backward pass under way has left."""
        if torch._C._current_graph_task_id() != self._task:
            return None
        if self._left:
            self._add_up()
        total, self._task, self._total = self._total, -1, None
        return total

    def _add_up(self) -> None:
        uses, self._left = self._left, []
        gradient = weight_gradient(uses)
        self._total = gradient if self._total is None else self._total.add_(gradient)


_numbers = count()
_alive: WeakValueDictionary[int, _Uses] = WeakValueDictionary()
"""Number -> uses, as long as the graph that will take them exists."""


class _GradientOfAllUses(torch.autograd.Function):
    """The token of a stack; its backward runs after those of all uses."""

    @staticmethod
    def forward(ctx: Any, weight_EKM: Tensor, uses: _Uses) -> Tensor:
        ctx.uses = uses
        return torch.tensor(float(uses.number), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.uses.take(), None


def leave_use(token: Tensor, x: Tensor, grad: Tensor, ends_E: Tensor) -> None:
    """Leave one use's part of the gradient to the stack of ``token``.

    Args:
        token: Of the stack.
        x: (N C, K) operand of the product, rows in the order of the experts.
        grad: (N C, M) gradient of its result.
        ends_E: Where the rows of each expert end.
    """
    _alive[int(token)].leave([x, grad, ends_E])


def weight_gradient(uses: list[list[Tensor]]) -> Tensor:
    """(E, K, M): for each expert, the sum over its tokens in all uses of x^T grad.

    Args:
        uses: Operand, gradient of the result and ends of the experts' rows, of each.
    """
    xs, grads, all_ends = ([use[i] for use in uses] for i in range(3))
    if kernel_serves(xs, grads):
        return grouped_weight_gradient(xs, grads, all_ends)
    ends = torch.stack(all_ends)
    counts = ends.diff(dim=1, prepend=ends.new_zeros(len(uses), 1))
    if counts.is_cuda:
        experts = torch.arange(counts.shape[1], device=counts.device).repeat(len(uses))
        rows = sum(x.shape[0] for x in xs)
        order = experts.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)
        x, grad = (torch.cat(side)[order] for side in (xs, grads))
        return F.grouped_mm(x.t(), grad, offs=counts.sum(0).cumsum(0).to(torch.int32))
    # on a CPU the rows of one expert stay in the caches, in two buffers that all experts share; of
    # a few lengths, because a bfloat16 product of a new one is compiled first
    rows_E, splits = counts.sum(0).tolist(), counts.tolist()
    parts = [[rows.split(n) for rows, n in zip(side, splits, strict=True)] for side in (xs, grads)]
    padded_E = [padded(rows) for rows in rows_E]
    buffers = [side[0].new_empty(max(padded_E), side[0].shape[1]) for side in (xs, grads)]
    total = xs[0].new_empty(len(rows_E), xs[0].shape[1], grads[0].shape[1])
    for expert, rows in enumerate(rows_E):
        x, grad = (buffer[: padded_E[expert]] for buffer in buffers)
        for side, out in zip(parts, (x, grad), strict=True):
            torch.cat([loop[expert] for loop in side], out=out[:rows])
            out[rows:] = 0
        torch.mm(x.t(), grad, out=total[expert])
    return total
