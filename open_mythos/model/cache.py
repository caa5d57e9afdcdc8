"""KV cache of a looped model: one slot per (layer, loop).

A slot is a tensor (B, capacity, W) of concatenated per-token entries: keys and values for GQA;
latent and rotary key for MLA. Capacity doubles on overflow.

**Tokens of different depth.** Deeper loops attend to a token that exited after s loops through the
entry of its last computed loop. The cache implements this by copying: a slot that a token did not
reach holds the entry of the previous loop. A row never depends on the depth of other rows.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from open_mythos.checks import checked
from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active

_KEY = "open_mythos"


@dataclass(frozen=True)
class Columns:
    """Padding and documents of the cached positions (columns).

    ``valid_BS`` is false on padding, ``document_BS`` numbers packed documents; None means no
    padding, or a single document.
    """

    length: int
    valid_BS: Tensor | None = None
    document_BS: Tensor | None = None

    def extend(self, n_new: int, valid_BT: Tensor | None, document_BT: Tensor | None) -> Columns:
        """Append ``n_new`` columns.

        Raises:
            ConfigError: Only the earlier or only the new columns have documents.
        """
        if self.length and (self.document_BS is None) != (document_BT is None):
            raise ConfigError(
                "packed documents at some cached calls only", where="document_ids",
                value="missing" if document_BT is None else "given",
                allowed="at every call on one cache, or at none",
                fix="pass the document id that the new tokens continue",
            )  # fmt: skip
        return Columns(
            self.length + n_new,
            _append(self.valid_BS, valid_BT, self.length, n_new),
            _append(self.document_BS, document_BT, self.length, n_new),
        )


def _append(old_BS: Tensor | None, new_BT: Tensor | None, length: int, n_new: int) -> Tensor | None:
    """Concatenate; a missing part is filled with ones (real tokens)."""
    like = new_BT if old_BS is None else old_BS
    if like is None:
        return None
    old_BS = like.new_ones(len(like), length) if old_BS is None else old_BS
    new_BT = like.new_ones(len(like), n_new) if new_BT is None else new_BT
    return torch.cat((old_BS, new_BT), dim=1)


class KVCache:
    """Keys and values (or latents) of all previous tokens.

    Pass the same object to every call of the model, with ``start_pos=cache.length``. Cached calls
    run without autograd.

    Args:
        capacity: Positions to allocate initially; doubled on overflow.
        share_loops: Keep one slot per layer for all loops, with the entries of the last computed
            loop (``kv_share="last"``): L times smaller, but approximate.
    """

    @checked
    def __init__(self, capacity: int = 0, share_loops: bool = False) -> None:
        self.columns = Columns(0)
        self._capacity = capacity
        self.share_loops = share_loops
        self._slots: dict[tuple[int, int], Tensor] = {}
        self._readout: KVCache | None = None
        self._was_read = False  # by the current call
        self._owner: tuple[object, ...] | None = None
        self._written: dict[int, int] = {}  # layer -> last loop of the current call

    @classmethod
    def of(
        cls, kv_cache: KVCache | MutableMapping[str, object] | None, config: MythosConfig
    ) -> KVCache | None:
        """Return the cache of a ``kv_cache`` argument: None, a cache, or a dict that holds one."""
        if kv_cache is None:
            return None
        share_loops = config.kv_share == "last"
        cache: object = kv_cache
        if isinstance(kv_cache, MutableMapping):
            if not kv_cache:
                kv_cache[_KEY] = cls(share_loops=share_loops)
            cache = kv_cache.get(_KEY)
        if isinstance(cache, KVCache) and cache.share_loops == share_loops:
            return cache
        raise ConfigError(
            "not a cache of this model", where="kv_cache", value=type(kv_cache).__name__,
            allowed=f"None, KVCache(share_loops={share_loops}) (from the model's kv_share), or an "
            "initially empty dict",
            fix="start with kv_cache={} and pass the same object to every call",
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Number of cached positions."""
        return self.columns.length

    @property
    def readout(self) -> KVCache:
        """Coda cache of predictions after every loop.

        The coda's own slots hold final states. A prediction at loop t must attend to other
        positions at loop t, so this cache has a slot per loop.

        Raises:
            ConfigError: Earlier calls made no predictions.
        """
        if self._readout is None:
            self._readout = KVCache(self._capacity, self.share_loops)
        if self._readout.length != self.length:
            raise ConfigError(
                "earlier calls on this cache made no predictions per loop", where="exit_rule",
                value=f"{self._readout.length} of {self.length} positions predicted",
                allowed="an exit rule that uses predictions at every call on one cache, or at none",
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
        """Number of slots allocated: ``config.cache_slots(max loops so far)``."""
        return len(self._slots)

    def admit(self, batch: int) -> None:
        """Start a call of ``batch`` rows; an empty cache accepts any number.

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
                allowed=f"{rows.pop()} rows", fix="use a new cache for every batch",
            )  # fmt: skip
        self._slots.clear()
        self._readout = None

    def belong(self, owner: tuple[object, ...]) -> None:
        """Start a call of a model; ``owner`` is what its entries depend on, but for the weights.

        Raises:
            ConfigError: The entries are of another model.
        """
        if self._owner not in (None, owner):
            if self.length:
                raise ConfigError(
                    "the cache belongs to another model", where="kv_cache", value=self._owner,
                    allowed=str(owner), fix="use a new cache for every model",
                )  # fmt: skip
            self._slots.clear()
            self._readout = None
        self._owner = owner

    def truncate(self, length: int) -> None:
        """Remove all positions from ``length`` on."""
        if not isinstance(length, int) or not 0 <= length <= self.length:
            raise ConfigError(
                "cannot truncate a cache to more than it holds", where="KVCache.truncate",
                value=length, allowed=f"0 .. {self.length}",
                fix="pass a position within the cache",
            )  # fmt: skip
        kept = (self.columns.valid_BS, self.columns.document_BS)
        self.columns = Columns(length, *(None if x is None else x[:, :length] for x in kept))
        if self._readout is not None:
            self._readout.truncate(min(length, self._readout.length))

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        """Store the entries of the new positions; return the entries of all positions.

        Args:
            layer: Index of the layer in the model.
            loop: Loop index t; consecutive within a call.
            entry_BTW: New entries of the ``active`` positions.
            active: Rows and positions being computed; None for all.

        Returns:
            (B, S, W) with S = length + T: a view of the slot, or a copy of the active rows.

        Raises:
            ConfigError: A loop was skipped, or ``loop`` is a tensor.
        """
        if isinstance(loop, Tensor) or loop > self._written.get(layer, -1) + 1:
            raise ConfigError(
                "loops of a layer were skipped", where="KVCache.write",
                value=f"loop {loop} after {self._written.get(layer, -1) + 1} loops",
                allowed="consecutive loops, the same for all rows",
                fix="call look.predict() after every loop, or never",
            )  # fmt: skip
        self._written[layer] = loop
        n_new = entry_BTW.shape[1] if active is None else active.n_new or entry_BTW.shape[1]
        start, end = self.length, self.length + n_new
        slot = self._slot(layer, loop, entry_BTW, end)
        if active is None or active.rows is None:
            slot[:, start:end] = entry_BTW
            return slot[:, :end]
        if loop > 0 and not self.share_loops:
            # exited tokens keep the entry of their last computed loop
            slot[:, start:end] = self._slots[layer, loop - 1][:, start:end]
        active.put(slot[:, start:end], entry_BTW)
        return slot[:, :end].index_select(0, active.rows)  # twice as fast as indexing

    def entries(self, layer: int, loop: int) -> Tensor:
        """Return the (B, S, W) entries of a loop, or of the deepest one below it that ran."""
        while (layer, loop) not in self._slots and loop > 0:
            loop -= 1
        return self._slots[layer, loop][:, : self.length]

    def fill(self, slots: dict[tuple[int, int], Tensor], length: int) -> None:
        """Set the entries (B, S, W) of the first ``length`` positions, by (layer, loop)."""
        for key, entry_BSW in slots.items():
            batch, _, width = entry_BSW.shape
            slot = entry_BSW.new_zeros((batch, max(self._capacity, length), width))
            slot[:, :length] = entry_BSW[:, :length]
            self._slots[key] = slot
        self.columns = Columns(length)

    def commit(self, columns: Columns) -> None:
        """Keep the current call's positions; copy their last entries to deeper slots.

        A call that fails before the commit leaves the cache unchanged.
        """
        start, end = self.length, columns.length
        for layer, loop in sorted(self._slots, key=lambda key: key[1]):
            if not self.share_loops and loop > self._written.get(layer, loop):
                last = self._slots[layer, loop - 1]
                self._grown((layer, loop), end)[:, start:end] = last[:, start:end]
        if self._readout is not None and self._was_read:
            self._readout.commit(columns)
        self.columns = columns

    def _slot(self, layer: int, loop: int, entry_BTW: Tensor, end: int) -> Tensor:
        """Return the slot of (layer, loop), allocated for at least ``end`` positions."""
        key = (layer, 0 if self.share_loops else loop)
        if key not in self._slots and key[1] > 0:
            # positions that exited before this loop enter it with their last entry
            self._slots[key] = self._slots[layer, loop - 1].clone()
        elif key not in self._slots:
            self._capacity = max(self._capacity, end)
            batch, _, width = entry_BTW.shape
            self._slots[key] = entry_BTW.new_zeros((batch, self._capacity, width))
        return self._grown(key, end)

    def _grown(self, key: tuple[int, int], end: int) -> Tensor:
        slot = self._slots[key]
        if slot.shape[1] < end:
            self._capacity = max(self._capacity, 2 * slot.shape[1], end)
            grown = slot.new_zeros((slot.shape[0], self._capacity, slot.shape[2]))
            grown[:, : slot.shape[1]] = slot
            self._slots[key] = grown
        return self._slots[key]


class History(Protocol):
    """Keys and values that are not one tensor: in pages, or with another engine."""

    def attend(self, q_BTHK: Tensor, n_kv_heads: int, scale: float, window: int = 0) -> Tensor:
        """Return the (B, T, H, K) attention of new queries to what they may see.

        Args:
            q_BTHK: Queries, not scaled.
            n_kv_heads: Key heads G of an entry, which is (2, G, K), keys first.
            scale: Factor on the scores.
            window: Newest positions that a query sees; 0 for all.
        """
        ...


class Cache(Protocol):
    """What attention layers write to."""

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor | History:
        """Store the new tokens' entries; return what they may see, themselves included."""
        ...


def slot_index(config: MythosConfig, layer: int, loop: int) -> int:
    """Return the place of (layer, loop) among ``config.cache_slots``: prelude, coda, then loops."""
    inner = layer - config.prelude_layers
    if inner < 0:
        return layer
    if inner >= config.recurrent_layers:
        return layer - config.recurrent_layers
    loop = 0 if config.kv_share == "last" else loop
    outer = config.prelude_layers + config.coda_layers
    return outer + loop * config.recurrent_layers + inner


@checked
def cache_bytes(
    config: MythosConfig, n_loops: int, positions: int, batch: int = 1, element_size: int = 2
) -> int:
    """Return the bytes of a full cache: slots x batch x positions x width x element size."""
    return config.cache_slots(n_loops) * batch * positions * config.cache_width * element_size
