"""Deferred weight gradients of a stack of experts: computed once, after its last use in a loop.

Otherwise every use in the loop would write a gradient as large as the whole stack, which with few
tokens per expert and loop costs more than the matmuls themselves. The inputs and output gradients
are small: they are saved, and one matmul per expert over the tokens of all loops computes the
gradient. Exact up to the order of summation.

Memory is bounded for any number of loops: once the saved rows hold :data:`DEFERRED_SIZE` times as
many elements as the stack, their part of the gradient is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.devices import kernel_device, uncompiled
from open_mythos.ops.experts.rows import padded, read_ends
from open_mythos.ops.experts.weight_gradient import grouped_weight_gradient, kernel_serves

DEFERRED_SIZE = 4
"""Most saved elements of deferred gradients, relative to the stack."""


@dataclass(frozen=True)
class Rows:
    """Rows in expert order: a tensor, or on a CPU rows ``which`` of a shorter one."""

    of: Tensor
    which: Tensor | None = None

    def write(self, start: int, stop: int, out: Tensor) -> None:
        """Write rows ``start`` to ``stop`` to ``out``."""
        if self.which is None:
            out.copy_(self.of[start:stop])
        else:
            torch.index_select(self.of, 0, self.which[start:stop], out=out)


@dataclass(frozen=True)
class Use:
    """Operands of the weight gradient of one use of a stack."""

    x: Rows
    """(N C, K) operand of the matmul."""
    grad: Rows
    """(N C, M) gradient of its result."""
    ends_E: Tensor

    @property
    def n_rows(self) -> int:
        """Number of rows of all experts."""
        return len(self.x.of if self.x.which is None else self.x.which)

    @property
    def size(self) -> int:
        """Number of saved elements."""
        return self.x.of.numel() + self.grad.of.numel()


class LoopedStack:
    """A stack of expert weights whose gradient is computed once for all its uses in a loop.

    Attributes:
        weight: The weights, detached; matmuls read them.
        token: A scalar that links the uses in autograd. It is computed from the weights and is an
            operand of every use, so its backward runs after theirs. Its value identifies the list
            of uses: a tensor, unlike a list, passes through a compiled graph.

    Args:
        weight_EKM: (E, K, M) weights that require a gradient.
        computed: The same in the matmul dtype, if that differs. The gradient is accumulated in the
            dtype of ``weight_EKM``; on a CPU, the whole gradient never exists in the lower one.
    """

    def __init__(self, weight_EKM: Tensor, computed: Tensor | None = None) -> None:
        self.token = _new_token(weight_EKM)
        self.weight = (weight_EKM if computed is None else computed).detach()


@uncompiled  # a graph would bake the number in as a constant
def _new_token(weight_EKM: Tensor) -> Tensor:
    return _DeferredGradient.apply(weight_EKM, _Uses(weight_EKM.numel(), weight_EKM.dtype))


class _Uses:
    """Uses of a stack in the current backward pass, and the gradient accumulated so far."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.number, self._limit, self._dtype = next(_numbers), DEFERRED_SIZE * size, dtype
        self._task = -1
        self._total: Tensor | None = None
        self._saved: list[Use] = []
        _alive[self.number] = self

    def add(self, use: Use) -> None:
        """Save one use in the current backward pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task:  # drop what an interrupted backward pass saved
            self._task, self._total, self._saved = task, None, []
        self._saved.append(use)
        if sum(each.size for each in self._saved) >= self._limit:
            self._accumulate()

    def take(self) -> Tensor | None:
        """Return the gradient of all uses in the current backward pass, and reset."""
        if torch._C._current_graph_task_id() != self._task:
            return None
        if self._saved:
            self._accumulate()
        total, self._task, self._total = self._total, -1, None
        return total

    def _accumulate(self) -> None:
        uses, self._saved = self._saved, []
        gradient = weight_gradient(uses, self._dtype)
        if self._total is None:
            self._total = gradient.to(self._dtype)
        else:
            self._total.add_(gradient)


_numbers = count()
_alive: WeakValueDictionary[int, _Uses] = WeakValueDictionary()
"""Number -> uses, for the lifetime of the autograd graph that takes them."""


class _DeferredGradient(torch.autograd.Function):
    """The token of a stack; its backward runs after those of all uses."""

    @staticmethod
    def forward(ctx: Any, weight_EKM: Tensor, uses: _Uses) -> Tensor:
        ctx.uses = uses
        return torch.tensor(float(uses.number), dtype=torch.float64)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.uses.take(), None


def defer_gradient(token: Tensor, x: Rows, grad: Rows, ends_E: Tensor) -> None:
    """Defer x^T grad of each expert to the backward of ``token``, of a :class:`LoopedStack`."""
    _alive[int(token)].add(Use(x, grad, ends_E.clone()))  # cloned: an operand of the caller


def saved_rows(x_ND: Tensor, which: Tensor) -> Rows:
    """Copy rows ``which`` of ``x_ND`` for :func:`defer_gradient`.

    A CPU copies ``x_ND`` (which a compiler may overwrite) and gathers expert by expert later: each
    token is saved once, not once per chosen expert.
    """
    if kernel_device(x_ND) == "cpu":
        return Rows(x_ND.clone(), which)
    return Rows(x_ND.index_select(0, which))


def weight_gradient(uses: list[Use], dtype: torch.dtype) -> Tensor:
    """Sum x^T grad over each expert's rows in all uses; returns (E, K, M).

    In ``dtype`` on a CPU, expert by expert; in the dtype of the uses on a GPU.
    """
    if kernel_device(uses[0].ends_E) == "cuda":
        return _on_gpu(uses)
    ends = [[0, *read_ends(use.ends_E, use.n_rows)] for use in uses]
    rows_E = [sum(each[i + 1] - each[i] for each in ends) for i in range(len(ends[0]) - 1)]
    # the rows of one expert stay in cache, in two buffers that all experts share; in bfloat16 they
    # are padded to few lengths, because each new matmul shape is compiled first
    half = uses[0].x.of.dtype == torch.bfloat16
    padded_E = [padded(rows) for rows in rows_E] if half else rows_E
    widths = uses[0].x.of.shape[1], uses[0].grad.of.shape[1]
    x, grad = (uses[0].x.of.new_empty(max(padded_E), width) for width in widths)
    total = x.new_empty(len(rows_E), *widths, dtype=dtype)
    buffer = None if dtype == x.dtype else x.new_empty(widths)
    for expert, rows in enumerate(padded_E):
        done = 0
        for use, starts in zip(uses, ends, strict=True):
            start, stop = starts[expert : expert + 2]
            done, begin = done + stop - start, done
            use.x.write(start, stop, x[begin:done])
            use.grad.write(start, stop, grad[begin:done])
        x[done:rows], grad[done:rows] = 0, 0
        if buffer is None:
            torch.mm(x[:rows].t(), grad[:rows], out=total[expert])
        else:
            total[expert] = torch.mm(x[:rows].t(), grad[:rows], out=buffer)
    return total


def _on_gpu(uses: list[Use]) -> Tensor:
    """Run one kernel without a host-device sync."""
    xs, grads = [use.x.of for use in uses], [use.grad.of for use in uses]
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
