"""Attention of one new token per row over a history kept in pages.

All rows share one pool of pages; a table names the pages of each row, in order of position. A page
may hold anything beyond its row's length, not-a-number included: such positions are set to zero
before they enter a product, because zero times NaN is NaN.

**Results of a row do not depend on the other rows** in the form "groups": rows of equal page counts
are computed together, each over a width that is its own. With one width for all rows, the longest
row would decide in which order every row's sums are formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.backend import pick_backend

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys and values, (r, G, S, K) each, of entries (r, S, W)."""


@dataclass(frozen=True)
class PagedHistory:
    """What each row sees of one level (layer and loop) of a paged cache.

    Attributes:
        pool_NPW: All N pages of the cache, of P positions each. Page 0 belongs to no row.
        table_RM: (R, M) int64 pages of each row, in order of position; 0 beyond its own.
        lengths_R: (R,) int64 positions that a row sees, its new token included. A row of length 0
            gets zeros.
        groups: Runs of rows with equal page counts: first row, end row, pages; they cover all rows,
            and the rows of a run fill all of its pages but the last. None: one width for all rows,
            so that no shape depends on the lengths.
    """

    pool_NPW: Tensor
    table_RM: Tensor
    lengths_R: Tensor
    groups: tuple[tuple[int, int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.table_RM)

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.pool_NPW.shape[1]

    def gather(self, first: int, end: int, pages: int, full: int = 0) -> tuple[Tensor, Tensor]:
        """Copy the first ``pages`` pages of rows ``first`` .. ``end``.

        Args:
            full: Number of leading pages that all of these rows are known to fill.

        Returns:
            (r, S, W) entries, zero where a row sees nothing; (r, S) boolean, true where it sees.
        """
        table = self.table_RM[first:end, :pages]
        entry_RSW = self.pool_NPW.index_select(0, table.reshape(-1)).view(
            end - first, pages * self.page, self.pool_NPW.shape[-1]
        )
        position = torch.arange(pages * self.page, device=table.device)
        seen_RS = position < self.lengths_R[first:end, None]
        start = full * self.page
        entry_RSW[:, start:].masked_fill_(~seen_RS[:, start:, None], 0.0)
        return entry_RSW, seen_RS


def latent_paged(q_RHW: Tensor, history: PagedHistory, rank: int, backend: str = "auto") -> Tensor:
    """Attend to latents: an entry is the key, and its first ``rank`` elements the value.

    Args:
        q_RHW: Scaled queries, as for :func:`~open_mythos.ops.attention.latent.latent_attend`.
        history: What each row sees.
        rank: Width of a latent.
        backend: "auto", "groups", "masked" or "reference"; see :data:`BACKENDS`.

    Returns:
        (R, H, rank), in the dtype of the queries.
    """
    run = _pick("paged latent attention", history, backend)
    mixed = run(q_RHW.unsqueeze(1).to(history.pool_NPW.dtype), history, _latents, 1.0)
    return mixed[:, 0, :, :rank].to(q_RHW.dtype)


def kv_paged(
    q_RHK: Tensor, history: PagedHistory, n_kv_heads: int, backend: str = "auto"
) -> Tensor:
    """Attend to keys and values of ``n_kv_heads`` heads: an entry is (2, G, K), keys first.

    Args:
        q_RHK: Queries, not scaled; H is a multiple of G.
        history: What each row sees.
        n_kv_heads: G.
        backend: As for :func:`latent_paged`.

    Returns:
        (R, H, K), in the dtype of the queries.
    """
    run = _pick("paged attention", history, backend)
    q_RGHK = q_RHK.unflatten(1, (n_kv_heads, -1)).to(history.pool_NPW.dtype)
    split = partial(_keys_and_values, n_kv_heads)
    return run(q_RGHK, history, split, q_RHK.shape[-1] ** -0.5).flatten(1, 2).to(q_RHK.dtype)


def _pick(op: str, history: PagedHistory, backend: str) -> Callable[..., Tensor]:
    if backend == "auto":
        backend = "masked" if history.groups is None else "groups"
    return pick_backend(op, backend, BACKENDS)


def _latents(entry_RSW: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of one head; the rotary part of the values is dropped from the result."""
    return entry_RSW.unsqueeze(1), entry_RSW.unsqueeze(1)


def _keys_and_values(n_kv_heads: int, entry_RSW: Tensor) -> tuple[Tensor, Tensor]:
    k_RGSK, v_RGSK = entry_RSW.unflatten(-1, (2, n_kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return k_RGSK, v_RGSK


def _reference(q_RGHK: Tensor, history: PagedHistory, split: Split, scale: float) -> Tensor:
    """Reference implementation, row by row: scores in float32, softmax, weighted sum."""
    rows = []
    for q_GHK, table, length in zip(q_RGHK, history.table_RM, history.lengths_R, strict=True):
        entry_SW = history.pool_NPW[table].flatten(0, 1)[: int(length)].float()
        k_GSK, v_GSK = (part[0] for part in split(entry_SW.unsqueeze(0)))
        rows.append((q_GHK.float() @ k_GSK.mT * scale).softmax(-1) @ v_GSK)
    return torch.stack(rows).to(q_RGHK.dtype)


def _groups(q_RGHK: Tensor, history: PagedHistory, split: Split, scale: float) -> Tensor:
    """One fused call per run of rows with equal page counts."""
    assert history.groups is not None, "the rows' page counts are not known on the host"
    runs = [
        _fused(q_RGHK[first:end], *history.gather(first, end, pages, pages - 1), split, scale)
        for first, end, pages in history.groups
    ]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def _masked(q_RGHK: Tensor, history: PagedHistory, split: Split, scale: float) -> Tensor:
    """One fused call over all pages of the table: constant shape, and nothing read on the host."""
    gathered = history.gather(0, *history.table_RM.shape)
    return _fused(q_RGHK, *gathered, split, scale)


def _fused(
    q_RGHK: Tensor, entry_RSW: Tensor, seen_RS: Tensor, split: Split, scale: float
) -> Tensor:
    """PyTorch's kernel; the query heads that share a key head stand as its query positions."""
    rows, heads = q_RGHK.shape[0], q_RGHK.shape[2]
    if q_RGHK.device.type == "cpu" and torch.get_num_threads() > 1:
        # A thread's bits depend on how its scratch memory is aligned: with 8 queries always alike.
        q_RGHK = F.pad(q_RGHK, (0, 0, 0, -heads % 8))
        if rows == 1:  # threads would share the products of a single head
            q_RGHK, entry_RSW = q_RGHK.expand(2, -1, -1, -1), entry_RSW.expand(2, -1, -1)
            seen_RS = seen_RS.expand(2, -1)
    mask = seen_RS[:, None, None]
    mixed = F.scaled_dot_product_attention(q_RGHK, *split(entry_RSW), attn_mask=mask, scale=scale)
    return mixed[:rows, :, :heads]


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "groups": _groups,
    "masked": _masked,
    "reference": _reference,
}
"""Forms: "groups" needs the page counts on the host, "masked" has a constant shape."""
