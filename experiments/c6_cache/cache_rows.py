"""Count the cache of latent attention and of multi-head and grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from open_mythos.variants import VARIANTS, variant


@dataclass(frozen=True)
class CacheRow:
    """Cached elements per token and slot of one variant, and rivals with heads of dim / n_heads.

    ``gqa8`` and ``gqa4`` are None if that many key/value heads do not divide ``n_heads``;
    ``unshared`` is a cache of MLA's expanded keys and values. ``*_shared`` use
    ``kv_share="last"``; bytes are those of bfloat16 over all slots.
    """

    variant: str
    n_heads: int
    head_dim: int
    n_loops: int
    mla: int
    mha: int
    gqa8: int | None
    gqa4: int | None
    unshared: int
    slots: int
    slots_shared: int
    bytes_per_token: int
    bytes_per_token_shared: int
    bytes_per_token_mha: int

    @property
    def over_mha(self) -> float:
        """Return how many times smaller MLA is than multi-head attention."""
        return self.mha / self.mla

    @property
    def over_gqa8(self) -> float | None:
        """Return how many times smaller MLA is than 8 key/value heads."""
        return None if self.gqa8 is None else self.gqa8 / self.mla

    @property
    def over_gqa4(self) -> float | None:
        """Return how many times smaller MLA is than 4 key/value heads."""
        return None if self.gqa4 is None else self.gqa4 / self.mla


def cache_rows(variants: Iterable[str] = VARIANTS) -> list[CacheRow]:
    """Count the cache of every variant with MLA, MHA, GQA-8 and GQA-4."""
    return [_cache_row(name) for name in variants]


def _cache_row(name: str) -> CacheRow:
    cfg = variant(name)
    head_dim = cfg.dim // cfg.n_heads
    slots = cfg.cache_slots(cfg.max_loop_iters)
    slots_shared = cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
    mha = 2 * cfg.n_heads * head_dim
    return CacheRow(
        name, cfg.n_heads, head_dim, cfg.max_loop_iters,
        mla=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        mha=mha,
        gqa8=None if cfg.n_heads % 8 else 2 * 8 * head_dim,
        gqa4=None if cfg.n_heads % 4 else 2 * 4 * head_dim,
        unshared=cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim),
        slots=slots, slots_shared=slots_shared,
        bytes_per_token=2 * cfg.cache_width * slots,
        bytes_per_token_shared=2 * cfg.cache_width * slots_shared,
        bytes_per_token_mha=2 * mha * slots,
    )  # fmt: skip
