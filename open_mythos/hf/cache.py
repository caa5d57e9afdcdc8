"""A cache of ``transformers`` as the cache of the core.

Each (layer, loop) has a slot, a layer of the ``Cache``. A slot's keys hold whole entries
(B, 1, S, W), of grouped-query and of latent attention alike, and its values are zero wide.
Reordering by beams, cropping and expanding therefore work as for any model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from open_mythos.config import MythosConfig
from open_mythos.errors import ConfigError
from open_mythos.model.active import Active
from open_mythos.model.cache import Columns, KVCache, slot_index


class SlotCache(KVCache):
    """One call on a ``Cache``.

    Slots: prelude, coda, then loop after loop; with ``kv_share="last"`` one loop. A slot deeper
    than earlier calls went is filled from the loop before it, and tokens that stop early leave
    their last entries in all deeper slots, as in :class:`KVCache`.

    Args:
        cache: A plain ``DynamicCache`` or ``StaticCache``.
        cfg: The configuration of the core.
        valid_BS: (B, S) true on real tokens, cached and new; None without padding.

    Raises:
        ConfigError: The cache is of another kind.
    """

    def __init__(self, cache: Cache, cfg: MythosConfig, valid_BS: Tensor | None = None) -> None:
        super().__init__(share_loops=cfg.kv_share == "last")
        self.cache: Any = cache  # layers of several kinds
        self.cfg = cfg
        if getattr(cache, "offloading", False) or not all(map(_is_plain, cache.layers)):
            raise ConfigError(
                "a cache of this kind has no place for loops", where="past_key_values",
                value=type(cache).__name__, allowed="DynamicCache or StaticCache, not offloaded",
                fix="leave cache_implementation out, or use \"static\"",
            )  # fmt: skip
        length = int(cache.get_seq_length())
        self.columns = Columns(length, None if valid_BS is None else valid_BS[:, :length])

    def admit(self, batch: int) -> None:
        """Start a call of ``batch`` rows.

        Raises:
            ConfigError: The cache holds another number of rows.
        """
        rows = self.cache.layers[0].keys.shape[0] if self.length else batch
        if rows != batch:
            raise ConfigError(
                "the cache belongs to another batch", where="past_key_values",
                value=f"{batch} rows", allowed=f"{rows} rows",
                fix="use a new cache for every batch",
            )  # fmt: skip

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        """Store the entries of the new positions; see :meth:`KVCache.write`."""
        assert isinstance(loop, int), "rows of a call are at the same loop"
        self._written[layer] = loop
        n_new = entry_BTW.shape[1] if active is None else active.n_new or entry_BTW.shape[1]
        start, end = self.length, self.length + n_new
        slot = self._place(layer, loop, end)
        again = loop > 0 and self.share_loops
        if loop > 0 and not again:
            self._fill(slot, self._place(layer, loop - 1, end), start)
        if loop > 0 and active is not None and active.rows is not None:
            # exited tokens keep the entry of their last computed loop
            before = slot if again else self._place(layer, loop - 1, end)
            whole_BTW = self._entries(before)[:, start:end].clone()
            active.put(whole_BTW, entry_BTW)
            entry_BTW = whole_BTW
        if again:
            self._entries(slot)[:, start:end] = entry_BTW
        else:
            self._append(slot, entry_BTW)
        entry_BSW = self._entries(slot)[:, :end]
        if active is None or active.rows is None:
            return entry_BSW
        return entry_BSW.index_select(0, active.rows)

    @property
    def readout(self) -> KVCache:
        """Raise: predictions inside the loop have no place in a ``Cache``.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "a rule that predicts inside the loop cannot use this cache", where="exit_rule",
            value="kl or stable", allowed="fixed, gate, change or acceleration",
            fix="use one of these rules, or use_cache=False",
        )  # fmt: skip

    def commit(self, columns: Columns) -> None:
        """Copy the last entries of the call to the slots of deeper loops."""
        first = self.cfg.prelude_layers
        for layer in range(first, first + self.cfg.recurrent_layers):
            loop = self._written[layer] + 1
            while not self.share_loops and self._holds(layer, loop):
                source = self._place(layer, loop - 1, columns.length)
                self._fill(self._place(layer, loop, columns.length), source, columns.length)
                loop += 1
        self.columns = columns

    def _holds(self, layer: int, loop: int) -> bool:
        """Return whether the slot of (layer, loop) has entries."""
        layers, index = self.cache.layers, slot_index(self.cfg, layer, loop)
        return index < len(layers) and int(layers[index].get_seq_length()) > 0

    def _place(self, layer: int, loop: int, end: int) -> int:
        """Return the slot of (layer, loop), added if missing, with room for ``end`` positions."""
        layers, index = self.cache.layers, slot_index(self.cfg, layer, loop)
        most = self.cfg.max_seq_len
        if layers and isinstance(layers[-1], StaticLayer):
            most = layers[-1].max_cache_len
        if end > most:
            raise ConfigError(
                "the cache is full", where="past_key_values", value=f"{end} positions",
                allowed=f"at most {most}", fix="make a StaticCache with a larger max_cache_len",
            )  # fmt: skip
        while len(layers) <= index:
            static = bool(layers) and isinstance(layers[-1], StaticLayer)
            layers.append(StaticLayer(max_cache_len=most) if static else DynamicLayer())
        return index

    def _entries(self, slot: int) -> Tensor:
        """Return the entries (B, S, W) of a slot, unused capacity included."""
        return self.cache.layers[slot].keys[:, 0]

    def _append(self, slot: int, entry_BTW: Tensor) -> None:
        entry_B1TW = entry_BTW.unsqueeze(1)
        self.cache.update(entry_B1TW, entry_B1TW[..., :0], slot)

    def _fill(self, slot: int, source: int, length: int) -> None:
        """Append the entries of ``source`` that ``slot`` lacks, up to ``length`` positions."""
        held = int(self.cache.layers[slot].get_seq_length())
        if held < length:
            self._append(slot, self._entries(source)[:, held:length])


def _is_plain(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, StaticLayer)
