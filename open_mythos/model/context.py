"""Positions, attention masks and cache of one forward call.

Built once per call and passed to every layer and loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.config import MythosConfig, Rotary
from open_mythos.model.active import Active
from open_mythos.model.cache import Cache, Columns, KVCache
from open_mythos.ops.attention.visibility import Visibility, bidirectional
from open_mythos.ops.rope import rope_table


@dataclass(frozen=True)
class Context:
    """Positions, masks and cache of one call.

    Attributes:
        positions: (T,) or (B, T) position of each token within its document, excluding padding.
        ropes: Rotary tables of these positions, that of most layers first.
        mask: Attention mask: a :class:`Visibility`, or a boolean tensor (B or 1, 1, T, S), true
            where attention is allowed. None if ``causal``, or if a single new token attends to all.
        columns: All positions, cached and new.
        valid_BT: False on new tokens that are padding; None without padding.
        cache: Keys and values of earlier calls.
        active: Rows and positions that this context is restricted to; None for all.
        keys_B: Random key of each sequence.
        exact: A row's result may not depend, in any bit, on other rows' values or number: experts
            use matmuls of fixed size. Dense matmuls keep their bits if the number of rows is
            constant, which is the caller's part. Inference on a CPU only.
        values: What the layers with ``value_embedding`` add to their values, (B, T, G K).
        memo: Values that layers compute once per call, by layer; shared by all contexts of a
            call.
    """

    positions: Tensor
    ropes: dict[Rotary, Tensor]
    mask: Visibility | Tensor | None
    columns: Columns
    valid_BT: Tensor | None = None
    cache: Cache | None = None
    active: Active | None = None
    keys_B: Tensor | None = None
    exact: bool = False
    values: dict[int, Tensor] = field(default_factory=dict, repr=False)
    memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, x_BTD: Tensor, cfg: MythosConfig) -> Context:
        """Build the context of a call on ``x_BTD`` alone."""
        return cls.build(x_BTD.shape[1], cfg.rotaries, x_BTD.device, causal=cfg.causal)

    @classmethod
    def build(
        cls,
        n_new: int,
        rotaries: Sequence[Rotary],
        device: torch.device,
        *,
        start_pos: int = 0,
        valid_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        cache: KVCache | None = None,
        keys_B: Tensor | None = None,
        positions: Tensor | None = None,
        causal: bool = True,
    ) -> Context:
        """Build the context of ``n_new`` tokens starting at ``start_pos``.

        ``positions`` (T,) or (B, T) replace those that follow from padding and documents. Without
        ``causal`` all tokens attend to each other; there is no cache then.
        """
        past = Columns(0) if cache is None else cache.columns
        columns = past.extend(n_new, valid_BT, document_BT)
        mask: Visibility | Tensor | None = None
        run_BS, document_BS = None, columns.document_BS
        if document_BS is not None:  # number the runs of equal ids
            changes = document_BS[:, 1:] != document_BS[:, :-1]
            run_BS = F.pad(changes.long().cumsum(1), (1, 0))
        total, valid_BS = columns.length, columns.valid_BS
        if not causal:
            mask = bidirectional(total, device, valid_BS, run_BS)
        elif valid_BS is not None or run_BS is not None or n_new not in (1, total):
            mask = Visibility(n_new, total, device, valid_BS, run_BS)
        if positions is None:
            positions = _positions(columns, run_BS, n_new, device) + (start_pos - past.length)
        return cls(
            positions=positions,
            ropes=rope_tables(positions, rotaries),
            mask=mask,
            columns=columns,
            valid_BT=valid_BT,
            cache=cache,
            keys_B=keys_B,
        )

    @property
    def rope(self) -> Tensor:
        """The rotary table of most layers."""
        return next(iter(self.ropes.values()))

    @property
    def causal(self) -> bool:
        """Whether query i attends to exactly the keys 0 .. i."""
        return self.mask is None and self.columns.length == self.positions.shape[-1]

    def at(self, active: Active) -> Context:
        """Restrict the context of a whole call to some rows and positions.

        Padding entries are neither cached nor counted.
        """
        rows_R, columns_RW, mask = active.rows, active.columns, self.mask
        assert rows_R is not None
        if isinstance(mask, Visibility):
            mask = mask.select(rows_R)
        elif mask is not None and mask.shape[0] > 1:
            mask = mask[rows_R]
        ctx = replace(
            self,
            positions=self.positions[rows_R] if self.positions.dim() == 2 else self.positions,
            ropes={
                rotary: rope[:, rows_R] if rope.dim() == 4 else rope
                for rotary, rope in self.ropes.items()
            },
            mask=mask,
            valid_BT=None if self.valid_BT is None else self.valid_BT[rows_R],
            keys_B=None if self.keys_B is None else self.keys_B[rows_R],
            values={layer: values[rows_R] for layer, values in self.values.items()},
            active=active,
        )
        if columns_RW is None:
            return ctx
        valid_RW = active.real
        if ctx.valid_BT is not None and valid_RW is not None:
            valid_RW = ctx.valid_BT.gather(1, columns_RW) & valid_RW
        return replace(
            ctx,
            positions=ctx.positions.expand(len(rows_R), -1).gather(1, columns_RW),
            ropes={
                rotary: _rows(rope, len(rows_R)).take_along_dim(columns_RW[None, ..., None], dim=2)
                for rotary, rope in ctx.ropes.items()
            },
            mask=ctx._mask_of(columns_RW),
            valid_BT=valid_RW,
            values={
                layer: values.take_along_dim(columns_RW.unsqueeze(-1), dim=1)
                for layer, values in ctx.values.items()
            },
        )

    def sliding(self, window: int) -> Context:
        """Restrict every query to the last ``window`` positions, itself included; 0 for all."""
        n_new, total = self.positions.shape[-1], self.columns.length
        if not window or window >= total:
            return self
        if self.mask is not None:
            assert isinstance(self.mask, Visibility), "a window of queries has its mask"
            return replace(self, mask=self.mask.within(window))
        mask = Visibility(n_new, total, self.positions.device, window=window)
        if not torch.compiler.is_compiling():  # its masks serve all layers and loops
            mask = self.memo.setdefault((window, n_new, total), mask)
        return replace(self, mask=mask)

    def window(self, start: int, stop: int) -> Context:
        """Restrict ``mask`` to queries ``start`` .. ``stop``, as a tensor; nothing else is sliced.

        It stays None for a single new token that attends to all keys.
        """
        mask = self.mask
        if self.causal:
            n_new = self.positions.shape[-1]
            mask = Visibility(n_new, n_new, self.positions.device)
        if isinstance(mask, Visibility):
            whole = (start, stop) == (0, mask.n_queries)
            return replace(self, mask=mask.whole() if whole else mask.rows(start, stop))
        return replace(self, mask=None if mask is None else mask[:, :, start:stop])

    def _mask_of(self, columns_RT: Tensor) -> Visibility | Tensor | None:
        n_new, total = self.positions.shape[-1], self.columns.length
        if isinstance(self.mask, Tensor):
            mask_RTS = self.mask[:, 0].expand(len(columns_RT), -1, -1)
            return mask_RTS.take_along_dim(columns_RT.unsqueeze(-1), dim=1).unsqueeze(1)
        if self.mask is None and n_new == 1:
            return None
        mask = self.mask or Visibility(n_new, total, columns_RT.device)
        return mask.at(columns_RT)


def rope_tables(positions: Tensor, rotaries: Sequence[Rotary]) -> dict[Rotary, Tensor]:
    """Return the rotary tables of ``positions``; a base of 0 has none."""
    return {
        rotary: rope_table(positions, rotary.dim, rotary.theta, dict(rotary.scaling))
        for rotary in rotaries
        if rotary.theta
    }


def _rows(rope: Tensor, n_rows: int) -> Tensor:
    """Return a table with an axis of rows."""
    return rope if rope.dim() == 4 else rope[:, None].expand(-1, n_rows, -1, -1)


def _positions(columns: Columns, run_BS: Tensor | None, n_new: int, device: torch.device) -> Tensor:
    """Count the real tokens before each token in its document."""
    old = columns.length - n_new
    if columns.valid_BS is not None:
        valid = columns.valid_BS.long()
        before = valid.cumsum(1) - valid
    elif run_BS is not None:
        before = torch.arange(columns.length, device=device).expand_as(run_BS)
    else:
        return torch.arange(old, columns.length, device=device)
    if run_BS is not None:
        starts = F.pad(run_BS.diff(dim=1), (1, 0))
        before = before - (starts * before).cummax(1).values
    return before[:, old:]
