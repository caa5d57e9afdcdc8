"""Decoding at real size: the whole variant in bfloat16 on a full cache, against its bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.clock import clocked, device, release, shares_text, where_time_goes
from benchmarks.decoding import decoder
from benchmarks.measure import Finding, GateError, Measured, attempt, floor, gate
from benchmarks.models import GPU, Scale, noisy, random_ids
from benchmarks.plain import ConcatenatingCache, plain_twin
from benchmarks.roofline import decode_work
from open_mythos.inference.static_decoder import StaticDecoder
from open_mythos.model.cache import KVCache
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.variants import variant

GOALS = {1: 50.0, 64: 60.0, 256: 60.0}
"""Batch -> percent of the bound: the least time in which weights and cache can be read."""
WARM, STEPS = 3, 10
GATE_POSITIONS, GATE_BATCH, GATE_LOOPS, GATE_PROMPT, GATE_TOKENS = 33, 7, 2, 7, 6


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    cfg = variant(scale.large)
    return (
        f"decoding mythos_{scale.large}, {cfg.max_loop_iters} loops, {scale.contexts[0]} "
        "positions in the cache, bfloat16"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """Measure, for every batch, the model called token by token and the static decoder."""
    cfg = variant(scale.large)
    model = noisy(lambda: OpenMythos(cfg)).to(torch.bfloat16).eval()
    error = _gate(model)
    for batch in scale.served:
        for kind, make in (("constant shapes", _constant), ("plain calls", _plain)):
            name = f"batch {batch}, {kind}"
            goal = GOALS.get(batch) if scale is GPU and make is _constant else None
            take = partial(_row, scale, model, batch, make, name, goal, error)
            yield attempt(name, torch.bfloat16, take)
            release()


Make = Callable[[OpenMythos, int, int, int], Callable[[], object]]


def _plain(model: OpenMythos, batch: int, context: int, loops: int) -> Callable[[], object]:
    """A call that decodes a token of every row on a full cache."""
    return decoder(model, KVCache(context), batch, context - (WARM + STEPS + 3), loops)


def _constant(model: OpenMythos, batch: int, context: int, loops: int) -> Callable[[], object]:
    """Return the same with the static decoder."""
    return _started(model, batch, context, loops, context - (WARM + STEPS + 3)).step


def _started(
    model: OpenMythos, batch: int, context: int, loops: int, n_prompt: int
) -> StaticDecoder:
    mode = "graph" if device().type == "cuda" else "static"
    found = StaticDecoder(model, batch, context + 1, mode=mode)
    ids = random_ids(batch, n_prompt, model.cfg.vocab_size)
    found.start(ids, SamplingParams(temperature=0), Depth(loops))
    return found


def _row(
    scale: Scale,
    model: OpenMythos,
    batch: int,
    make: Make,
    name: str,
    goal: float | None,
    error: float,
) -> Finding:
    loops, context = model.cfg.max_loop_iters, scale.contexts[0]
    step = make(model, batch, context, loops)
    for _ in range(WARM):
        step()
    seconds, _ = clocked(step, STEPS)
    limit = floor(decode_work(model.cfg, loops, batch, context, 2), torch.bfloat16)
    assert limit is not None
    shares = where_time_goes(step)
    return Finding(
        name, "bfloat16", 100 * limit.seconds / seconds, "% of the bound",
        goal=goal, threads=torch.get_num_threads(),
        why=f"{batch / seconds:,.0f} tok/s of {batch / limit.seconds:,.0f}; "
        f"time of a step: {shares_text(shares)}",
        error=error, seconds=seconds, floor=limit,
        numbers={"batch": batch, "tokens_per_second": batch / seconds, **shares},
    )  # fmt: skip


def _gate(model: OpenMythos) -> float:
    """The next token's logits, and the decoder's tokens, against those of the reference.

    Raises:
        GateError: They differ.
    """
    exact = plain_twin(model).float()
    logits = [
        list(decoder(form, cache, GATE_BATCH, GATE_POSITIONS, GATE_LOOPS)())
        for form, cache in (
            (model, KVCache()), (plain_twin(model), ConcatenatingCache()),
            (exact, ConcatenatingCache()),
        )
    ]  # fmt: skip
    ids = random_ids(GATE_BATCH, GATE_PROMPT, model.cfg.vocab_size)
    expected = exact.generate(ids, GATE_TOKENS, GATE_LOOPS, temperature=0)[:, GATE_PROMPT:]
    found = _started(exact, GATE_BATCH, GATE_POSITIONS, GATE_LOOPS, GATE_PROMPT)
    for i in range(GATE_TOKENS - 1):
        if not torch.equal(found.step(), expected[:, i + 1]):
            raise GateError(f"serving: the decoder's token {i + 1} is not that of generate()")
    return gate("serving", *logits[:2], reference=logits[2], dtype=torch.bfloat16)[0]
