"""Decoding on histories of several lengths: time against context, and the bandwidth it implies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import linear_regression

import torch
from torch import Tensor

from benchmarks.clock import threads
from benchmarks.decoding import decoder, fill
from benchmarks.measure import (
    Finding,
    GateError,
    Measured,
    alternate,
    dtype_name,
    floor,
    gate,
)  # fmt: skip
from benchmarks.models import FULL, Scale, build, random_ids
from benchmarks.plain import plain_twin
from benchmarks.roofline import decode_work
from open_mythos.accounting import account
from open_mythos.model.cache import KVCache
from open_mythos.model.mythos import OpenMythos

GOAL_LINEAR = 10.0
"""Percent by which a step may be off the straight line through all of them."""
GOAL_BANDWIDTH = 50.0
"""Percent of the roofline at which the slope of that line reads the cache."""
REPEATS, UNTIMED = 3, 1
GATE_TOKENS = 7


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    experts, chosen = scale.experts[0]
    return (
        f"decoding one row at several contexts, dim {scale.dim}, {scale.n_loops} loops, "
        f"{experts} experts top-{chosen}, one thread"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """A step at every context, then the straight line through them.

    Raises:
        GateError: The reference gives other logits, or the cache holds other bytes than it should.
    """
    for attn_type, dtype in (
        ("mla", torch.float32), ("mla", torch.bfloat16), ("gqa", torch.bfloat16),
    ):  # fmt: skip
        with threads(1):
            yield from _line(scale, attn_type, dtype)


def _line(scale: Scale, attn_type: str, dtype: torch.dtype) -> Iterator[Finding]:
    model = build(scale, attn_type, scale.experts[0]).to(dtype).eval()
    plain = plain_twin(model)
    exact = plain_twin(build(scale, attn_type, scale.experts[0])).eval()
    held_bytes = account(model.cfg, scale.n_loops).cache_bytes(element_size=dtype.itemsize)
    steps: dict[str, Callable[[], Tensor]] = {}
    errors = {}
    for context in scale.histories:
        cache = KVCache(context)
        held = context - (2 + (UNTIMED + REPEATS) * (scale.turns + 1))
        steps[str(context)] = decoder(model, cache, 1, held, scale.n_loops)
        if cache.nbytes != context * held_bytes:
            raise GateError(f"{attn_type}: {cache.nbytes} bytes, not {context} x {held_bytes}")
        errors[context] = _gate(model, plain, exact, cache, scale.n_loops, dtype)
    times = alternate(steps, turns=scale.turns, repeats=REPEATS, untimed=UNTIMED)
    seconds = {context: times[str(context)].wall for context in scale.histories}
    works = {c: decode_work(model.cfg, scale.n_loops, 1, c, dtype.itemsize)
             for c in scale.histories}  # fmt: skip
    name = partial("{}, {}".format, attn_type)
    for context, taken in seconds.items():
        yield Finding(
            name(f"context {context}"), dtype_name(dtype), 1 / taken, "tok/s", seconds=taken,
            error=errors[context], floor=floor(works[context], dtype),
            numbers={"context": context, "cache_bytes": context * held_bytes,
                     "seconds": taken},
        )  # fmt: skip
    slope, start = linear_regression(list(seconds), list(seconds.values()))
    off = {c: taken / (start + slope * c) - 1 for c, taken in seconds.items()}
    worst = max(off, key=lambda c: abs(off[c]))
    goals = (GOAL_LINEAR, GOAL_BANDWIDTH) if scale is FULL and attn_type == "mla" else (None, None)
    yield Finding(
        name("largest distance of a step from a straight line in the context"), dtype_name(dtype),
        100 * abs(off[worst]), "%", goal=goals[0], at_most=True,
        why=f"{start * 1e3:.3g} ms and {slope * 1e6:.3g} us a position; "
        + ", ".join(f"{c}: {value:+.1%}" for c, value in off.items()),
        numbers={"start_seconds": start, "seconds_per_position": slope},
    )  # fmt: skip
    longest = max(scale.histories)
    limit = floor(works[longest], dtype)
    assert limit is not None
    least = (held_bytes / limit.bandwidth if limit.bound == "memory" else
             (limit.flops - works[min(seconds)].flops) / (longest - min(seconds)) / limit.peak
             )  # fmt: skip
    yield Finding(
        name("share of the roofline at which more context is read"), dtype_name(dtype),
        100 * least / slope, "%", goal=goals[1],
        why=f"a position more is {held_bytes:,} bytes of cache: {held_bytes / slope / 1e9:.3g} GB/s"
        f" of {limit.bandwidth / 1e9:.3g}; at {longest} positions {limit.bound} "
        f"{'are' if limit.bound == 'matmuls' else 'is'} the limit",
        numbers={"bytes_per_second": held_bytes / slope, "measured": limit.bandwidth},
    )  # fmt: skip


def _gate(
    model: OpenMythos,
    plain: OpenMythos,
    exact: OpenMythos,
    cache: KVCache,
    n_loops: int,
    dtype: torch.dtype,
) -> float:
    """Logits of a few tokens, decoded one by one, against the reference's of all in one call.

    A few, because a rounded router score may send a single one to another expert in either form.
    """
    held, ids = cache.length, random_ids(1, GATE_TOKENS)
    with torch.no_grad():
        logits = [model(ids[:, i : i + 1], n_loops, cache, held + i)[0, 0]
                  for i in range(GATE_TOKENS)]  # fmt: skip
        cache.truncate(held)
        expected = found = list(plain(ids, n_loops, cache, held)[0])
        if dtype != torch.float32:
            same = KVCache(held + GATE_TOKENS)
            fill(same, exact, 1, held, n_loops)
            expected = list(exact(ids, n_loops, same, held)[0])
    cache.truncate(held)
    return gate("context", logits, found, reference=expected, dtype=dtype)[0]
