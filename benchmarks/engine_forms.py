"""The engine against static batches on the same jobs, in turns, and the bound of all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from torch import Tensor

from benchmarks.measure import GateError
from benchmarks.replay import EngineForm
from benchmarks.static_batch import COMPACT, FULL, LOCKSTEP, Job, StaticBatch
from benchmarks.stopwatch import Stopwatch
from open_mythos.model.mythos import OpenMythos

ENGINE, EXACT = "engine", "engine exact"
FORMS = (FULL, LOCKSTEP, COMPACT, ENGINE, EXACT)
TURNS = 5
Tokens = list[list[int]]


@dataclass
class Taken:
    """Seconds of one form in every turn, prompts excluded."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, cpu: float, wall: float) -> None:
        """Record a turn."""
        self.cpu.append(cpu)
        self.wall.append(wall)

    @property
    def median(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare_forms`."""

    n_tokens: int
    mean_depth: float
    n_loops: int
    taken: dict[str, Taken]
    stages: dict[str, float]
    """Median CPU seconds of prelude, one loop, and coda with head, for all rows of a batch."""
    prompts: dict[str, float]
    """CPU seconds of all prompts, of the engines."""
    rows: dict[str, float]
    """Rows of the fast engine per loop and per edge."""

    def ratio(self, fast: str, slow: str) -> float:
        """Return how many times faster one form is than another, by median CPU seconds."""
        return self.taken[slow].median / self.taken[fast].median

    @property
    def bound(self) -> float:
        """Speed-up over full depth if every loop that is not needed cost nothing."""
        prelude, loop, coda = (self.stages[name] for name in ("prelude", "loop", "coda"))
        outside = prelude + coda
        return (outside + self.n_loops * loop) / (outside + self.mean_depth * loop)

    @property
    def of_bound(self) -> float:
        """Part of the bound that the fast engine reaches."""
        return self.ratio(ENGINE, FULL) / self.bound

    def numbers(self) -> dict[str, float]:
        """Return all figures, flat."""
        found = {"tokens": float(self.n_tokens), "mean_depth": self.mean_depth,
                 "bound": self.bound}  # fmt: skip
        for name, taken in self.taken.items():
            found |= {
                f"{name}, least CPU s": min(taken.cpu), f"{name}, median CPU s": taken.median,
                f"{name}, least wall s": min(taken.wall),
                f"{name}, median wall s": statistics.median(taken.wall),
                f"{name}, tokens per CPU s": self.n_tokens / taken.median,
            }  # fmt: skip
        found |= {f"{name}, CPU s": seconds for name, seconds in self.stages.items()}
        found |= {f"prompts, {name}, CPU s": seconds for name, seconds in self.prompts.items()}
        return found | {f"rows per {name}": n for name, n in self.rows.items()}


def compare_forms(
    model: OpenMythos, jobs: Sequence[Job], n_loops: int, slots: int, *,
    forms: Sequence[str] = FORMS, turns: int = TURNS, **options: Any,
) -> Comparison:  # fmt: skip
    """Run all forms in turns; the first turn, which is not timed, is the gate.

    Args:
        model: The model.
        jobs: What to generate. Static batches take them in order, ``slots`` at a time.
        n_loops: All loops.
        slots: Rows at a time.
        forms: Some of :data:`FORMS`.
        turns: Timed turns.
        options: Arguments of the engine.

    Raises:
        GateError: Two forms choose different tokens.
    """
    engines = {
        name: EngineForm(model, jobs, n_loops, slots, exact=name == EXACT, **options)
        for name in forms if name in (ENGINE, EXACT)
    }  # fmt: skip
    stages = {name: Stopwatch() for name in ("prelude", "loop", "coda")}
    runs: dict[str, Callable[[], tuple[Tokens, float, float]]] = {
        form: _static(model, jobs, n_loops, slots, form, stages) for form in forms
        if form not in engines
    } | {name: _engine(form) for name, form in engines.items()}  # fmt: skip
    expected = _gate(runs)
    for watch in stages.values():
        watch.clear()
    taken = {name: Taken() for name in forms}
    for _ in range(turns):
        for name in forms:
            tokens, *seconds = runs[name]()
            if tokens != expected:
                raise GateError(f"{name} chose other tokens in a later turn")
            taken[name].add(*seconds)
    later = [depth for job in jobs for depth in job.depths[1:]]
    busy = engines[ENGINE].engine.stats() if ENGINE in engines else {}
    return Comparison(
        len(later), statistics.fmean(later), n_loops, taken,
        {name: watch.cpu / max(watch.calls, 1) for name, watch in stages.items()},
        {name: form.prompts.cpu / form.runs for name, form in engines.items()},
        {"loop": busy["loop_rows"] / busy["loop_ticks"],
         "edge": busy["edge_rows"] / busy["edges"]} if busy else {},
    )  # fmt: skip


def _gate(runs: dict[str, Callable[[], tuple[Tokens, float, float]]]) -> Tokens:
    found = {name: run()[0] for name, run in runs.items()}
    first, *others = found
    for other in others:
        different = sum(a != b for a, b in zip(found[first], found[other], strict=True))
        if different:
            raise GateError(f"{other} chose other tokens than {first} in {different} jobs")
    return found[first]


def _static(
    model: OpenMythos, jobs: Sequence[Job], n_loops: int, slots: int, form: str,
    stages: dict[str, Stopwatch],
) -> Callable[[], tuple[Tokens, float, float]]:  # fmt: skip
    def run() -> tuple[Tokens, float, float]:
        cpu = wall = 0.0
        tokens: Tokens = []
        for start in range(0, len(jobs), slots):
            own = stages if form == FULL else {}
            batch = StaticBatch(model, jobs[start : start + slots], n_loops, form, own)
            batch.start()
            begun = time.process_time(), time.perf_counter()
            tokens += batch.run()
            cpu += time.process_time() - begun[0]
            wall += time.perf_counter() - begun[1]
        return tokens, cpu, wall

    return run


def _engine(form: EngineForm) -> Callable[[], tuple[Tokens, float, float]]:
    def run() -> tuple[Tokens, float, float]:
        before = form.prompts.cpu, form.prompts.wall
        begun = time.process_time(), time.perf_counter()
        tokens = form.run()
        cpu, wall = time.process_time() - begun[0], time.perf_counter() - begun[1]
        cpu -= form.prompts.cpu - before[0]
        return tokens, cpu, wall - (form.prompts.wall - before[1])

    return run


def own_seconds(model: OpenMythos, jobs: Sequence[Job], n_loops: int, slots: int) -> float:
    """Return the CPU seconds of a tick beside the model's loop, prompts and edges.

    Args:
        model: The model.
        jobs: As many as slots, of equal length, all at full depth: all rows loop in every tick.
        n_loops: All loops.
        slots: Rows at a time.
    """
    form = EngineForm(model, jobs, n_loops, slots, exact=False)
    engine, runner, recurrent = form.engine, form.engine.runner, model.recurrent
    whole, inner, edge = Stopwatch(), Stopwatch(), Stopwatch()
    with ExitStack() as stack:
        for owner, name, watch in (
            (engine, "step", whole), (runner, "leave", edge), (runner, "enter", edge),
        ):  # fmt: skip
            stack.enter_context(patch.object(owner, name, watch.around(getattr(owner, name))))
        step = inner.around(recurrent.step)

        def of_rows(*arguments: Any) -> Any:
            """Only the engine's ticks pass the loop indices as a tensor."""
            return (step if isinstance(arguments[2], Tensor) else own_step)(*arguments)

        own_step = recurrent.step
        stack.enter_context(patch.object(recurrent, "step", of_rows))
        form.run()
        for watch in (whole, inner, edge, form.prompts):
            watch.clear()
        form.run()
    return (whole.cpu - edge.cpu - form.prompts.cpu - inner.cpu) / inner.calls
