"""Attention masks in linear memory: causal positions, padding and document boundaries.

A dense mask is materialized only for the block of queries being computed and then dropped: at a
million positions the full mask would take a terabyte.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Visibility:
    """Mask of T queries over S columns: non-padding columns of the same document, causally.

    With a window, only the last ``window`` of these, counted without padding.

    A query always attends to its own column, even if that is padding: a softmax over nothing would
    be NaN.

    Attributes:
        n_queries: T.
        n_columns: S, cached and new columns.
        device: Device of the masks.
        valid_BS: False on columns that are padding; None when all are real.
        run_BS: Document index of each column, ascending; None for a single document.
        columns_BT: Column of each query; None when the queries are the last T columns in order.
        window: Positions that a query attends to, itself included; 0 for all.
    """

    n_queries: int
    n_columns: int
    device: torch.device
    valid_BS: Tensor | None = None
    run_BS: Tensor | None = None
    columns_BT: Tensor | None = None
    window: int = 0
    _made: dict[torch.dtype, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _windows: dict[int, Visibility] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def first(self) -> int:
        """Column of the first query, if the queries are the last columns."""
        return self.n_columns - self.n_queries

    @property
    def batch(self) -> int:
        """Batch size of the mask: B, or 1 when all rows share it."""
        given = (x for x in (self.valid_BS, self.run_BS, self.columns_BT) if x is not None)
        return next((len(x) for x in given), 1)

    @property
    def plain(self) -> bool:
        """Whether the mask is purely causal, aligned to the lower right."""
        parts = (self.valid_BS, self.run_BS, self.columns_BT)
        return not self.window and all(part is None for part in parts)

    @property
    def n_pairs(self) -> int:
        """Number of elements of the full mask."""
        return self.batch * self.n_queries * self.n_columns

    def rows(
        self, start: int = 0, stop: int | None = None, low: int = 0, high: int | None = None
    ) -> Tensor:
        """Materialize the mask of queries ``start .. stop`` over columns ``low .. high``.

        Returns:
            (B or 1, 1, stop - start, high - low) boolean, true where a query may attend.
        """
        stop = self.n_queries if stop is None else stop
        high = self.n_columns if high is None else high
        key = torch.arange(low, high, device=self.device)
        query = self.columns(start, stop).unsqueeze(-1)
        mask = key <= query
        if self.valid_BS is not None:
            mask = mask & self.valid_BS[:, None, low:high]
        if self.run_BS is not None:
            mask = mask & (self.of_queries(self.run_BS, start, stop).unsqueeze(-1)
                           == self.run_BS[:, None, low:high])  # fmt: skip
        if self.window:
            mask = mask & (self._ahead(start, stop, low, high) < self.window)
        if self.valid_BS is not None:
            mask |= key == query
        return (mask if mask.dim() == 3 else mask.unsqueeze(0)).unsqueeze(1)

    def within(self, window: int) -> Visibility:
        """Return the mask with a window; the same object at every call."""
        if torch.compiler.is_compiling():
            return replace(self, window=window)
        if window not in self._windows:
            self._windows[window] = replace(self, window=window)
        return self._windows[window]

    def _ahead(self, start: int, stop: int, low: int, high: int) -> Tensor:
        """Count real columns from each of ``low .. high`` to each query, (t, s) or (B, t, s)."""
        if self.valid_BS is None:
            key = torch.arange(low, high, device=self.device)
            return self.columns(start, stop).unsqueeze(-1) - key
        number_BS = self.valid_BS.long().cumsum(1)
        query_BT = self.of_queries(number_BS, start, stop)
        return query_BT.unsqueeze(-1) - number_BS[:, None, low:high]

    def whole(self) -> Tensor:
        """Materialize the full mask once for all layers and loops; for small masks."""
        if torch.compiler.is_compiling():
            return self.rows()
        if torch.bool not in self._made:
            self._made[torch.bool] = self.rows()
        return self._made[torch.bool]

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return :meth:`whole` as an additive bias of 0 and -inf; built once per dtype."""
        if dtype not in self._made:
            self._made[dtype] = additive(self.rows(), dtype)
        return self._made[dtype]

    def select(self, keep_B: Tensor) -> Visibility:
        """Return the mask of the rows that ``keep_B`` indexes."""
        valid, run, columns = (
            None if x is None else x[keep_B] for x in (self.valid_BS, self.run_BS, self.columns_BT)
        )
        return replace(self, valid_BS=valid, run_BS=run, columns_BT=columns)

    def at(self, queries_BT: Tensor) -> Visibility:
        """Return the mask of the queries with indices ``queries_BT`` in each row."""
        at = self.columns_BT
        columns = queries_BT + self.first if at is None else at.gather(1, queries_BT)
        return replace(self, n_queries=queries_BT.shape[1], columns_BT=columns)

    def spans(self, size: int) -> list[tuple[int, int, int, int]]:
        """Split the queries into blocks of ``size`` with the range of columns that each attends to.

        On a CPU the range is tight; elsewhere that would need a host-device sync.

        Returns:
            (start, stop, low, high) of each block.
        """
        starts = range(0, self.n_queries, size)
        blocks = [(start, min(start + size, self.n_queries)) for start in starts]
        if self.device.type != "cpu" or (self.run_BS is None and self.columns_BT is None):
            tight = self.window and self.valid_BS is None and self.columns_BT is None
            return [
                (
                    start, stop, max(0, self.first + start + 1 - self.window) if tight else 0,
                    self.first + stop if self.columns_BT is None else self.n_columns,
                )
                for start, stop in blocks
            ]  # fmt: skip
        low, high = self._reach
        return [
            (start, stop, int(low[start:stop].min()), int(high[start:stop].max()) + 1)
            for start, stop in blocks
        ]

    @cached_property
    def documents(self) -> list[tuple[int, int, int]] | None:
        """Return (row, start, stop) of every document; one host-device sync.

        None where this does not determine the mask: with cached columns, with selected queries, or
        with padding inside a document.
        """
        if self.plain or self.window or self.first or self.columns_BT is not None:
            return None
        begins, ends, run_BS = self._borders()
        row, start = begins.nonzero(as_tuple=True)
        stop = ends.nonzero()[:, 1] + 1
        if ((row.diff() == 0) & (run_BS[row, start].diff() == 0)).any():
            return None
        return list(zip(row.tolist(), start.tolist(), stop.tolist(), strict=True))

    @cached_property
    def packing(self) -> tuple[Tensor | None, Tensor, int]:
        """Pack the non-padding tokens of all rows, for queries that are all columns.

        Needs one host-device sync.

        Returns:
            (N,) flat indices of these tokens, None without padding; int32 cumulative document
            lengths from 0; the length of the longest document.
        """
        begins, _, run_BS = self._borders()
        real = torch.ones_like(begins) if self.valid_BS is None else self.valid_BS
        number = real.flatten().nonzero().squeeze(1)
        run = run_BS.flatten()[number]
        changes = (run.diff() != 0) | ((number // self.n_columns).diff() != 0)
        ends = F.pad(changes, (0, 1), value=True)[: len(number)].nonzero().squeeze(1) + 1
        borders = F.pad(ends, (1, 0)).int()
        longest = int(borders.diff().max()) if len(number) else 0
        return (None if self.valid_BS is None else number), borders, longest

    def _borders(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (B, S) starts and ends of runs of non-padding tokens of one document, and runs."""
        known = self.run_BS if self.run_BS is not None else self.valid_BS
        assert known is not None
        run_BS = torch.zeros_like(known, dtype=torch.long) if self.run_BS is None else self.run_BS
        real = torch.ones_like(known, dtype=torch.bool) if self.valid_BS is None else self.valid_BS
        cut = (run_BS[:, 1:] != run_BS[:, :-1]) | (real[:, 1:] != real[:, :-1])
        return F.pad(cut, (1, 0), value=True) & real, F.pad(cut, (0, 1), value=True) & real, run_BS

    @cached_property
    def _reach(self) -> tuple[Tensor, Tensor]:
        """Return (T,) first and last column that a query attends to in any row."""
        high = self.columns(0, self.n_queries)
        low = torch.zeros_like(high)
        if self.run_BS is not None:
            column = torch.arange(self.n_columns, device=self.device)
            begins = F.pad(self.run_BS.diff(dim=1), (1, 0)) != 0
            begin_BS = (column * begins).cummax(1).values
            low = self.of_queries(begin_BS, 0, self.n_queries)
        return low.view(-1, self.n_queries).amin(0), high.view(-1, self.n_queries).amax(0)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return (t,) or (B, t) columns of queries ``start .. stop``."""
        if self.columns_BT is not None:
            return self.columns_BT[:, start:stop]
        return torch.arange(self.first + start, self.first + stop, device=self.device)

    def of_queries(self, x_BS: Tensor, start: int, stop: int) -> Tensor:
        """Gather (B, t) values of ``x_BS`` at the columns of queries ``start .. stop``."""
        if self.columns_BT is not None:
            return x_BS.gather(1, self.columns_BT[:, start:stop])
        return x_BS[:, self.first + start : self.first + stop]


def bidirectional(
    n: int, device: torch.device, valid_BS: Tensor | None = None, run_BS: Tensor | None = None
) -> Tensor:
    """Return the (B or 1, 1, n, n) boolean mask of tokens that all attend to each other.

    Padding is attended to by itself alone, and documents do not see each other.
    """
    mask_BTS = torch.ones(1, 1, 1, dtype=torch.bool, device=device).expand(1, n, n)
    if valid_BS is not None:
        own = torch.eye(n, dtype=torch.bool, device=device)
        mask_BTS = valid_BS.unsqueeze(1) | own
    if run_BS is not None:
        mask_BTS = mask_BTS & (run_BS.unsqueeze(1) == run_BS.unsqueeze(2))
    return mask_BTS.unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where ``mask`` is true and -inf elsewhere; overwrites ``mask``."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(mask.logical_not_(), -torch.inf)
