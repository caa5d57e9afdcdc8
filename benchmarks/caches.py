"""Cache memory against the formula and multi-head attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.clock import device
from benchmarks.measure import GateError
from benchmarks.models import Scale, config, random_ids
from open_mythos.accounting import account
from open_mythos.config import MythosConfig
from open_mythos.model.cache import KVCache
from open_mythos.model.mythos import OpenMythos


@dataclass(frozen=True)
class HeldRow:
    """Bytes that one prefill left in the cache; ``dataclasses.asdict`` makes it JSON."""

    name: str
    held: int
    """Bytes of the tensors in the cache."""
    formula: int
    """Slots x rows x positions x elements x bytes of an element."""
    mha: int
    """The same formula for as many key/value heads as query heads."""

    @property
    def ratio(self) -> float:
        """Return the reduction relative to multi-head attention."""
        return self.mha / self.held


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return f"cache of one row, {scale.tokens} tokens, {scale.n_loops} loops, float32"


def rows(scale: Scale) -> Iterator[HeldRow]:
    """What is held for latent, grouped-query and multi-head attention, exact and shared.

    Raises:
        GateError: The bytes held are not those of the formula.
    """
    base = config(scale, "mla", scale.experts[0])
    multi = replace(base, attn_type="gqa", n_kv_heads=base.n_heads)
    for attention, cfg in {
        "mla": base,
        "gqa, 2 heads": replace(base, attn_type="gqa"),
        "mha": multi,
    }.items():
        for share in ("none", "last"):
            yield _row(
                f"{attention}, kv_share={share}", replace(cfg, kv_share=share), multi, scale.tokens
            )


def _row(name: str, cfg: MythosConfig, multi: MythosConfig, tokens: int) -> HeldRow:
    cache = KVCache(share_loops=cfg.kv_share == "last")
    OpenMythos(cfg).to(device())(random_ids(1, tokens), kv_cache=cache)
    row = HeldRow(
        name,
        held=cache.nbytes,
        formula=tokens * account(cfg).cache_bytes(element_size=4),
        mha=tokens * account(multi).cache_bytes(element_size=4),
    )
    if row.held != row.formula:
        raise GateError(f"cache, {name}: {row.held} bytes held, {row.formula} by the formula")
    return row
