"""Routed experts on a CPU: neighbouring experts with about as many rows share a batched product.

A product of its own for every expert pays twice for each: some fifty microseconds of call, in one
thread, and in bfloat16 the compilation of a kernel whenever its number of rows is new. That takes
milliseconds, and is the rule in training, where every loop of every step routes anew. Rows padded
to few sizes, and several experts in one product, pay for neither.

A batch of experts goes through everything before the next one is gathered: its rows stay in the
caches, and nothing but results is as long as all choices together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.ops.experts.looped_stack import Rows, kept_rows, leave_use
from open_mythos.ops.experts.rows import (
    activated,
    activated_backward,
    read_ends,
    sort_choices,
    to_tokens,
)
from open_mythos.ops.experts.sizes import MOST, PADDING, ROWS, padded


def forward(
    x_ND: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    weights_NC: Tensor,
    experts_NC: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`open_mythos.ops.experts.grouped.forward`."""
    top_k, (order, ends_E) = experts_NC.shape[1], sort_choices(experts_NC, gate_up_EDF.shape[0])
    token, w = order // top_k, weights_NC.reshape(-1, 1).index_select(0, order)
    gate_up = x_ND.new_empty(len(order) if keep else 0, gate_up_EDF.shape[2])
    y = x_ND.new_empty(len(order), x_ND.shape[1])
    for batch in batches(ends_E, len(order)):
        x = x_ND.index_select(0, token.index_select(0, batch.source))
        product = batch.multiply(x, gate_up_EDF)
        if keep:
            batch.unpad(product, gate_up)
        hidden = activated(product, w.index_select(0, batch.source))
        batch.unpad(batch.multiply(hidden, down_EFD), y)
    return to_tokens(y, order, top_k), gate_up if keep else x_ND.new_empty(0), order, ends_E


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
    of_stacks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`open_mythos.ops.experts.grouped.backward`."""
    top_k, now = weights_NC.shape[1], of_stacks and not tokens
    token, w = order // top_k, weights_NC.reshape(-1, 1).index_select(0, order)
    rows, d_w = x_ND.new_empty(len(order), x_ND.shape[1]), torch.empty_like(w)
    d_gate_up_EDF, d_down_EFD = (
        each.new_empty(each.shape if now else 0) for each in (gate_up_EDF, down_EFD)
    )
    if tokens:
        all_d_gate_up = torch.empty_like(gate_up)
        all_hidden = gate_up.new_empty(len(order), down_EFD.shape[1])
    for batch in batches(ends_E, len(order)):
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
            batch.weights(hidden, grad, d_down_EFD)
            batch.weights(x_ND.index_select(0, source), d_gate_up, d_gate_up_EDF)
    if now:
        unused = ends_E.diff(prepend=ends_E.new_zeros(1)) == 0
        d_gate_up_EDF[unused], d_down_EFD[unused] = 0, 0
    if tokens:
        leave_use(tokens[1], Rows(all_hidden), kept_rows(grad_ND, token), ends_E)
        leave_use(tokens[0], kept_rows(x_ND, token), Rows(all_d_gate_up), ends_E)
    d_weights_NC = torch.empty_like(d_w).index_copy_(0, order, d_w).view_as(weights_NC)
    return to_tokens(rows, order, top_k), d_weights_NC, d_gate_up_EDF, d_down_EFD


@dataclass(frozen=True)
class Batch:
    """Neighbouring experts that share a product, each with as many rows as the others.

    Attributes:
        experts: Which.
        rows: Their rows in the order of the experts.
        source: For each padded row the row that it holds; padding repeats some other.
        padding: (padded rows, 1) true on padding.
        place: For each of ``rows`` its place among the padded ones.
    """

    experts: slice
    rows: slice
    source: Tensor
    padding: Tensor
    place: Tensor

    def multiply(self, x: Tensor, stack_EKM: Tensor) -> Tensor:
        """Padded rows times their experts' matrices."""
        stack = stack_EKM[self.experts]
        y = x.new_empty(len(x), stack.shape[2])
        # with out, or autocast would choose another dtype
        torch.bmm(x.view(len(stack), -1, x.shape[1]), stack, out=y.view(len(stack), -1, y.shape[1]))
        return y

    def weights(self, x: Tensor, grad: Tensor, out_EKM: Tensor) -> None:
        """Write the sum over each expert's rows of x^T grad to ``out_EKM``.

        Padding becomes zero in ``x`` and in ``grad``: times an infinity, zero in one is no zero.
        """
        out = out_EKM[self.experts]
        for each in (x, grad):
            each.masked_fill_(self.padding, 0)
        x, grad = (each.view(len(out), -1, each.shape[1]) for each in (x, grad))
        torch.bmm(x.mT, grad, out=out)

    def unpad(self, of_all: Tensor, out: Tensor) -> None:
        """Write what is not padding to its rows of ``out``."""
        torch.index_select(of_all, 0, self.place, out=out[self.rows])


def batches(ends_E: Tensor, n_rows: int) -> Iterator[Batch]:
    """The batches of a call in the order of the experts, less those that have no rows.

    Args:
        ends_E: Where each expert's rows end.
        n_rows: Rows of all experts.
    """
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1])).long()
    counts_E = ends_E - starts_E
    ends = read_ends(ends_E, n_rows)
    starts = [0, *ends[:-1]]
    counts = [end - start for start, end in zip(starts, ends, strict=True)]
    for first, n, width in divided(counts):
        experts = slice(first, first + n)
        column = torch.arange(width, device=ends_E.device)
        real = column < counts_E[experts, None]
        # an expert without rows may be the last: its start is then no row
        source = torch.where(real, starts_E[experts, None] + column, starts[first])
        rows = slice(starts[first], ends[first + n - 1])
        place = torch.nonzero_static(real.flatten(), size=rows.stop - rows.start).squeeze(1)
        yield Batch(experts, rows, source.flatten(), ~real.view(-1, 1), place)


def divided(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """First expert, experts, and rows of each after padding, of every batch.

    Halves what would be too long or mostly padding: all numbers of experts are powers of two, and
    with few numbers of rows there are few shapes of products.
    """
    rows, first = [padded(count) for count in counts], 0
    while first < len(counts):
        n = min(MOST, 1 << ((len(counts) - first).bit_length() - 1))
        yield from _halved(rows, first, n)
        first += n


def _halved(rows: list[int], first: int, n: int) -> Iterator[tuple[int, int, int]]:
    apart, width = sum(rows[first : first + n]), max(rows[first : first + n])
    if n == 1 or n * width <= min(ROWS, PADDING * apart):
        if width:
            yield first, n, width
    else:
        yield from _halved(rows, first, n // 2)
        yield from _halved(rows, first + n // 2, n // 2)
