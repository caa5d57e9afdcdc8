"""Bookkeeping of the active rows and positions of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from open_mythos.devices import to_device


@dataclass(frozen=True)
class Active:
    """A selection of rows and positions of a (B, T) batch, packed into (R, W) entries.

    Rows with fewer than W positions are padded with entries that are computed and discarded.
    """

    rows: Tensor | None = None
    """(R,) int64 row indices; None for all rows."""
    columns: Tensor | None = None
    """(R, W) int64 positions per row, relative to the first new token; None for all."""
    real: Tensor | None = None
    """(R, W) or (R, 1) boolean, false on entries to discard; None if there are none."""
    n_new: int = 0
    """New positions T of the whole call; set together with ``columns``."""

    @classmethod
    def everything(cls, batch: int, n_new: int, device: torch.device) -> Active:
        """Select all positions of all rows, by index."""
        columns = torch.arange(n_new, device=device).expand(batch, n_new)
        real = torch.ones(batch, n_new, dtype=torch.bool, device=device)
        return cls(torch.arange(batch, device=device), columns, real, n_new)

    def take(self, x: Tensor) -> Tensor:
        """Gather the entries of ``x``, (B, T, ...) -> (R, W, ...)."""
        return x if self.rows is None else x[self._index()]

    def put(self, x: Tensor, new: Tensor | int) -> None:
        """Write ``new`` (R, W, ...) to the entries of ``x`` (B, T, ...), in place.

        Discarded entries write the old value back: boolean indexing would force a host-device sync.
        """
        at = self._index()
        if self.real is not None:
            old = x[at]
            real = self.real.view(*self.real.shape, *[1] * (old.dim() - self.real.dim()))
            new = torch.where(real, new, old)
        x[at] = new

    def where(self, condition: Tensor) -> Active:
        """Discard the entries where the (R, W) condition is false."""
        return replace(self, real=condition if self.real is None else self.real & condition)

    def narrow(self, stay_RW: Tensor) -> Active | None:
        """Select the entries that stay active, packed to the left, as an index into this selection.

        Rows without active entries are dropped. The new shapes depend on values: this is the one
        host-device sync per loop. Returns None if every entry stays, no rows if none does.
        """
        ran_RW = torch.ones_like(stay_RW) if self.real is None else self.real
        stay_RW = stay_RW & ran_RW
        count_R = stay_RW.sum(1)
        n_gone = ran_RW.sum() - count_R.sum()
        sizes = torch.stack((n_gone, (count_R > 0).sum(), count_R.max()))
        gone, n_rows, width = sizes.tolist()
        if not gone:
            return None
        rows = (count_R == 0).to(torch.int8).argsort(stable=True)[:n_rows]
        # active entries first, in order; then padding
        columns = (~stay_RW[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        return Active(rows, columns, stay_RW[rows].gather(1, columns), stay_RW.shape[1])

    def within(self, outer: Active) -> Active:
        """Translate an index into the selection ``outer`` to an index into the batch."""
        assert self.rows is not None
        assert outer.rows is not None
        columns = None
        if self.columns is not None and outer.columns is not None:
            columns = outer.columns[self.rows].gather(1, self.columns)
        return Active(outer.rows[self.rows], columns, self.real, outer.n_new)

    def _index(self) -> Any:
        if self.columns is None:
            return slice(None) if self.rows is None else self.rows
        assert self.rows is not None
        return self.rows.unsqueeze(1), self.columns


class RowSchedule:
    """Per-row depths and gradient windows, without any host-device sync.

    All indices are computed before the first loop and copied to the device at once.

    Args:
        depths: Loops of each row.
        grad_loops: Number of final loops of each row that carry gradient; None for all.
        device: Device of the states.
    """

    def __init__(self, depths: list[int], grad_loops: int | None, device: torch.device) -> None:
        self._depths, self._grad_loops = depths, grad_loops
        stops = sorted(set(depths))
        self.n_loops = stops[-1]
        none = torch.empty(0, dtype=torch.long, device=device)
        self.departures: dict[int, tuple[Tensor | None, Tensor, Active]] = {
            stops[-1]: (None, none, Active(none))
        }
        """Number of loops -> (rows that finish after them or None for all, other rows, both as
        indices among the active rows; the other rows by their index in the batch)."""
        if len(stops) == 1:
            return
        rows, order, lists = list(range(len(depths))), [], list[list[int]]()
        for stop in stops[:-1]:
            leave = [i for i, row in enumerate(rows) if depths[row] == stop]
            stay = [i for i, row in enumerate(rows) if depths[row] > stop]
            order += [rows[i] for i in leave]
            rows = [rows[i] for i in stay]
            lists += [leave, stay, rows]
        order += rows
        inverse = sorted(range(len(order)), key=order.__getitem__)
        self._depth_B, self._inverse, *parts = integers([depths, inverse, *lists], device)
        for i, stop in enumerate(stops[:-1]):
            leave_R, stay_R, rows_R = parts[3 * i : 3 * i + 3]
            self.departures[stop] = leave_R, stay_R, Active(rows_R)

    def truncate(self, h_BTD: Tensor, t: int, active: Active | None) -> tuple[Tensor, bool]:
        """Detach the rows whose gradient window starts at loop ``t``.

        Returns the state, and whether any row carries gradient through this loop.
        """
        k = self._grad_loops
        if k is None or not torch.is_grad_enabled():
            return h_BTD, torch.is_grad_enabled()
        running = [depth for depth in self._depths if depth > t]
        starts = [t > 0 and depth == t + k for depth in running]
        if any(starts):
            if all(starts):
                h_BTD = h_BTD.detach()
            else:
                depth_R = self._depth_B if active is None else self._depth_B[active.rows]
                h_BTD = torch.where((depth_R == t + k).view(-1, 1, 1), h_BTD.detach(), h_BTD)
        return h_BTD, any(depth <= t + k for depth in running)

    def in_order(self, finals: list[Tensor]) -> Tensor:
        """Join the final states, collected in order of depth, in the order of the batch."""
        if len(finals) == 1:
            return finals[0]
        joined = torch.cat(finals)
        return joined if len(self.departures) == 1 else joined[self._inverse]


def integers(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Copy lists of integers to ``device`` in one transfer, without a host-device sync."""
    flat = torch.tensor([each for some in lists for each in some], dtype=torch.long)
    return list(to_device(flat, device).split([len(some) for some in lists]))
