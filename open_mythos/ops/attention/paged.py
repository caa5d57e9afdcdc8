"""Attention of one new token per row over a history kept in pages.

All rows share one pool of pages; a table names the pages of each row, in order of position. A page
may hold anything beyond its row's length, not-a-number included, and zero times NaN is NaN. So
such positions are never read: where a shape asks for them, the row's first position stands in.

**Results of a row do not depend on the other rows**, bit for bit, in the forms "groups" and
"triton". In the first, rows of equal page counts are computed together, over a width that is their
own: with one width for all, the longest row would decide in which order every row's sums are
formed. The kernel splits every row at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from open_mythos.ops.backend import CHECKS, pick_backend, triton_serves

WIDEST = {torch.float32: 512, torch.bfloat16: 1024, torch.float16: 1024}
"""Widest value that the Triton kernel holds, by the pool's dtype."""

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
        window: Positions that a row sees at most, the newest ones; 0 for all.
    """

    pool_NPW: Tensor
    table_RM: Tensor
    lengths_R: Tensor
    groups: tuple[tuple[int, int, int], ...] | None = None
    window: int = 0

    def __len__(self) -> int:
        return len(self.table_RM)

    @property
    def page(self) -> int:
        """Positions of a page."""
        return self.pool_NPW.shape[1]

    def attend(self, q_R1HK: Tensor, n_kv_heads: int, scale: float, window: int = 0) -> Tensor:
        """Return (R, 1, H, K): attention of one new token per row to keys and values."""
        assert q_R1HK.shape[1] == 1, "one new token per row"
        history = replace(self, window=window) if window else self
        return kv_paged(q_R1HK[:, 0], history, n_kv_heads, scale=scale).unsqueeze(1)

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
        if self.window:
            seen_RS = seen_RS & (position >= self.lengths_R.unsqueeze(1) - self.window)
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
        backend: "auto" or one of :data:`BACKENDS`.

    Returns:
        (R, H, rank), in the dtype of the queries.

    Raises:
        ConfigError: Unknown backend, or "triton" was requested and cannot serve the call.
    """
    return _attend(q_RHW.unsqueeze(1), history, rank, 1.0, backend).squeeze(1)


def kv_paged(
    q_RHK: Tensor, history: PagedHistory, n_kv_heads: int, backend: str = "auto",
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attend to keys and values of ``n_kv_heads`` heads: an entry is (2, G, K), keys first.

    Args:
        q_RHK: Queries, not scaled; H is a multiple of G.
        history: What each row sees.
        n_kv_heads: G.
        backend: As for :func:`latent_paged`.
        scale: Factor on the scores; 1 / sqrt(K) by default.

    Returns:
        (R, H, K), in the dtype of the queries.

    Raises:
        ConfigError: As :func:`latent_paged`.
    """
    q_RGHK = q_RHK.unflatten(1, (n_kv_heads, -1))
    scale = q_RHK.shape[-1] ** -0.5 if scale is None else scale
    return _attend(q_RGHK, history, None, scale, backend).flatten(1, 2)


def decode(
    q_RGHK: Tensor, pool_NPW: Tensor, table_RM: Tensor | None, lengths_R: Tensor | None,
    valid_RS: Tensor | None, rank: int | None, scale: float,
) -> Tensor:  # fmt: skip
    """Run the Triton kernel; see :func:`kernel_serves`.

    Lengths and tables stay on the device: there is no host-device sync. A row that sees nothing
    gets zeros.

    Args:
        q_RGHK: Queries of the H heads that share each of G key heads.
        pool_NPW: Pages; any strides, unit along W.
        table_RM: As in :class:`PagedHistory`. None: row r has page r, of any size.
        lengths_R: As in :class:`PagedHistory`. None: all rows see all positions.
        valid_RS: Boolean, false on further positions that a row does not see; their entries must
            be finite.
        rank: Width of a latent; None for keys and values.
        scale: Factor on the scores.

    Returns:
        (R, G, H, V), in the dtype of the pool; sums and softmax are float32.
    """
    from open_mythos.ops.kernels import paged_decode

    q_RGHK = q_RGHK.to(pool_NPW.dtype).contiguous()
    compiling = torch.compiler.is_compiling()
    run = paged_decode.decode_op if compiling else paged_decode.decode
    return run(q_RGHK, pool_NPW, table_RM, lengths_R, valid_RS, rank, scale)


def kernel_serves(
    q_RGHK: Tensor, pool_NPW: Tensor, rank: int | None, backend: str = "auto"
) -> bool:
    """Return whether the Triton kernel serves these queries and pages.

    Raises:
        ConfigError: ``backend`` is "triton", and it cannot.
    """
    return triton_serves("paged_decode", backend, pool_NPW, _problem(q_RGHK, pool_NPW, rank))


def _problem(q_RGHK: Tensor, pool_NPW: Tensor, rank: int | None) -> str | None:
    """Return why the kernel cannot serve the call, or None."""
    if torch.is_grad_enabled() and (q_RGHK.requires_grad or pool_NPW.requires_grad):
        return "a call that needs a gradient"
    if pool_NPW.dtype not in WIDEST:
        return f"entries of {pool_NPW.dtype}"
    if pool_NPW.stride(-1) != 1:
        return f"entries with stride {pool_NPW.stride(-1)}"
    width = q_RGHK.shape[-1] if rank is None else rank
    if width > WIDEST[pool_NPW.dtype]:
        return f"{pool_NPW.dtype} values of {width}, wider than {WIDEST[pool_NPW.dtype]}"
    return None


def _attend(
    q_RGHK: Tensor, history: PagedHistory, rank: int | None, scale: float, backend: str
) -> Tensor:
    """Return (R, G, H, V) by the backend of this name, in the dtype of the queries."""
    pool_NPW = history.pool_NPW
    if backend == "auto":
        backend = "masked" if history.groups is None else "groups"
        if pool_NPW.is_cuda and not history.window and kernel_serves(q_RGHK, pool_NPW, rank):
            backend = "triton"
    elif backend == "triton":
        triton_serves(
            "paged_decode", backend, pool_NPW,
            "a window" if history.window else _problem(q_RGHK, pool_NPW, rank),
        )  # fmt: skip
    run = pick_backend("paged attention", backend, BACKENDS)
    return run(q_RGHK.to(pool_NPW.dtype), history, rank, scale).to(q_RGHK.dtype)


def _split(entry_RSW: Tensor, rank: int | None, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values, (R, G, S, K) each; a latent's values hold its rotary key too."""
    if rank is not None:
        # slicing it off would copy the values
        return entry_RSW.unsqueeze(1), entry_RSW.unsqueeze(1)
    k_RGSK, v_RGSK = entry_RSW.unflatten(-1, (2, kv_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return k_RGSK, v_RGSK


def _reference(q_RGHK: Tensor, history: PagedHistory, rank: int | None, scale: float) -> Tensor:
    """Reference implementation, row by row: scores in float32, softmax, weighted sum."""
    rows = []
    for q_GHK, table, length in zip(q_RGHK, history.table_RM, history.lengths_R, strict=True):
        first = max(0, int(length) - history.window) if history.window else 0
        entry_SW = history.pool_NPW[table].flatten(0, 1)[first : int(length)].float()
        k_GSK, v_GSK = (part[0] for part in _split(entry_SW.unsqueeze(0), rank, len(q_GHK)))
        rows.append((q_GHK.float() @ k_GSK.mT * scale).softmax(-1) @ v_GSK)
    return torch.stack(rows)[..., :rank].to(q_RGHK.dtype)


def _groups(q_RGHK: Tensor, history: PagedHistory, rank: int | None, scale: float) -> Tensor:
    """One fused call per run of rows with equal page counts."""
    assert history.groups is not None, "the rows' page counts are not known on the host"
    place_RS, seen_RS = history.places(max(pages for _, _, pages in history.groups))
    # as it would be converted for every run
    bias_RS = torch.zeros_like(seen_RS, dtype=q_RGHK.dtype).masked_fill_(~seen_RS, -torch.inf)
    run = _fused if torch.get_num_threads() == 1 else _fused_alike
    parts = []
    for first, end, pages in history.groups:
        width = pages * history.page
        for rows in _pieces(history, first, end, width):
            entry_RSW = history.gather(place_RS[rows, :width])
            parts.append(run(q_RGHK[rows], entry_RSW, bias_RS[rows, :width], rank, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _pieces(history: PagedHistory, first: int, end: int, width: int) -> Iterator[slice]:
    """Split a run of rows whose entries, copied at once, would be too large."""
    row_bytes = width * history.pool_NPW.shape[-1] * history.pool_NPW.itemsize
    rows = max(1, GATHER_BYTES // row_bytes)
    return (slice(start, min(start + rows, end)) for start in range(first, end, rows))


def _masked(q_RGHK: Tensor, history: PagedHistory, rank: int | None, scale: float) -> Tensor:
    """One fused call over all pages of the table: constant shape, and nothing read on the host."""
    place_RS, seen_RS = history.places(history.table_RM.shape[1])
    return _fused(q_RGHK, history.gather(place_RS), seen_RS, rank, scale)


def _fused(
    q_RGHK: Tensor, entry_RSW: Tensor, mask_RS: Tensor, rank: int | None, scale: float
) -> Tensor:
    """PyTorch's kernel; the query heads that share a key head stand as its query positions."""
    k_RGSK, v_RGSK = _split(entry_RSW, rank, q_RGHK.shape[1])
    mixed_RGHV = F.scaled_dot_product_attention(
        q_RGHK, k_RGSK, v_RGSK, attn_mask=mask_RS[:, None, None], scale=scale
    )
    return mixed_RGHV[..., :rank]


def _fused_alike(
    q_RGHK: Tensor, entry_RSW: Tensor, mask_RS: Tensor, rank: int | None, scale: float
) -> Tensor:
    """The same with several threads, so that a row's bits do not depend on which thread it gets.

    Their scratch memories follow each other and matmuls depend on alignment: with a multiple of 8
    queries all are aligned alike. A single row of one key head would be shared by the threads,
    which sums in another order, so it gets company.
    """
    rows, _, heads, _ = q_RGHK.shape
    q_RGHK = F.pad(q_RGHK, (0, 0, 0, -heads % 8))
    if rows == 1:
        q_RGHK, entry_RSW = q_RGHK.expand(2, -1, -1, -1), entry_RSW.expand(2, -1, -1)
        mask_RS = mask_RS.expand(2, -1)
    return _fused(q_RGHK, entry_RSW, mask_RS, rank, scale)[:rows, :, :heads]


def _triton(q_RGHK: Tensor, history: PagedHistory, rank: int | None, scale: float) -> Tensor:
    """One kernel, which reads the pages where they lie."""
    table_RM, lengths_R = history.table_RM, history.lengths_R
    return decode(q_RGHK, history.pool_NPW, table_RM, lengths_R, None, rank, scale)


BACKENDS: dict[str, Callable[..., Tensor]] = {
    "groups": _groups,
    "masked": _masked,
    "triton": _triton,
    "reference": _reference,
}
"""Forms: "groups" needs the page counts on the host; "masked" and "triton" have constant shapes."""


def _small_case(device: torch.device) -> tuple[Tensor, Tensor]:
    """Run latents, and keys and values, of two rows through the kernel and the reference."""
    generator = torch.Generator().manual_seed(0)
    pool_NPW = torch.randn(7, 48, 40, generator=generator).to(device)
    table_RM = torch.tensor([[4, 1, 6, 2, 3, 5, 1], [5, 0, 0, 0, 0, 0, 0]]).to(device)
    history = PagedHistory(pool_NPW, table_RM, torch.tensor([323, 9]).to(device))
    q_RHK, q_RHW = (torch.randn(2, 6, n, generator=generator).to(device) for n in (10, 40))

    def run(backend: str) -> Tensor:
        parts = latent_paged(q_RHW, history, 32, backend), kv_paged(q_RHK, history, 2, backend)
        return torch.cat([part.flatten() for part in parts])

    with torch.no_grad():
        return run("triton"), run("reference")


CHECKS["paged_decode"] = _small_case
