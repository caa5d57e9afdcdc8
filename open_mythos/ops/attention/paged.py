"""Attention of one new token per row over a history kept in pages.

All rows share one pool of pages; a table names the pages of each row, in order of position. A page
may hold anything beyond its row's length, not-a-number included, and zero times NaN is NaN. So
such positions are never read: where a shape asks for them, the row's first position stands in.

**Results of a row do not depend on the other rows** in the form "groups": rows of equal page counts
are computed together, each over a width that is its own. With one width for all rows, the longest
row would decide in which order every row's sums are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.backend import pick_backend

Split = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Keys and values, (r, G, S, K) each, of entries (r, S, W)."""


GATHER_BYTES = 2 << 20
"""Largest copy of pages at once on a CPU: larger ones are memory that the system maps afresh."""


@dataclass(frozen=True)
class PagedHistory:
    """What each row sees of one level (layer and loop) of a paged cache.

    Attributes:
        pool_NPW: All N pages of the cache, of P positions each. Page 0 belongs to no row.
        table_RM: (R, M) int64 pages of each row, in order of position; 0 beyond its own.
        lengths_R: (R,) int64 positions that a row sees, at least 1: its new token is included.
        groups: Runs of rows with equal page counts, which cover all rows: first row, end row,
            pages. None: one width for all rows, so that no shape depends on the lengths.
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

    def places(self, pages: int) -> tuple[Tensor, Tensor]:
        """Return where the entries of the first ``pages`` pages of every row lie.

        Returns:
            (R, S) indices into the flattened pool, of the row's first entry where it sees none;
            (R, S) boolean, true where it sees one.
        """
        device, table_RM = self.table_RM.device, self.table_RM[:, :pages]
        within = torch.arange(self.page, device=device)
        place_RS = (table_RM.unsqueeze(-1) * self.page + within).flatten(1)
        position = torch.arange(place_RS.shape[1], device=device)
        seen_RS = position < self.lengths_R.unsqueeze(1)
        return torch.where(seen_RS, place_RS, place_RS[:, :1]), seen_RS

    def gather(self, place_RS: Tensor) -> Tensor:
        """Copy the entries (R, S, W) of these places."""
        entry = self.pool_NPW.flatten(0, 1).index_select(0, place_RS.flatten())
        return entry.view(*place_RS.shape, -1)


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
    place_RS, seen_RS = history.places(max(pages for _, _, pages in history.groups))
    # as it would be converted for every run
    bias_RS = torch.zeros_like(seen_RS, dtype=q_RGHK.dtype).masked_fill_(~seen_RS, -torch.inf)
    parts = []
    for first, end, pages in history.groups:
        width = pages * history.page
        for rows in _pieces(history, first, end, width):
            entry_RSW = history.gather(place_RS[rows, :width])
            parts.append(_fused(q_RGHK[rows], entry_RSW, bias_RS[rows, :width], split, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(history: PagedHistory, first: int, end: int, width: int) -> Iterator[slice]:
    """Split a run of rows whose entries, copied at once, would be too large."""
    row_bytes = width * history.pool_NPW.shape[-1] * history.pool_NPW.itemsize
    rows = max(1, GATHER_BYTES // row_bytes)
    return (slice(start, min(start + rows, end)) for start in range(first, end, rows))


def _masked(q_RGHK: Tensor, history: PagedHistory, split: Split, scale: float) -> Tensor:
    """One fused call over all pages of the table: constant shape, and nothing read on the host."""
    place_RS, seen_RS = history.places(history.table_RM.shape[1])
    return _fused(q_RGHK, history.gather(place_RS), seen_RS, split, scale)


def _fused(
    q_RGHK: Tensor, entry_RSW: Tensor, mask_RS: Tensor, split: Split, scale: float
) -> Tensor:
    """PyTorch's kernel; the query heads that share a key head stand as its query positions."""
    rows, heads = q_RGHK.shape[0], q_RGHK.shape[2]
    if q_RGHK.device.type == "cpu" and torch.get_num_threads() > 1:
        # A thread's bits depend on how its scratch memory is aligned: with 8 queries always alike.
        q_RGHK = F.pad(q_RGHK, (0, 0, 0, -heads % 8))
        if rows == 1:  # threads would share the products of a single head
            q_RGHK, entry_RSW = q_RGHK.expand(2, -1, -1, -1), entry_RSW.expand(2, -1, -1)
            mask_RS = mask_RS.expand(2, -1)
    mixed = F.scaled_dot_product_attention(
        q_RGHK, *split(entry_RSW), attn_mask=mask_RS[:, None, None], scale=scale
    )
    return mixed[:rows, :, :heads]


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "groups": _groups,
    "masked": _masked,
    "reference": _reference,
}
"""Forms: "groups" needs the page counts on the host, "masked" has a constant shape."""
