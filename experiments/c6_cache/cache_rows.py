"""The cache of latent attention against that of multi-head and grouped-query attention, counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from open_mythos.variants import VARIANTS, variant


@dataclass(frozen=True)
class CacheRow:
    """Cached elements of one variant, against attention that keeps keys and values.

    The rivals have heads as wide as an ordinary transformer of this width: dim / n_heads.

    Attributes:
        variant: Name of the variant.
        n_heads: Query heads H.
        head_dim: dim / n_heads.
        n_loops: Loops counted.
        mla: Elements per token and slot: latent and shared rotary key.
        mha: The same for H key/value heads.
        gqa8: The same for 8 key/value heads; None where 8 does not divide H.
        gqa4: The same for 4 key/value heads; None where 4 does not divide H.
        unshared: Keys and values of MLA's own heads, as a cache would hold them that expands the
            latent.
        slots: (layer, loop) slots of an exact cache.
        slots_shared: Slots with ``kv_share="last"``.
        bytes_per_token: bfloat16 bytes of an exact MLA cache over all slots.
        bytes_per_token_shared: The same with ``kv_share="last"``.
        bytes_per_token_mha: bfloat16 bytes of an exact multi-head cache over all slots.
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
        """How many times less than multi-head attention."""
        return self.mha / self.mla

    @property
    def over_gqa8(self) -> float | None:
        """How many times less than 8 key/value heads."""
        return None if self.gqa8 is None else self.gqa8 / self.mla

    @property
    def over_gqa4(self) -> float | None:
        """How many times less than 4 key/value heads."""
        return None if self.gqa4 is None else self.gqa4 / self.mla


def cache_rows(variants: Iterable[str] = VARIANTS) -> list[CacheRow]:
    """The cache of MLA against MHA, GQA-8 and GQA-4 at equal heads, for each variant."""
    return [_cache_row(name) for name in variants]


def _cache_row(name: str) -> CacheRow:
    cfg = variant(name)
    head_dim = cfg.dim // cfg.n_heads
    slots = cfg.cache_slots(cfg.max_loop_iters)
    slots_shared = cfg.prelude_layers + cfg.recurrent_layers + cfg.coda_layers
    mha = 2 * cfg.n_heads * head_dim
    return CacheRow(
        variant=name,
        n_heads=cfg.n_heads,
        head_dim=head_dim,
        n_loops=cfg.max_loop_iters,
        mla=cfg.kv_lora_rank + cfg.qk_rope_head_dim,
        mha=mha,
        gqa8=None if cfg.n_heads % 8 else 2 * 8 * head_dim,
        gqa4=None if cfg.n_heads % 4 else 2 * 4 * head_dim,
        unshared=cfg.n_heads * (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim + cfg.v_head_dim),
        slots=slots,
        slots_shared=slots_shared,
        bytes_per_token=2 * cfg.cache_width * slots,
        bytes_per_token_shared=2 * cfg.cache_width * slots_shared,
        bytes_per_token_mha=2 * mha * slots,
    )
