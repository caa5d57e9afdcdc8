"""Compiled blocks against the same blocks as they are: time of a step, memory, time to start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from benchmarks.clock import peak_bytes, synchronize
from benchmarks.measure import Finding, Measured, compare, dtype_name, gate
from benchmarks.models import QUICK, Scale, config, noisy, random_ids, sharing
from benchmarks.roofline import training_work
from benchmarks.training import gradients
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.parallel.compile import compile_block
from open_mythos.train.parallel.parallelize import transformer_blocks

EXPERTS = (16, 2)


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    dim, loops, batch, tokens = _sizes(scale)
    return (
        f"training step with compiled blocks (forward, backward), dim {dim}, {EXPERTS[0]} experts "
        f"top-{EXPERTS[1]}, {loops} loops, {batch} x {tokens} tokens"
    )


def rows(scale: Scale) -> Iterator[Measured]:
    """For each dtype the time of a step, its memory, and what the first steps take.

    Raises:
        GateError: Compiled and plain blocks disagree.
    """
    dim, loops, batch, tokens = _sizes(scale)
    cfg = config(Scale(dim, loops, *_REST), "gqa", EXPERTS)
    plain = noisy(lambda: OpenMythos(cfg))
    for dtype in (torch.float32, torch.bfloat16):
        yield from _of_dtype(scale, plain, dtype, random_ids(batch, tokens))


def _of_dtype(
    scale: Scale, plain: OpenMythos, dtype: torch.dtype, ids: Tensor
) -> Iterator[Measured]:
    compiled, loops = sharing(plain), plain.cfg.max_loop_iters
    torch._dynamo.reset()
    counters.clear()
    looped = list(compiled.recurrent.blocks)
    for block in transformer_blocks(compiled):
        backend = "eager" if scale is QUICK else "inductor"
        compile_block(block, rows_leave=block in looped, backend=backend)
    name = "compiled blocks against blocks as they are"
    with fresh_cache():  # as if nothing had been compiled on this machine before
        start = time.perf_counter()
        gradients(compiled, ids, loops, dtype)
        synchronize()
        first = time.perf_counter() - start
    graphs = counters["stats"]["unique_graphs"]
    gradients(compiled, ids, 2 * loops, dtype)
    again = counters["stats"]["unique_graphs"]
    # at the timed size: another one would be compiled as well
    errors = gate(
        name, gradients(compiled, ids, loops, dtype), gradients(plain, ids, loops, dtype),
        reference=gradients(plain, ids, loops, torch.float32), dtype=dtype,
    )  # fmt: skip
    forms = {"compiled": partial(gradients, compiled, ids, loops, dtype),
             "plain": partial(gradients, plain, ids, loops, dtype)}  # fmt: skip
    row = compare(
        name, dtype, forms["compiled"], forms["plain"], alternations=scale.turns, goal=None,
        errors=errors, work=training_work(plain.cfg, loops, *ids.shape),
    )  # fmt: skip
    yield row
    yield Finding(
        "first step, which compiles", dtype_name(dtype), first, "s", error=errors[0],
        why=f"{graphs} graphs for {len(transformer_blocks(plain))} blocks, {again} after a step of "
        f"{2 * loops} loops; they pay for themselves after "
        f"{_break_even(first, row.fast_seconds, row.plain_seconds)}",
        numbers={"graphs": graphs, "graphs_after_more_loops": again},
    )  # fmt: skip
    peaks = {}
    for form, call in forms.items():
        plain.zero_grad(set_to_none=True)  # shared by both forms
        peaks[form] = peak_bytes(call)
    yield Finding(
        "peak memory of a step, blocks as they are over compiled ones", dtype_name(dtype),
        peaks["plain"] / peaks["compiled"], "x", error=errors[0],
        why=f"{peaks['plain'] / 1e6:.0f} MB and {peaks['compiled'] / 1e6:.0f} MB without weights",
        numbers={f"{form}_bytes": value for form, value in peaks.items()},
    )  # fmt: skip
    plain.zero_grad(set_to_none=True)


_REST = (1, 1, 1, (1,), ((1, 1),), 1)
"""Fields of a scale that the configuration of a model does not read."""


def _sizes(scale: Scale) -> tuple[int, int, int, int]:
    """Width, loops, rows, tokens: narrower than in other suites, and deeper."""
    tokens = max(1, scale.tokens // 2)
    return scale.dim // 2, scale.n_loops + scale.n_loops // 2, scale.batch, tokens


def _break_even(first: float, fast: float, plain: float) -> str:
    """Return the number of steps after which compilation pays off."""
    return f"{first / (plain - fast):,.0f} steps" if plain > fast else "no number of steps"
