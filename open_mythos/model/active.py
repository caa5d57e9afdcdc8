"""What the loop still computes: rows, or single positions, that have not reached their depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.devices import to_device
from open_mythos.errors import ConfigError
from open_mythos.model.cache import KVCache
from open_mythos.model.context import Context
from open_mythos.model.exit_rules import ExitRule, Look, Memory
from open_mythos.model.trace import LoopTrace

ReadOut = Callable[[Tensor, Context, int], Tensor]
"""``read_out(h, ctx, t)``: logits (R, T, V) of the states after loop t of the positions in ctx."""


class Keep:
    """The part of a batch that goes on."""

    def __init__(self, ctx: Context, rows: Tensor, columns: Tensor | None = None) -> None:
        self.ctx = ctx
        self._rows, self._columns = rows, columns

    def take(self, x: Tensor) -> Tensor:
        """That part of ``x`` (R, T, ...)."""
        if self._columns is None:
            return x[self._rows]
        return x[self._rows.unsqueeze(1), self._columns]


class Live(Protocol):
    """What :meth:`RecurrentBlock.forward` asks after every loop."""

    ctx: Context
    """The context of the first loop."""

    def __bool__(self) -> bool:
        """Whether anything is left to compute."""

    def gradient(self, t: int, grad_loops: int | None) -> tuple[Tensor | None, bool]:
        """Which rows' gradient begins at loop ``t``, and whether any row has one by then.

        The first is None where nothing has to be cut off.
        """

    def retire(self, t: int, before_RTD: Tensor, h_RTD: Tensor, ctx: Context) -> Keep | None:
        """Take out what ends with loop ``t``; None when all of the rest goes on as it is."""

    def final_states(self) -> Tensor:
        """(B, T, D) in the order of the batch."""


class LiveRows:
    """Rows that each run a depth known beforehand; gradient flows.

    Who leaves when is worked out before the first loop: the device is told once, and the host never
    waits for it.
    """

    def __init__(self, depths: list[int], ctx: Context, min_loops: int = 0) -> None:
        self.ctx, self._least, self._run = ctx, min_loops, 0
        self._depths = list(depths)
        self._done: list[Tensor] = []
        none = torch.empty(0, dtype=torch.long, device=ctx.rope.device)
        self._nobody = none, none
        self._departures = dict.fromkeys(self._depths, self._nobody)
        self._depth_R = self._inverse = none
        if len(self._departures) > 1:
            self._depth_R, self._inverse, *indices = _integers(_lists(self._depths), none.device)
            leave, stay = indices[::2], indices[1::2]
            pairs = zip(leave, stay, strict=True)
            self._departures = dict(zip(sorted(self._departures), pairs, strict=True))

    def __bool__(self) -> bool:
        return bool(self._depths) or self._run < self._least

    def gradient(self, t: int, grad_loops: int | None) -> tuple[Tensor | None, bool]:
        """As the protocol says."""
        if grad_loops is None or not torch.is_grad_enabled():
            return None, torch.is_grad_enabled()
        first = [max(0, depth - grad_loops) for depth in self._depths]
        begins, cut = [t > 0 and t == start for start in first], None
        if any(begins):
            device = self.ctx.rope.device
            cut = torch.ones(len(begins), dtype=torch.bool, device=device)
            cut = cut if all(begins) else self._depth_R == t + grad_loops
        return cut, any(t >= start for start in first)

    def retire(self, t: int, before_RTD: Tensor, h_RTD: Tensor, ctx: Context) -> Keep | None:
        """As the protocol says."""
        self._run = t + 1
        if self._depths and t + 1 not in self._departures:
            return None
        leave, stay = self._departures.get(t + 1, self._nobody)
        self._depths = [depth for depth in self._depths if depth > t + 1]
        self._done.append(h_RTD[leave] if self._depths else h_RTD)
        if not self:
            return None
        self._depth_R = self._depth_R[stay]
        return Keep(ctx.select(stay), stay)

    def final_states(self) -> Tensor:
        """As the protocol says."""
        if len(self._done) == 1:
            return self._done[0]
        states = torch.cat(self._done)
        return states[self._inverse] if len(self._inverse) else states


def _lists(depths: list[int]) -> list[list[int]]:
    """The depths; where each row stands in the order of leaving; then for each departure which of
    the rows that ran leave, and which stay."""
    rows, order, pairs = list(range(len(depths))), [], []
    for loops in sorted(set(depths)):
        leave = [i for i, row in enumerate(rows) if depths[row] == loops]
        stay = [i for i, row in enumerate(rows) if depths[row] > loops]
        order += [rows[i] for i in leave]
        rows = [rows[i] for i in stay]
        pairs += [leave, stay]
    return [depths, sorted(range(len(order)), key=order.__getitem__), *pairs]


def _integers(lists: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """The lists on ``device``, by one copy that the host does not wait for."""
    flat = torch.tensor([each for some in lists for each in some], dtype=torch.long)
    return list(to_device(flat, device).split([len(some) for some in lists]))


class LivePositions:
    """Positions that an exit rule stops one by one; there is no gradient.

    The rule sees the positions still running and no other, so its verdict on one of them does not
    depend on the batch.

    Args:
        depths: Most loops of each row.
        state_BTD: The initial state.
        ctx: The context of the call.
        rule: Says after each loop which positions stop.
        read_out: Maps states to logits, for rules that ask for predictions.
        trace: Receives the loops that each position ran.
    """

    def __init__(
        self,
        depths: list[int],
        state_BTD: Tensor,
        ctx: Context,
        rule: ExitRule,
        read_out: ReadOut | None,
        trace: LoopTrace | None,
    ) -> None:
        batch, n_new, _ = state_BTD.shape
        device = state_BTD.device
        # positions that have left are seen by the others: without a cache, for this call alone
        cache = KVCache(n_new, share_loops=True) if ctx.cache is None else ctx.cache
        self.ctx = self._whole = replace(ctx, cache=cache)
        self._rule, self._read_out = rule, read_out
        (limit,) = _integers([depths], device)
        self._limit_RT = limit.unsqueeze(1).expand(batch, n_new)
        self._rows = torch.arange(batch, device=device)
        self._columns = torch.arange(n_new, device=device).expand(batch, n_new)
        self._real = torch.ones(batch, n_new, dtype=torch.bool, device=device)
        self._final = torch.empty(state_BTD.shape, device=device)
        self._memory: Memory | None = None
        self._read_loops = 0
        self._exits_BT = torch.zeros(batch, n_new, dtype=torch.long, device=device)
        if trace is not None:
            trace.exits = self._exits_BT

    def __bool__(self) -> bool:
        return len(self._rows) > 0

    def gradient(self, t: int, grad_loops: int | None) -> tuple[Tensor | None, bool]:
        """As the protocol says."""
        return None, False

    def retire(self, t: int, before_RTD: Tensor, h_RTD: Tensor, ctx: Context) -> Keep | None:
        """As the protocol says."""
        look = Look(t, before_RTD, h_RTD, partial(self._read, h_RTD, ctx, t))
        stop_RT, self._memory = self._rule(look, self._memory)
        stop_RT = stop_RT | (self._limit_RT <= t + 1)
        leave_RT, stay_RT = self._real & stop_RT, self._real & ~stop_RT
        # all are written, changed or not: to pick those that leave would wait for the device
        place = self._rows.unsqueeze(1), self._columns
        self._final[place] = torch.where(leave_RT.unsqueeze(-1), h_RTD.float(), self._final[place])
        self._exits_BT[place] = torch.where(leave_RT, t + 1, self._exits_BT[place])
        count_R = stay_RT.sum(1)
        sizes = torch.stack((leave_RT.sum(), (count_R > 0).sum(), count_R.max()))
        gone, n_rows, width = sizes.tolist()  # the one wait of a loop: shapes follow from these
        if not gone or not width:
            self._real, self._rows = stay_RT, self._rows if width else self._rows[:0]
            return None
        rows = (count_R == 0).to(torch.int8).argsort(stable=True)[:n_rows]
        # those that stay, in their order, then as many of the others as fill the row
        columns = (~stay_RT[rows]).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
        self._real = stay_RT[rows].gather(1, columns)
        self._limit_RT = self._limit_RT[rows].gather(1, columns)
        self._rows, self._columns = self._rows[rows], self._columns[rows].gather(1, columns)
        keep = Keep(self._whole.at(self._rows, self._columns, self._real), rows, columns)
        self._memory = tuple(keep.take(each) for each in self._memory)
        return keep

    def final_states(self) -> Tensor:
        """As the protocol says."""
        return self._final

    def _read(self, h_RTD: Tensor, ctx: Context, t: int) -> Tensor:
        if self._read_out is None or self._read_loops != t:
            raise ConfigError(
                "predictions cannot be read out here", where="exit_rule",
                value=f"loop {t}, {self._read_loops} loops read before",
                allowed="an exit rule that reads predictions at every loop, in a whole model",
                fix="call look.predict() after every loop, or never",
            )  # fmt: skip
        self._read_loops = t + 1
        assert ctx.cache is not None
        return self._read_out(h_RTD, replace(ctx, cache=ctx.cache.lens), t)
