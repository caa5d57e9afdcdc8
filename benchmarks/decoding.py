"""Decoding: one token for every row of a batch, on a history that is already cached."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.measure import Row, compare, gate
from benchmarks.models import FULL, Scale, build
from benchmarks.plain import ConcatenatingCache, plain_twin
from open_mythos.cache import Columns, KVCache
from open_mythos.model import OpenMythos

GOALS = {"mla": 5.0, "gqa": None}
"""Plain grouped-query attention has no history to expand: only the cache's growth differs."""
TOKENS_PER_TURN = 2


def rows(scale: Scale) -> Iterator[Row]:
    """One row for every attention, context and dtype."""
    for attn_type in ("mla", "gqa"):
        exact = build(scale, attn_type, scale.experts[0]).eval()
        reference = plain_twin(exact)
        for dtype in (torch.float32, torch.bfloat16):
            fast = exact.to(dtype) if dtype == torch.float32 else _in_bfloat16(exact)
            for context in scale.contexts:
                yield _row(scale, fast, reference, attn_type, context, dtype)


def _in_bfloat16(model: OpenMythos) -> OpenMythos:
    return model.bfloat16()


def _row(
    scale: Scale,
    fast: OpenMythos,
    reference: OpenMythos,
    attn_type: str,
    context: int,
    dtype: torch.dtype,
) -> Row:
    name = f"decoding, {attn_type}, batch {scale.decode_batch}, context {context}"
    plain = plain_twin(fast)
    held = context - (2 + TOKENS_PER_TURN * scale.alternations)
    steps = [
        _decoder(model, cache, scale, held)
        for model, cache in (
            (fast, KVCache(context)),
            (plain, ConcatenatingCache()),
            (reference, ConcatenatingCache()),
        )
    ]
    errors = gate(name, *([step()] for step in steps), dtype)
    return compare(
        name,
        dtype,
        lambda: _repeat(steps[0]),
        lambda: _repeat(steps[1]),
        alternations=scale.alternations,
        goal=GOALS[attn_type] if scale is FULL else None,
        errors=errors,
    )


def _repeat(step: Callable[[], Tensor]) -> None:
    for _ in range(TOKENS_PER_TURN):
        step()


def _decoder(model: OpenMythos, cache: KVCache, scale: Scale, held: int) -> Callable[[], Tensor]:
    """A call that decodes the next token of every row on a cache of ``held`` positions or more."""
    fill(cache, model, scale.decode_batch, held, scale.n_loops)
    ids = torch.arange(scale.decode_batch).unsqueeze(1)

    @torch.no_grad()
    def step() -> Tensor:
        return model(ids, n_loops=scale.n_loops, kv_cache=cache, start_pos=cache.length)

    return step


def fill(cache: KVCache, model: OpenMythos, batch: int, length: int, n_loops: int) -> None:
    """Put ``length`` positions of noise into every slot: their values do not change the speed."""
    cfg, dtype = model.cfg, model.head.weight.dtype
    generator = torch.Generator().manual_seed(2)
    first, last = cfg.prelude_layers, cfg.prelude_layers + cfg.recurrent_layers
    for layer in range(last + cfg.coda_layers):
        for loop in range(n_loops if first <= layer < last else 1):
            entry_BTW = torch.randn(batch, length, cfg.cache_width, generator=generator)
            # through bfloat16, so that caches of every dtype hold the same values
            cache.write(layer, loop, entry_BTW.bfloat16().to(dtype))
    cache.commit(Columns(length))
