"""Weight gradients that wait for the last use of the weights, and are computed once.

Every use of a stack of experts in a loop would otherwise write a gradient as large as the whole
stack. With few tokens per expert and loop that costs more than the products themselves; their
inputs and output gradients are small, so they wait, and one product per expert over the tokens of
all loops does the work. Exact but for the order of summation.

What waits stays within bounds, however many loops there are: once it is :data:`WAITING` times as
large as the stack, products are long enough, and its part of the gradient is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.devices import kernel_device
from open_mythos.ops.experts.rows import read_ends
from open_mythos.ops.experts.sizes import WAITING, padded
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves


@dataclass(frozen=True)
class Rows:
    """Rows in the order of the experts: a tensor, or ``which`` rows of a shorter one."""

    of: Tensor
    which: Tensor | None = None

    def gathered(self) -> Tensor:
        """The rows as one tensor."""
        return self.of if self.which is None else self.of.index_select(0, self.which)

    def write(self, start: int, stop: int, out: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out``."""
        if self.which is None:
            out.copy_(self.of[start:stop])
        else:
            torch.index_select(self.of, 0, self.which[start:stop], out=out)


@dataclass(frozen=True)
class Use:
    """What one use of a stack leaves to its gradient.

    Attributes:
        x: Operand of the product.
        grad: Gradient of its result.
        ends_E: Where the rows of each expert end.
    """

    x: Rows
    grad: Rows
    ends_E: Tensor

    @property
    def n_rows(self) -> int:
        """Rows of all experts."""
        return len(self.x.of if self.x.which is None else self.x.which)

    @property
    def size(self) -> int:
        """Elements that wait."""
        return self.x.of.numel() + self.grad.of.numel()


class LoopedStack:
    """A stack of expert weights whose gradient is computed once for all its uses in a loop.

    Attributes:
        weight: The weights, without gradient: products read them.
        token: A scalar through which autograd knows of the uses. It is a result of the weights and
            an operand of every use, so its backward runs after theirs. Its value names the list of
            the uses: a tensor, unlike a list, goes through a compiled graph, and is not part of it.

    Args:
        weight_EKM: (E, K, M) weights that require a gradient.
        computed: The same in the dtype of products, if that is another. The gradient is added up in
            that of ``weight_EKM``; on a CPU it is never whole in the lower one.
    """

    def __init__(self, weight_EKM: Tensor, computed: Tensor | None = None) -> None:
        self.token = _new_token(weight_EKM)
        self.weight = (weight_EKM if computed is None else computed).detach()


@torch.compiler.disable  # what a graph makes once would be the same number in every call
def _new_token(weight_EKM: Tensor) -> Tensor:
    token: Tensor = _GradientOfAllUses.apply(
        weight_EKM, _Uses(weight_EKM.numel(), weight_EKM.dtype)
    )
    return token


class _Uses:
    """What has been left, by all uses of a stack in the backward pass under way."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.number, self._most, self._dtype = next(_numbers), WAITING * size, dtype
        self._task = -1
        self._total: Tensor | None = None
        self._left: list[Use] = []
        _alive[self.number] = self

    def leave(self, use: Use) -> None:
        """Add one use of the backward pass under way."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # one that did not come to its end may have left some of its own
            self._task, self._total, self._left = task, None, []
        self._left.append(use)
        if sum(each.size for each in self._left) >= self._most:
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
        gradient = weight_gradient(uses, self._dtype)
        if self._total is None:
            self._total = gradient.to(self._dtype)
        else:
            self._total.add_(gradient)


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


def leave_use(token: Tensor, x: Rows, grad: Rows, ends_E: Tensor) -> None:
    """Leave one use's part of the gradient to the stack of ``token``.

    Args:
        token: Of the stack.
        x: (N C, K) operand of the product, rows in the order of the experts.
        grad: (N C, M) gradient of its result.
        ends_E: Where the rows of each expert end.
    """
    # a copy of the ends too, which are an operand
    _alive[int(token)].leave(Use(x, grad, ends_E.clone()))


def kept_rows(x_ND: Tensor, which: Tensor) -> Rows:
    """``which`` rows of ``x_ND``, to be left.

    A CPU gathers them when it adds up, one expert after the other: a token waits once, not once for
    every expert that it chose. It waits as a copy, because a compiler may write over ``x_ND``.
    """
    if kernel_device(x_ND) == "cpu":
        return Rows(x_ND.clone(), which)
    return Rows(x_ND.index_select(0, which))


def weight_gradient(uses: list[Use], dtype: torch.dtype) -> Tensor:
    """(E, K, M): for each expert, the sum over its tokens in all uses of x^T grad.

    In ``dtype`` on a CPU, expert by expert; a GPU's kernels return that of the uses.
    """
    if kernel_device(uses[0].ends_E) == "cuda":
        return _on_gpu(uses)
    ends = [[0, *read_ends(use.ends_E, use.n_rows)] for use in uses]
    rows_E = [sum(each[i + 1] - each[i] for each in ends) for i in range(len(ends[0]) - 1)]
    # the rows of one expert stay in the caches, in two buffers that all experts share; in bfloat16
    # they are of a few lengths, because a product of a new one is compiled first
    half = uses[0].x.of.dtype == torch.bfloat16
    padded_E = [padded(rows) for rows in rows_E] if half else rows_E
    widths = uses[0].x.of.shape[1], uses[0].grad.of.shape[1]
    x, grad = (uses[0].x.of.new_empty(max(padded_E), width) for width in widths)
    total = x.new_empty(len(rows_E), *widths, dtype=dtype)
    product = None if dtype == x.dtype else x.new_empty(widths)
    for expert, rows in enumerate(padded_E):
        done = 0
        for use, starts in zip(uses, ends, strict=True):
            start, stop = starts[expert : expert + 2]
            done, begin = done + stop - start, done
            use.x.write(start, stop, x[begin:done])
            use.grad.write(start, stop, grad[begin:done])
        x[done:rows], grad[done:rows] = 0, 0
        if product is None:
            torch.mm(x[:rows].t(), grad[:rows], out=total[expert])
        else:
            total[expert] = torch.mm(x[:rows].t(), grad[:rows], out=product)
    return total


def _on_gpu(uses: list[Use]) -> Tensor:
    """The same by one kernel, that nothing on the host waits for."""
    xs, grads = [use.x.gathered() for use in uses], [use.grad.gathered() for use in uses]
    all_ends = [use.ends_E for use in uses]
    if kernel_serves(xs, grads):
        return grouped_weight_gradient(xs, grads, all_ends)
    ends = torch.stack(all_ends)
    counts = ends.diff(dim=1, prepend=ends.new_zeros(len(uses), 1))
    experts = torch.arange(counts.shape[1], device=counts.device).repeat(len(uses))
    rows = sum(x.shape[0] for x in xs)
    order = experts.repeat_interleave(counts.flatten(), output_size=rows).argsort(stable=True)
    x, grad = (torch.cat(side)[order] for side in (xs, grads))
    return F.grouped_mm(x.t(), grad, offs=counts.sum(0).cumsum(0).to(torch.int32))
