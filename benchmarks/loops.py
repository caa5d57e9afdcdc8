"""The cost of depth: time and memory of 1, 2, 4, ... loops of one small model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.clock import peak_bytes, threads
from benchmarks.measure import Finding, Measured, Row, alternate, compare, floor, gate
from benchmarks.models import FULL, Scale, build, random_ids, sharing
from benchmarks.plain import plain_twin
from benchmarks.roofline import Work, forward_work, training_work
from benchmarks.training import gradients
from open_mythos.config import MythosConfig
from open_mythos.model.depth import Depth
from open_mythos.model.layers.experts import RoutedExperts
from open_mythos.model.layers.moe import MoEFFN
from open_mythos.model.mythos import OpenMythos

GOAL = 5.0
"""Percent by which the time of an additional loop may differ from 2 to 32 loops."""
WITHIN = (2, 32)
MEMORY_GOAL = 1.05
"""States by which a loop may add to the memory of checkpointed training, all else being shared."""
BATCH, TOKENS = 4, 64
GATE_LOOPS = 3


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return f"loops of a model of dim {scale.loops_dim}, {BATCH} x {TOKENS} tokens, one thread"


def rows(scale: Scale) -> Iterator[Measured]:
    """Time of training and of a forward pass for every number of loops, then what they add up to.

    Raises:
        GateError: Checkpointed gradients are not those without.
    """
    small = replace(scale, dim=scale.loops_dim, n_loops=max(scale.loops))
    model = build(small, "mla", (8, 2))
    kept = sharing(model)
    kept.recurrent.checkpoint = True
    ids = random_ids(BATCH, TOKENS)
    dtype = torch.float32
    with threads(1):
        errors = _gate(model, kept, ids)
        passes: dict[str, Callable[[int], object]] = {
            "training": lambda n: gradients(model, ids, n, dtype),
            "training, checkpointed": lambda n: gradients(kept, ids, n, dtype),
            "forward": lambda n: _forward(model, ids, n),
        }
        goal = GOAL if scale is FULL else None
        for kind, call in passes.items():
            calls = {str(n): partial(call, n) for n in scale.loops}
            # as many loops for every number of them: the median of few short calls wanders
            repeats = {str(n): max(1, min(8, 16 // n)) for n in scale.loops}
            times = alternate(calls, turns=scale.turns, repeats=repeats)
            seconds = {n: times[str(n)].wall for n in scale.loops}
            for n in scale.loops:
                yield Finding(
                    f"{kind}, {count(n)}", "float32", 1e6 * seconds[n] / (BATCH * TOKENS),
                    "us a token", seconds=seconds[n],
                    floor=floor(_work(kind, model.cfg, n), dtype), error=max(errors),
                    numbers={"loops": n, "tokens": BATCH * TOKENS},
                )  # fmt: skip
            yield _constancy(f"{kind}: time of a loop from {WITHIN[0]} to {WITHIN[1]} loops, "
                             "largest deviation from the mean", seconds, goal)  # fmt: skip
        yield from _memories(scale, small, kept, ids)
        yield _plain(scale, model, ids, errors)


def _gate(model: OpenMythos, kept: OpenMythos, ids: Tensor) -> tuple[float, float]:
    """Check that plain and checkpointed gradients equal the timed ones."""
    reference = gradients(plain_twin(model), ids, GATE_LOOPS, torch.float32)
    return max(
        gate(
            "loops",
            gradients(form, ids, GATE_LOOPS, torch.float32),
            reference,
            reference=reference,
            dtype=torch.float32,
        )
        for form in (model, kept)
    )


def _work(kind: str, cfg: MythosConfig, n: int) -> Work:
    if kind == "forward":
        return forward_work(cfg, n, BATCH, TOKENS, size=4)
    return training_work(cfg, n, BATCH, TOKENS)


@torch.no_grad()
def _forward(model: OpenMythos, ids: Tensor, n: int) -> Tensor:
    return model.hidden(ids, model.context(ids), Depth(n))


def deviations(seconds: Mapping[int, float]) -> dict[str, float]:
    """For each pair of adjacent loop counts, report the time of a loop between them.

    Relative to the mean over all from the first to the last; 0.05 is 5 % more.
    """
    numbers = sorted(seconds)
    mean = (seconds[numbers[-1]] - seconds[numbers[0]]) / (numbers[-1] - numbers[0])
    return {
        f"{low} to {high}": (seconds[high] - seconds[low]) / (high - low) / mean - 1
        for low, high in pairwise(numbers)
    }


def _constancy(name: str, seconds: Mapping[int, float], goal: float | None) -> Finding:
    within = {n: value for n, value in seconds.items() if WITHIN[0] <= n <= WITHIN[1]}
    off = deviations(within)
    worst = max(off, key=lambda pair: abs(off[pair]))
    mean = (within[max(within)] - within[min(within)]) / (max(within) - min(within))
    return Finding(
        name, "float32", 100 * abs(off[worst]), "%", goal=goal, at_most=True,
        why=f"{1e3 * mean:.3g} ms a loop on average; "
        + ", ".join(f"{pair} loops {value:+.1%}" for pair, value in off.items()),
        numbers=off | {"seconds_per_loop": mean},
    )  # fmt: skip


def _memory(scale: Scale, kept: OpenMythos, ids: Tensor, name: str, why: str = "") -> Finding:
    """Measure how much one more loop raises the peak of a checkpointed step, in states."""
    n, more = scale.loops[-2:]
    peaks = []
    for loops in (n, more):
        kept.zero_grad(set_to_none=True)  # or what is given back would hide what is taken
        peaks.append(peak_bytes(partial(gradients, kept, ids, loops, torch.float32)))
    state = 4 * ids.numel() * scale.loops_dim
    grown = (peaks[1] - peaks[0]) / (more - n)
    return Finding(
        f"memory that a loop adds to checkpointed training, {name}", "float32",
        grown / state, "states", goal=MEMORY_GOAL if scale is FULL else None, at_most=True,
        why=f"{grown:,.0f} bytes a loop between {n} and {more} loops, a state has {state:,}; "
        f"the peak at {more} loops is {peaks[1] / 1e6:.1f} MB{why}",
        numbers={"bytes_per_loop": grown, "state_bytes": state},
    )  # fmt: skip


def _memories(scale: Scale, small: Scale, kept: OpenMythos, ids: Tensor) -> Iterator[Finding]:
    """Measure a dense block, and experts with and without deferred weight gradients."""
    dense = build(small, "mla", (0, 0))
    dense.recurrent.checkpoint = True
    yield _memory(scale, dense, ids, "dense block")
    at_once = sharing(kept)
    for module in at_once.modules():
        if isinstance(module, MoEFFN):
            module.experts = RoutedExperts(
                "reference"
            )  # its weight gradients are made loop by loop
    at_once.recurrent.checkpoint = True
    other = _memory(scale, at_once, ids, "")
    yield _memory(
        scale, kept, ids, "experts",
        why=f"; {other.value:.2f} states if each loop makes its own gradients of the experts",
    )  # fmt: skip


def count(n: int) -> str:
    """ "1 loop", "2 loops"."""
    return f"{n} loop" if n == 1 else f"{n} loops"


def _plain(scale: Scale, model: OpenMythos, ids: Tensor, errors: tuple[float, float]) -> Row:
    """Compare the middle number of loops with the plain implementation."""
    n, plain = scale.loops[len(scale.loops) // 2], plain_twin(model)
    return compare(
        f"training, {n} loops, against the reference", torch.float32,
        lambda: gradients(model, ids, n, torch.float32),
        lambda: gradients(plain, ids, n, torch.float32),
        alternations=scale.turns, goal=None, errors=errors,
        work=training_work(model.cfg, n, BATCH, TOKENS),
    )  # fmt: skip
