"""Decoding: one token for every row of a batch, on a history that is already cached.

All forms run in one thread: the operations are small, and waking threads up for each would be what
is measured. One row shows the same in all threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.clock import device, threads
from benchmarks.measure import Measured, Row, attempt, compare, gate
from benchmarks.models import FULL, Scale, build, dense_like
from benchmarks.plain import ConcatenatingCache, common_parts, plain_twin
from benchmarks.roofline import decode_work
from open_mythos.model.cache import Columns, KVCache
from open_mythos.model.dense import DenseTransformer
from open_mythos.model.mythos import OpenMythos

GOALS = {("mla", 512): 5.0, ("mla", 4096): 20.0}
"""Plain grouped-query attention has no history to expand: only the cache's growth differs."""
REPEATS = {"fast": 3, "plain": 1, "dense": 3, "rest": 3}
"""Tokens of a turn."""
UNTIMED = 1
"""Tokens before them."""
REST = "all parts but routed experts, history and cache"


def title(scale: Scale) -> str:
    """What the rows have in common."""
    experts, chosen = scale.experts[0]
    return (
        f"decoding a token for each of {scale.decode_batch} rows, dim {scale.dim}, "
        f"{scale.n_loops} loops, {experts} experts top-{chosen}, one thread unless said"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """One row for every attention, dtype and context; one in all threads."""
    for attn_type in ("mla", "gqa"):
        for dtype in (torch.float32, torch.bfloat16):
            fast = build(scale, attn_type, scale.experts[0]).to(dtype).eval()
            reference = plain_twin(build(scale, attn_type, scale.experts[0])).eval()
            for context in scale.contexts:
                name = f"{attn_type}, context {context}"
                goal = GOALS.get((attn_type, context)) if scale is FULL else None
                take = partial(_row, scale, fast, reference, context, dtype, name, goal)
                with threads(1):
                    yield attempt(name, dtype, take)
            n = torch.get_num_threads()
            if attn_type == "mla" and device().type == "cpu" and n > 1:
                name = f"mla, context {scale.contexts[0]}, {n} threads"
                take = partial(_row, scale, fast, reference, scale.contexts[0], dtype, name, None)
                yield attempt(name, dtype, take)


def _row(
    scale: Scale,
    fast: OpenMythos,
    reference: OpenMythos,
    context: int,
    dtype: torch.dtype,
    name: str,
    goal: float | None,
) -> Row:
    cfg = fast.cfg
    held = context - (1 + (UNTIMED + max(REPEATS.values())) * (scale.alternations + 1))
    rest = common_parts(fast, attention=True)
    dense = dense_like(cfg, scale.n_loops).to(dtype).eval()
    fast_step, plain_step, reference_step, rest_step, dense_step = (
        decoder(model, cache, scale.decode_batch, held, scale.n_loops)
        for model, cache in (
            (fast, KVCache(context)),
            (plain_twin(fast), ConcatenatingCache()),
            (reference, ConcatenatingCache()),
            (rest, KVCache(context)),
            (dense, KVCache(context)),
        )
    )
    # one tensor for each row of the batch
    logits = [list(step()) for step in (fast_step, plain_step, reference_step)]
    return compare(
        name,
        dtype,
        fast_step,
        plain_step,
        dense=dense_step,
        rest=(REST, rest_step) if cfg.attn_type == "mla" else None,
        alternations=scale.alternations,
        repeats=REPEATS,
        untimed=UNTIMED,
        goal=goal,
        errors=gate(name, *logits[:2], reference=logits[2], dtype=dtype),
        work=decode_work(cfg, scale.n_loops, scale.decode_batch, context, dtype.itemsize),
        numbers={"tokens": scale.decode_batch, "context": context},
    )


def decoder(
    model: OpenMythos | DenseTransformer, cache: KVCache, batch: int, held: int, n_loops: int
) -> Callable[[], Tensor]:
    """A call that decodes the next token of every row on a cache of ``held`` positions or more."""
    fill(cache, model, batch, held, n_loops)
    ids = torch.arange(batch, device=device()).unsqueeze(1) % model.cfg.vocab_size
    depth = {"n_loops": n_loops} if isinstance(model, OpenMythos) else {}

    @torch.no_grad()
    def step() -> Tensor:
        return model(ids, kv_cache=cache, start_pos=cache.length, **depth)

    return step


def fill(
    cache: KVCache, model: OpenMythos | DenseTransformer, batch: int, length: int, n_loops: int
) -> None:
    """Put ``length`` positions of noise into every slot: their values do not change the speed."""
    cfg, dtype = model.cfg, model.head.weight.dtype
    generator = torch.Generator(device()).manual_seed(2)
    for layer, loop in _slots(model, n_loops):
        entry_BTW = torch.randn(
            batch, length, cfg.cache_width, generator=generator, device=device()
        )
        # through bfloat16, so that caches of every dtype hold the same values
        cache.write(layer, loop, entry_BTW.bfloat16().to(dtype))
    cache.commit(Columns(length))


def _slots(model: OpenMythos | DenseTransformer, n_loops: int) -> Iterator[tuple[int, int]]:
    """(layer, loop) of every slot, as a call of ``n_loops`` loops fills them."""
    if isinstance(model, DenseTransformer):
        yield from ((layer, 0) for layer in range(model.n_layers))
        return
    cfg = model.cfg
    first, last = cfg.prelude_layers, cfg.prelude_layers + cfg.recurrent_layers
    for layer in range(last + cfg.coda_layers):
        for loop in range(n_loops if first <= layer < last else 1):
            yield layer, loop
