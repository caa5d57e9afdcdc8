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


def title(scale: Scale) -> str:
    """What the rows have in common."""
    experts, chosen = scale.experts[0]
    return (
        f"decoding a token for each of {scale.decode_batch} rows, dim {scale.dim}, "
        f"{scale.n_loops} loops, {experts} experts top-{chosen}"
    )


def rows(scale: Scale) -> Iterator[Row]:
    """One row for every attention, dtype and context."""
    for attn_type in ("mla", "gqa"):
        for dtype in (torch.float32, torch.bfloat16):
            fast = build(scale, attn_type, scale.experts[0]).to(dtype).eval()
            reference = plain_twin(build(scale, attn_type, scale.experts[0])).eval()
            for context in scale.contexts:
                yield _row(scale, fast, reference, context, dtype)


def _row(
    scale: Scale, fast: OpenMythos, reference: OpenMythos, context: int, dtype: torch.dtype
) -> Row:
    attn_type = fast.cfg.attn_type
    name = f"{attn_type}, context {context}"
    held = context - (1 + TOKENS_PER_TURN * scale.alternations)
    steps = [
        _decoder(model, cache, scale, held)
        for model, cache in (
            (fast, KVCache(context)),
            (plain_twin(fast), ConcatenatingCache()),
            (reference, ConcatenatingCache()),
        )
    ]
    logits = [list(step()) for step in steps]  # one tensor for each row of the batch
    return compare(
        name,
        dtype,
        *steps[:2],
        alternations=scale.alternations,
        repeats=TOKENS_PER_TURN,
        goal=GOALS[attn_type] if scale is FULL else None,
        errors=gate(name, *logits[:2], reference=logits[2], dtype=dtype),
    )


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
