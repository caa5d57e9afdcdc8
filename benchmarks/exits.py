"""Early exit: time saved relative to full depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.clock import device, threads
from benchmarks.decoding import fill
from benchmarks.measure import Measured, Row, attempt, compare, gate
from benchmarks.models import FULL, Scale, build
from open_mythos.evaluation.early_exit import GivenDepths
from open_mythos.model.cache import KVCache
from open_mythos.model.mythos import OpenMythos

DEPTH = 16
MEAN = 4
GOAL = 2.5
"""Wall clock at a mean depth of 4 of 16: at most 0.4 of the full depth's."""
REST = "the loops of the deepest row, alone in its batch,"


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"exits of mean depth {MEAN} against the full depth of {DEPTH}, dim {scale.dim}, "
        f"MLA; decoding: a token for each of {2 * scale.decode_batch} rows in one thread"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """Measure decoding and prefill with equal, similar and very different exits."""
    for experts in ((0, 0), scale.experts[0]):
        model = build(scale, "mla", experts).eval()
        kind = f"{experts[0]} experts" if experts[0] else "dense"
        for shape in (_equal, _uniform, _geometric):
            depths_BT = shape(2 * scale.decode_batch, 1)
            name = f"decoding, {kind}, {shape.__doc__}"
            with threads(1):
                yield attempt(
                    name, torch.float32, partial(_decoding, scale, model, depths_BT, name)
                )
        depths_BT = _geometric(scale.batch, scale.tokens)
        name = f"prefill, {kind}, {_geometric.__doc__}"
        yield attempt(name, torch.float32, partial(_prefill, scale, model, depths_BT, name))


def _equal(batch: int, tokens: int) -> Tensor:
    """all at 4"""
    return torch.full((batch, tokens), MEAN, device=device())


def _uniform(batch: int, tokens: int) -> Tensor:
    """1 to 7, evenly"""
    return _shuffled(torch.arange(batch * tokens) % (2 * MEAN - 1) + 1).view(batch, tokens)


def _geometric(batch: int, tokens: int) -> Tensor:
    """geometric"""
    quantile = (torch.arange(batch * tokens) + 0.5) / (batch * tokens)
    depths = torch.ceil((1 - quantile).log() / math.log(1 - 1 / MEAN)).clamp(1, DEPTH)
    return _shuffled(depths.long()).view(batch, tokens)


def _shuffled(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))].to(device())


def _decoding(scale: Scale, model: OpenMythos, depths_BT: Tensor, name: str) -> Row:
    batch, context = len(depths_BT), scale.contexts[0]
    ids = torch.arange(batch, device=device()).unsqueeze(1) % model.cfg.vocab_size
    cache = KVCache(context)
    fill(cache, model, batch, context - 1, DEPTH)
    return _compare(scale, model, ids, depths_BT, name, cache)


def _prefill(scale: Scale, model: OpenMythos, depths_BT: Tensor, name: str) -> Row:
    ids = torch.arange(depths_BT.numel(), device=device()).view_as(depths_BT) % model.cfg.vocab_size
    return _compare(scale, model, ids, depths_BT, name, None)


def _compare(
    scale: Scale,
    model: OpenMythos,
    ids: Tensor,
    depths_BT: Tensor,
    name: str,
    cache: KVCache | None,
) -> Row:
    """Compare adaptive with full depth; the gate checks each token against itself alone."""
    held = 0 if cache is None else cache.length

    def call(**depth: object) -> Callable[[], Tensor]:
        @torch.no_grad()
        def run() -> Tensor:
            if cache is not None:
                cache.truncate(held)
            return model(ids, kv_cache=cache, start_pos=held, **depth)

        return run

    adaptive = call(n_loops=DEPTH, exit_rule=GivenDepths(depths_BT))
    got, alone = adaptive(), _one_by_one(model, ids, depths_BT, cache, held)
    errors = gate(name, list(got[:, : alone.shape[1]]), list(alone), reference=list(alone),
                  dtype=torch.float32)  # fmt: skip
    return compare(
        name, torch.float32, adaptive, call(n_loops=DEPTH),
        alternations=scale.alternations, repeats=2, untimed=1, errors=errors,
        goal=GOAL if scale is FULL and cache is not None else None,
        rest=None if cache is None else (REST, _deepest(scale, model, depths_BT, held)),
        numbers={"deepest": int(depths_BT.max()), "mean": float(depths_BT.float().mean())},
    )  # fmt: skip


def _deepest(scale: Scale, model: OpenMythos, depths_BT: Tensor, held: int) -> Callable[[], Tensor]:
    """One row at the largest depth: its loops, and its reads of the weights, nobody can leave out.

    Other rows only add to them.
    """
    cache, deepest = KVCache(held + 1), int(depths_BT.max())
    fill(cache, model, 1, held, deepest)
    ids = torch.zeros(1, 1, dtype=torch.long, device=device())

    @torch.no_grad()
    def run() -> Tensor:
        cache.truncate(held)
        return model(ids, deepest, cache, held)

    return run


CHECKED_TOKENS = 8
"""Prompt tokens that the gate computes one at a time."""


@torch.no_grad()
def _one_by_one(
    model: OpenMythos, ids: Tensor, depths_BT: Tensor, cache: KVCache | None, held: int
) -> Tensor:
    """Logits where every call computes one position, at a depth told by number for every row."""
    steps: list[Tensor] = []
    own = KVCache() if cache is None else cache
    if cache is not None:
        cache.truncate(held)
    for i in range(min(CHECKED_TOKENS, ids.shape[1])):
        depth = depths_BT[:, i].tolist()
        steps.append(model(ids[:, i : i + 1], depth, own, held + i))
    return torch.cat(steps, 1)
