"""The attention cache of a looped model: one slot for every (layer, loop).

A slot is one tensor (B, capacity, W): whatever an attention layer needs to remember of a token,
side by side (keys and values for GQA; latent and rotary key for MLA). Capacity doubles when it
runs out.

**Tokens of different depth.** A token computed for s loops is seen, by deeper loops of others, with
the key and value of its last computed loop. The cache keeps that rule by copying: a slot that a
token did not reach holds what the slot of the loop before holds. Nothing in a row ever depends on
how deep its neighbours in the batch went.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active

_KEY = "open_mythos"


@dataclass(frozen=True)
class Columns:
    """What is known of the cached positions (columns) of every row.

    ``valid_BS`` is false on padding, ``document_BS`` numbers the packed documents; None means that
    every token is real, or that all belong to one document.
    """

    length: int
    valid_BS: Tensor | None = None
    document_BS: Tensor | None = None

    def extend(self, n_new: int, valid_BT: Tensor | None, document_BT: Tensor | None) -> Columns:
        """These columns followed by ``n_new`` more.

        Raises:
            ConfigError: The documents of the earlier or of the new columns are not known.
        """
        if self.length and (self.document_BS is None) != (document_BT is None):
            raise ConfigError(
                "packed documents at some cached calls only", where="document_ids",
                value="missing" if document_BT is None else "given",
                allowed="at every call on one cache, or at none",
                fix="repeat the number of the document that the new tokens continue",
            )  # fmt: skip
        return Columns(
            self.length + n_new,
            _append(self.valid_BS, valid_BT, self.length, n_new),
            _append(self.document_BS, document_BT, self.length, n_new),
        )


def _append(old_BS: Tensor | None, new_BT: Tensor | None, length: int, n_new: int) -> Tensor | None:
    """The two side by side; where one is missing, its columns are real tokens (ones)."""
    if old_BS is None and new_BT is None:
        return None
    if old_BS is None and new_BT is not None:
        old_BS = new_BT.new_ones(new_BT.shape[0], length)
    if new_BT is None and old_BS is not None:
        new_BT = old_BS.new_ones(old_BS.shape[0], n_new)
    assert old_BS is not None
    assert new_BT is not None
    return torch.cat((old_BS, new_BT), dim=1)


class Cache(Protocol):
    """What attention layers need of a cache."""

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        """Store the new entries of a layer and a loop, and return all (B, S, W) that it may see."""


class KVCache:
    """Keys and values (or latents) of the tokens seen so far.

    Hand the same object to every call of the model; ``start_pos`` is then ``cache.length``. No
    gradient flows through a cache: a cached forward runs without autograd.

    Args:
        capacity: Positions to allocate at first; it doubles when they run out.
        share_loops: Keep one slot per layer for all loops, which then holds the last computed
            loop's entries (``kv_share="last"``): L times smaller, and not exact.
    """

    def __init__(self, capacity: int = 0, share_loops: bool = False) -> None:
        self.columns = Columns(0)
        self._capacity = capacity
        self._share_loops = share_loops
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._readout: KVCache | None = None
        self._was_read = False  # in the call so far
        self._written: dict[int, int] = {}  # layer -> deepest loop of the call so far

    @classmethod
    def of(
        cls, kv_cache: KVCache | MutableMapping[str, object] | None, config: MythosConfig
    ) -> KVCache | None:
        """The cache behind what a caller passed: None, a cache, or a plain dict that keeps one."""
        if kv_cache is None:
            return None
        share_loops = config.kv_share == "last"
        cache: object = kv_cache
        if isinstance(kv_cache, MutableMapping):
            if not kv_cache:
                kv_cache[_KEY] = cls(share_loops=share_loops)
            cache = kv_cache.get(_KEY)
        if isinstance(cache, KVCache) and cache._share_loops == share_loops:
            return cache
        raise ConfigError(
            "not a cache of this model", where="kv_cache", value=type(kv_cache).__name__,
            allowed=f"None, KVCache(share_loops={share_loops}) as the model's kv_share says, or an "
            "empty dict handed back at every step",
            fix="start with kv_cache={} and pass the same object on",
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Positions held."""
        return self.columns.length

    @property
    def readout(self) -> KVCache:
        """What the coda's layers remember when the state is read out after every loop.

        The coda's own slots hold finished states. A position that is read out at loop t must see
        the others at loop t, so these have a slot for every loop.

        Raises:
            ConfigError: Earlier positions were computed without being read out.
        """
        if self._readout is None:
            self._readout = KVCache(self._capacity, self._share_loops)
        if self._readout.length != self.length:
            raise ConfigError(
                "earlier positions were not read out at every loop", where="exit_rule",
                value=f"{self._readout.length} of {self.length} positions read out",
                allowed="a rule that reads predictions at every call on one cache, or at none",
                fix="use the same exit rule from the first call on",
            )  # fmt: skip
        self._was_read = True
        return self._readout

    @property
    def nbytes(self) -> int:
        """Bytes allocated, unused capacity included."""
        own = sum(slot.nbytes for slot in self._slots.values())
        return own + (0 if self._readout is None else self._readout.nbytes)

    @property
    def n_slots(self) -> int:
        """Slots allocated: ``config.cache_slots(deepest loop count seen)``."""
        return len(self._slots)

    def admit(self, batch: int) -> None:
        """Make sure that the cache can take ``batch`` rows; an empty one takes any number.

        Raises:
            ConfigError: It holds another number of rows.
        """
        self._was_read = False
        self._written.clear()
        if self._readout is not None:
            self._readout._written.clear()
        rows = {slot.shape[0] for slot in self._slots.values()}
        if rows <= {batch}:
            return
        if self.length:
            raise ConfigError(
                "the cache belongs to another batch", where="kv_cache", value=f"{batch} rows",
                allowed=f"{rows.pop()} rows", fix="use a cache of its own for every batch",
            )  # fmt: skip
        self._slots.clear()
        self._readout = None

    def clear(self) -> None:
        """Forget everything. The slots keep their memory and are zero, as new ones are."""
        self.columns, self._readout = Columns(0), None
        for slot in self._slots.values():
            slot.zero_()

    def truncate(self, length: int) -> None:
        """Forget all positions from ``length`` on."""
        if not isinstance(length, int) or not 0 <= length <= self.length:
            raise ConfigError(
                "cannot truncate a cache to more than it holds", where="KVCache.truncate",
                value=length, allowed=f"0 .. {self.length}",
                fix="name a position that the cache holds",
            )  # fmt: skip
        valid, document = self.columns.valid_BS, self.columns.document_BS
        self.columns = replace(
            self.columns,
            length=length,
            valid_BS=None if valid is None else valid[:, :length],
            document_BS=None if document is None else document[:, :length],
        )
        if self._readout is not None:
            self._readout.truncate(min(length, self._readout.length))

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        """Store the entries of the new positions and return those of all positions.

        Args:
            layer: Number of the layer in the model.
            loop: Loop index t; a layer writes its loops in turn.
            entry_BTW: New entries, of the ``active`` positions alone when these are given.
            active: Rows and positions still being computed; None for all of them.

        Returns:
            (B, S, W), S = length + T: a view of the slot, or a copy of the active rows.

        Raises:
            ConfigError: Loops were skipped, or rows are at different loops.
        """
        if isinstance(loop, Tensor) or loop > self._written.get(layer, -1) + 1:
            raise ConfigError(
                "loops of a layer were skipped", where="KVCache.write",
                value=f"loop {loop} after {self._written.get(layer, -1) + 1} loops",
                allowed="one loop after the other, the same for all rows",
                fix="an exit rule calls look.predict() after every loop, or never",
            )  # fmt: skip
        self._written[layer] = loop
        n_new = entry_BTW.shape[1] if active is None else active.n_new or entry_BTW.shape[1]
        start, end = self.length, self.length + n_new
        slot = self._slot(layer, loop, entry_BTW, end)
        if active is None or active.rows is None:
            slot[:, start:end] = entry_BTW
            return slot[:, :end]
        if loop > 0 and not self._share_loops:
            # exited tokens keep the entry of their last computed loop
            slot[:, start:end] = self._slots[layer, loop - 1][:, start:end]
        active.put(slot[:, start:end], entry_BTW)
        return slot[:, :end].index_select(0, active.rows)  # half the time of plain indexing

    def static(self, loop: int, n_columns: int, column_1: Tensor) -> StaticCache:
        """Return loop ``loop`` of this cache for decoding steps of constant shape.

        The slots must exist, with room for ``n_columns``, and stay where they are in memory as long
        as the result is used: an earlier call of as many loops made them.
        """
        own = 0 if self._share_loops else loop
        slots = {layer: slot[:, :n_columns] for (layer, t), slot in self._slots.items() if t == own}
        last = {layer: self._slots[layer, max(0, own - 1)][:, :n_columns] for layer in slots}
        return StaticCache(slots, last if own else slots, column_1)

    def commit(self, columns: Columns) -> None:
        """Count the positions written since the last commit as held; deeper slots see their last
        computed loop.

        A call that fails before it gets here leaves the cache as it was.
        """
        start, end = self.length, columns.length
        for layer, loop in sorted(self._slots, key=lambda key: key[1]):
            if not self._share_loops and loop > self._written.get(layer, loop):
                last = self._slots[layer, loop - 1]
                self._with_room((layer, loop), end)[:, start:end] = last[:, start:end]
        if self._readout is not None and self._was_read:
            self._readout.commit(columns)
        self.columns = columns

    def _slot(self, layer: int, loop: int, entry_BTW: Tensor, end: int) -> Tensor:
        """The slot of (layer, loop), made if there is none, with room for ``end`` positions."""
        key = (layer, 0 if self._share_loops else loop)
        if key not in self._slots:
            self._capacity = max(self._capacity, end)
            batch, _, width = entry_BTW.shape
            # positions and rows that stopped before this loop enter it with their last one
            self._slots[key] = (
                self._slots[layer, loop - 1].clone()
                if key[1] > 0
                else entry_BTW.new_zeros((batch, self._capacity, width))
            )
        return self._with_room(key, end)

    def _with_room(self, key: tuple[int, int], end: int) -> Tensor:
        slot = self._slots[key]
        if slot.shape[1] < end:
            self._capacity = max(self._capacity, 2 * slot.shape[1], end)
            grown = slot.new_zeros((slot.shape[0], self._capacity, slot.shape[2]))
            grown[:, : slot.shape[1]] = slot
            self._slots[key] = grown
        return self._slots[key]


class StaticCache:
    """One loop's slots of a :class:`KVCache`, as decoding steps of constant shape use them.

    A step adds one token to every row. Its entry goes to the column that a tensor names, and all
    the columns are read whether or not they are in use: a mask has to hide those that are not. So
    nothing about a step depends on how many tokens there are, and it can be captured or compiled
    once. The memory is that of the cache it came from, which alone counts bytes and positions.

    Args:
        slots: (B, S, W) by layer: the slots of the loop.
        last: (B, S, W) by layer: those of the loop before, or the same ones where there is none.
        column_1: (1,) int64 column of the new token.
    """

    def __init__(self, slots: dict[int, Tensor], last: dict[int, Tensor], column_1: Tensor) -> None:
        self._by_layer, self._last_by_layer, self._column_1 = slots, last, column_1

    def slots(self) -> Iterator[Tensor]:
        """Iterate over all slots that a step may read."""
        yield from self._by_layer.values()
        yield from self._last_by_layer.values()

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        """Store the entries (B, 1, W) of the new token; (B, S, W), used columns and others.

        Rows that ``active.real`` discards keep the entry of their last computed loop.
        """
        slot = self._by_layer[layer]
        entry_BTW = entry_BTW.to(slot.dtype)
        if active is not None and active.real is not None:
            last_BTW = self._last_by_layer[layer].index_select(1, self._column_1)
            entry_BTW = torch.where(active.real.unsqueeze(-1), entry_BTW, last_BTW)
        return slot.index_copy_(1, self._column_1, entry_BTW)


def cache_bytes(
    config: MythosConfig, n_loops: int, positions: int, batch: int = 1, element_size: int = 2
) -> int:
    """Bytes a full cache needs: slots x batch x positions x elements per slot x element size."""
    return config.cache_slots(n_loops) * batch * positions * config.cache_width * element_size
