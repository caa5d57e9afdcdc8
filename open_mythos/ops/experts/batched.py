"""Routed experts on a CPU: neighboring experts with similar row counts share a batched matmul.

One matmul per expert pays twice for each: about fifty microseconds of call in one thread, and in
bfloat16 the compilation of a kernel for every new number of rows. That takes milliseconds and is
the rule in training, where every loop of every step routes differently. Padding rows to few sizes
and batching several experts per matmul avoids both.

Each batch runs through all stages before the next is gathered: its rows stay in cache, and only
the results are as long as all choices together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.ops.experts.looped_stack import Rows, defer_gradient, saved_rows
from open_mythos.ops.experts.rows import Call, activated, activated_backward, padded, read_ends

ROWS = 2048
"""Most padded rows of a batch of several experts."""
PADDING = 1.5
"""Most rows of a batch, relative to the padded rows of its experts in separate batches."""
MOST = 64
"""Most experts of a batch; a power of two, so that batches have few sizes."""


def forward(call: Call, keep: bool) -> tuple[Tensor, Tensor]:
    """Compute the same as :func:`open_mythos.ops.experts.grouped.forward`."""
    x_ND, gate_up_EDF, down_EFD, token, w, ends_E = call
    gate_up = x_ND.new_empty((len(token), gate_up_EDF.shape[2]) if keep else 0)
    y = x_ND.new_empty(len(token), x_ND.shape[1])
    for batch in batches(ends_E, len(token)):
        x = x_ND.index_select(0, token.index_select(0, batch.source))
        projected = batch.multiply(x, gate_up_EDF)
        if keep:
            batch.unpad(projected, gate_up)
        hidden = activated(projected, w.index_select(0, batch.source))
        batch.unpad(batch.multiply(hidden, down_EFD), y)
    return y, gate_up


def backward(
    call: Call, gate_up: Tensor, grad_ND: Tensor, tokens: Sequence[Tensor], of_stacks: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the same as :func:`open_mythos.ops.experts.grouped.backward`."""
    x_ND, gate_up_EDF, down_EFD, token, w, ends_E = call
    now = of_stacks and not tokens
    rows, d_w = x_ND.new_empty(len(token), x_ND.shape[1]), torch.empty_like(w)
    d_gate_up_EDF, d_down_EFD = (
        each.new_empty(each.shape if now else 0) for each in (gate_up_EDF, down_EFD)
    )
    if tokens:
        all_d_gate_up = torch.empty_like(gate_up)
        all_hidden = gate_up.new_empty(len(token), down_EFD.shape[1])
    for batch in batches(ends_E, len(token)):
        source = token.index_select(0, batch.source)
        grad = grad_ND.index_select(0, source)
        hidden, d_gate_up, d_rows_w = activated_backward(
            batch.multiply(grad, down_EFD.mT),
            gate_up.index_select(0, batch.source),
            w.index_select(0, batch.source),
        )
        batch.unpad(d_rows_w, d_w)
        batch.unpad(batch.multiply(d_gate_up, gate_up_EDF.mT), rows)
        if tokens:
            batch.unpad(hidden, all_hidden)
            batch.unpad(d_gate_up, all_d_gate_up)
        elif now:
            batch.weight_gradient(hidden, grad, d_down_EFD)
            batch.weight_gradient(x_ND.index_select(0, source), d_gate_up, d_gate_up_EDF)
    if now:
        unused = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        d_gate_up_EDF[unused], d_down_EFD[unused] = 0, 0
    if tokens:
        defer_gradient(tokens[1], Rows(all_hidden), saved_rows(grad_ND, token), ends_E)
        defer_gradient(tokens[0], saved_rows(x_ND, token), Rows(all_d_gate_up), ends_E)
    return rows, d_w, d_gate_up_EDF, d_down_EFD


@dataclass(frozen=True)
class Batch:
    """Neighboring experts that share a matmul, all padded to the same number of rows.

    Attributes:
        experts: Range of experts.
        rows: Their rows in expert order.
        source: Row that each padded row holds; padding repeats some other row.
        padding: (padded rows, 1) true on padding.
        place: Index of each of ``rows`` among the padded rows.
    """

    experts: slice
    rows: slice
    source: Tensor
    padding: Tensor
    place: Tensor

    def multiply(self, x: Tensor, stack_EKM: Tensor) -> Tensor:
        """Multiply padded rows by their experts' matrices."""
        stack = stack_EKM[self.experts]
        y = x.new_empty(len(x), stack.shape[2])
        # with out, or autocast would choose another dtype
        torch.bmm(x.view(len(stack), -1, x.shape[1]), stack, out=y.view(len(stack), -1, y.shape[1]))
        return y

    def weight_gradient(self, x: Tensor, grad: Tensor, out_EKM: Tensor) -> None:
        """Write x^T grad of each expert to ``out_EKM``.

        Zeros the padding in both operands, because zero times infinity is NaN.
        """
        out = out_EKM[self.experts]
        for each in (x, grad):
            each.masked_fill_(self.padding, 0)
        x, grad = (each.view(len(out), -1, each.shape[1]) for each in (x, grad))
        torch.bmm(x.mT, grad, out=out)

    def unpad(self, padded_rows: Tensor, out: Tensor) -> None:
        """Write the rows that are not padding to their places in ``out``."""
        torch.index_select(padded_rows, 0, self.place, out=out[self.rows])


def batches(ends_E: Tensor, n_rows: int) -> Iterator[Batch]:
    """Yield the batches of a call in expert order, without experts that have no rows."""
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1])).long()
    counts_E = ends_E - starts_E
    ends = read_ends(ends_E, n_rows)
    starts = [0, *ends[:-1]]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    for first, n, width in batch_shapes(counts):
        experts = slice(first, first + n)
        column = torch.arange(width, device=ends_E.device)
        real = column < counts_E[experts, None]
        # an empty last expert starts past the end: no valid index
        source = torch.where(real, starts_E[experts, None] + column, starts[first])
        rows = slice(starts[first], ends[first + n - 1])
        place = torch.nonzero_static(real.flatten(), size=rows.stop - rows.start).squeeze(1)
        yield Batch(experts, rows, source.flatten(), ~real.view(-1, 1), place)


def batch_shapes(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield first expert, number of experts, and padded rows of each, of every batch.

    Halves batches that would be too long or mostly padding. Numbers of experts are powers of two
    and numbers of rows are few, so there are few matmul shapes.
    """
    rows, first = [padded(count) for count in counts], 0
    while first < len(counts):
        n = min(MOST, 1 << ((len(counts) - first).bit_length() - 1))
        yield from _halved(rows, first, n)
        first += n


def _halved(rows: list[int], first: int, n: int) -> Iterator[tuple[int, int, int]]:
    separate, width = sum(rows[first : first + n]), max(rows[first : first + n])
    if n == 1 or n * width <= min(ROWS, PADDING * separate):
        if width:
            yield first, n, width
    else:
        yield from _halved(rows, first, n // 2)
        yield from _halved(rows, first + n // 2, n // 2)
