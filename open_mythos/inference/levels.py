"""KV cache of the engine: pages of fixed size, each holding positions of one level.

A *level* is one (layer, loop): prelude layers first, then coda layers, then the recurrent layers
of loop 0, 1, ... Rows at different loops read different levels of the same pool, so that no tensor
of the cache depends on how deep a row is.

A token that exits after s loops holds the entry of loop s - 1 at all deeper levels, as in
:class:`~open_mythos.model.cache.KVCache`: :meth:`LevelCache.copy_on_exit` writes it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from open_mythos.checks import check_number
from open_mythos.devices import free_memory
from open_mythos.inference.pages import PAGE, Layout
from open_mythos.model.active import Active
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.layers.block import TransformerBlock
from open_mythos.ops.attention.paged import PagedHistory

Groups = tuple[tuple[int, int, int], ...]
"""(first row, end row, pages): runs of rows that hold equally many pages."""


class LevelCache:
    """Pool of pages and the page table of every slot.

    Args:
        layout: Layers and page size.
        n_slots: Number of slots; one more, the dummy, pads batches.
        n_pages: Pages of the pool, besides page 0, a dummy that receives discarded writes.
        max_loops: Deepest request.
        context: Most positions of a sequence.
        width: Elements W of an entry.
        dtype: Of the entries.
        device: Of the pool.
    """

    def __init__(
        self, layout: Layout, n_slots: int, n_pages: int, max_loops: int, context: int, width: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.layout, self._max_loops = layout, max_loops
        n_blocks, n_levels = -(-context // layout.page), layout.levels(max_loops)
        with torch.device(device):
            self.pool_NPW = torch.zeros(n_pages + 1, layout.page, width, dtype=dtype)
            self.table_BLM = torch.zeros(n_slots + 1, n_levels, n_blocks, dtype=torch.long)
        outer = layout.prelude + layout.coda
        loops = torch.arange(1 if layout.share_loops else max_loops, device=device)
        layers = torch.arange(layout.recurrent, device=device)
        self._level_LR = outer + loops.unsqueeze(1) * layout.recurrent + layers

    def assign(self, slot: int, pages: Sequence[Sequence[int]]) -> None:
        """Set the pages of a slot, by level."""
        table_LM = torch.zeros(self.table_BLM.shape[1:], dtype=torch.long)
        for level, own in enumerate(pages):
            table_LM[level, : len(own)] = torch.tensor(own, dtype=torch.long)
        self.table_BLM[slot] = table_LM.to(self.table_BLM.device)

    def at(
        self, slots_R: Tensor, positions_R: Tensor, real_R: Tensor | None = None,
        groups: Groups | None = None, n_blocks: int | None = None,
    ) -> LevelRows:  # fmt: skip
        """Return the cache of a step that computes position ``positions_R`` of these slots.

        Args:
            slots_R: (R,) slots.
            positions_R: (R,) positions of the new tokens.
            real_R: (R,) false on rows whose entries are discarded; None if there are none.
            groups: Runs of rows with equally many pages, where the host knows them.
            n_blocks: Pages of a level to read at most; all by default.
        """
        table_RLM, page = self.table_BLM.index_select(0, slots_R), self.layout.page
        block_R = positions_R >> page.bit_length() - 1  # a power of two
        index_RL1 = block_R.view(-1, 1, 1).expand(-1, table_RLM.shape[1], 1)
        page_RL = table_RLM.gather(2, index_RL1).squeeze(2)
        if real_R is not None:
            page_RL = page_RL * real_R.unsqueeze(1)
        at_RL = page_RL * page + (positions_R & page - 1).unsqueeze(1)
        return LevelRows(
            self.layout, self.pool_NPW, table_RLM[..., :n_blocks], at_RL, positions_R + 1, groups
        )

    def copy_on_exit(self, rows: LevelRows, loops_R: Tensor, most_R: Tensor) -> None:
        """Copy the entries of loop ``loops_R`` - 1 to all deeper loops, at the rows' positions.

        Args:
            rows: The step's cache.
            loops_R: (R,) loops that each token has run.
            most_R: (R,) loops that each slot has levels for.
        """
        if self.layout.share_loops or not self.layout.recurrent:
            return
        pool = self.pool_NPW.view(-1, self.pool_NPW.shape[-1])
        n_loops = len(self._level_LR)
        last_RR = self._level_LR[(loops_R - 1).clamp(0, n_loops - 1)]
        entry = pool[rows.at_RL.gather(1, last_RR)]  # (rows, layers, W)
        loop_L = torch.arange(n_loops, device=loops_R.device)
        deeper_RL = (loop_L >= loops_R.unsqueeze(1)) & (loop_L < most_R.unsqueeze(1))
        to = rows.at_RL[:, self._level_LR] * deeper_RL.unsqueeze(-1)  # 0: the dummy page
        pool[to.flatten()] = entry.unsqueeze(1).expand(*to.shape, -1).flatten(0, 2)

    def store(
        self, slot: int, cache: KVCache, start: int, stop: int, n_loops: int, row: int = 0,
        column: int | None = None,
    ) -> None:  # fmt: skip
        """Copy columns of a prompt's cache to the positions ``start`` .. ``stop`` of a slot.

        Loops that the prompt did not run take the entry of its last one.

        Args:
            slot: The slot.
            cache: Cache of the prompt.
            start: First position.
            stop: End of the positions.
            n_loops: Loops that the slot has levels for.
            row: Row of ``cache``.
            column: Column of position ``start`` in ``cache``; ``start`` by default.
        """
        layout, page = self.layout, self.layout.page
        first = start if column is None else column
        position_T = torch.arange(start, stop, device=self.table_BLM.device)
        pool = self.pool_NPW.view(-1, self.pool_NPW.shape[-1])
        for level, (layer, loop) in enumerate(cache_slots(layout, n_loops)):
            entry_TW = cache.entries(layer, loop)[row, first : first + stop - start]
            page_T = self.table_BLM[slot, level, position_T // page]
            pool[page_T * page + position_T % page] = entry_TW.to(pool.dtype)

    def restore(self, slot: int, n_positions: int, n_loops: int, capacity: int) -> KVCache:
        """Return a prompt's cache with a slot's first positions: after a prefix hit or a swap."""
        cache = KVCache(capacity, self.layout.share_loops)
        if not n_positions:
            return cache
        n_pages = self.layout.rows(n_positions)
        slots = {
            key: self.pool_NPW[self.table_BLM[slot, level, :n_pages]].flatten(0, 1)[None]
            for level, key in enumerate(cache_slots(self.layout, n_loops))
        }
        cache.fill(slots, n_positions)
        return cache


@dataclass(frozen=True)
class LevelRows:
    """The rows of one step, as attention layers see them (``ctx.cache``)."""

    layout: Layout
    pool_NPW: Tensor
    table_RLM: Tensor
    """Pages of every row, by level."""
    at_RL: Tensor
    """Index of the new token's entry in the pool, by level; within page 0 to discard it."""
    lengths_R: Tensor
    """Positions that a row sees, the new one included."""
    groups: Groups | None = None

    def write(
        self, layer: int, loop: int | Tensor, entry_R1W: Tensor, active: Active | None = None
    ) -> PagedHistory:
        """Store the entries of the new tokens; return the rows' history at this level.

        Args:
            layer: Index of the layer in the model.
            loop: Loop index, for all rows or (R,) per row.
            entry_R1W: New entries.
            active: Not used: discarded rows are marked in ``at_RL``.
        """
        level = self._level(layer, loop)
        if isinstance(level, Tensor):
            at_R = self.at_RL.gather(1, level)[:, 0]
            table_RM = self.table_RLM.take_along_dim(level.unsqueeze(-1), dim=1)[:, 0]
        else:
            at_R, table_RM = self.at_RL[:, level], self.table_RLM[:, level]
        pool = self.pool_NPW.view(-1, self.pool_NPW.shape[-1])
        pool.index_copy_(0, at_R, entry_R1W[:, 0].to(pool.dtype))
        return PagedHistory(self.pool_NPW, table_RM, self.lengths_R, self.groups)

    def _level(self, layer: int, loop: int | Tensor) -> int | Tensor:
        """Return the level of a layer, for all rows or (R, 1) per row."""
        layout, inner = self.layout, layer - self.layout.prelude
        if not 0 <= inner < layout.recurrent:
            return layer if inner < 0 else layer - layout.recurrent
        first = layout.prelude + layout.coda + inner
        if layout.share_loops:
            return first
        if isinstance(loop, Tensor):
            return (first + loop * layout.recurrent).expand(len(self.lengths_R)).unsqueeze(1)
        return first + loop * layout.recurrent


def cache_slots(layout: Layout, n_loops: int) -> list[tuple[int, int]]:
    """Return the (layer, loop) of every level of a request of ``n_loops`` loops."""
    inner, outer = layout.prelude, layout.prelude + layout.recurrent
    loops = min(n_loops, 1) if layout.share_loops else n_loops
    levels = [(layer, 0) for layer in range(inner)]
    levels += [(outer + layer, 0) for layer in range(layout.coda)]
    return levels + [(inner + layer, t) for t in range(loops) for layer in range(layout.recurrent)]


def layout_of(model: CausalLM, page: int = PAGE) -> Layout:
    """Return the levels of a model's cache."""
    cfg = model.cfg
    if not hasattr(model, "recurrent"):
        return Layout(sum(isinstance(m, TransformerBlock) for m in model.modules()), page=page)
    return Layout(
        cfg.prelude_layers, cfg.recurrent_layers, cfg.coda_layers, cfg.kv_share == "last", page
    )


def pages_in_memory(layout: Layout, most: int, width: int, weight: Tensor, kv_memory: float) -> int:
    """Return how many pages fit into the memory of a cache, at most ``most`` and at least one.

    Args:
        layout: Page size.
        most: Pages that are needed.
        width: Elements of an entry.
        weight: A tensor of the entries' dtype and device.
        kv_memory: Bytes if above 1, else a part of the free memory.

    Raises:
        ConfigError: ``kv_memory`` is out of range.
    """
    check_number("kv_memory", kv_memory, gt=0)
    page_bytes = layout.page * width * weight.element_size()
    budget = kv_memory if kv_memory > 1 else kv_memory * free_memory(weight.device)
    return max(1, min(most, int(budget // page_bytes)))
