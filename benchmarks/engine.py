"""The serving engine against static batches, at recorded depths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.clock import release, threads
from benchmarks.depths import depths, jobs
from benchmarks.engine_forms import ENGINE, EXACT, TURNS, Comparison, compare_forms, own_seconds
from benchmarks.measure import Finding, Measured
from benchmarks.models import FULL as FULL_SCALE
from benchmarks.models import Scale, build
from benchmarks.plots import BY_DEPTH
from benchmarks.static_batch import COMPACT, FULL, LOCKSTEP, Job
from open_mythos.model.mythos import OpenMythos

LOOPS, MEAN, PROMPT = 16, 6.0, 8
OWN_MILLISECONDS = 0.2
MEANS = (2.0, 4.0, 6.0, 9.0, 12.0)
"""Mean depths of the comparison against depth."""


@dataclass(frozen=True)
class Case:
    """Jobs on a model, and the goals of their ratios."""

    name: str
    dim: int
    experts: tuple[int, int]
    shape: str
    """Distribution of depths, or "all loops"."""
    lengths: tuple[int, ...]
    """New tokens of every job."""
    goals: dict[str, float]


def title(scale: Scale) -> str:
    """Return a heading for the rows."""
    return (
        f"serving {_slots(scale)} rows at a time, mean depth {MEAN:g} of {LOOPS} loops replayed, "
        "MLA, 1 + 1 + 1 layers, greedy, one thread, CPU seconds without prompts"
    )


def _slots(scale: Scale) -> int:
    return 16 if scale is FULL_SCALE else 4


def _lengths(least: int, most: int, n: int) -> tuple[int, ...]:
    generator = random.Random(3)
    return tuple(generator.randint(least, most) for _ in range(n))


def cases(scale: Scale) -> list[Case]:
    """Return all cases of a scale."""
    if scale is not FULL_SCALE:
        return [
            Case("equal lengths, geometric", scale.dim, (4, 2), "geometric", (3,) * 5, {}),
            Case("all loops", scale.dim, (4, 2), "all loops", (3,) * 4, {}),
        ]
    few, equal, half, mixed = (33,) * 16, (64,) * 32, (64,) * 16, _lengths(4, 32, 96)
    moe, fast = (16, 2), {"exact": 0.75}
    return [
        Case("equal lengths, geometric", 512, moe, "geometric", equal,
             {"lockstep": 1.4, "bound": 80.0} | fast),
        Case("equal lengths, lognormal", 512, moe, "lognormal", half, {"bound": 80.0} | fast),
        Case("equal lengths, two depths", 512, moe, "two depths", half, {"bound": 80.0} | fast),
        Case("lengths 4 to 32, lognormal", 512, moe, "lognormal", mixed,
             {"lockstep": 2.0, "compact": 1.25} | fast),
        Case("all loops", 512, moe, "all loops", few, {"static": 0.95}),
        Case("dense, equal lengths, geometric", 512, (0, 0), "geometric", half,
             {"lockstep": 1.4, "bound": 80.0} | fast),
        Case("dim 1024, equal lengths, geometric", 1024, moe, "geometric", (33,) * 16,
             {"lockstep": 1.4, "bound": 90.0} | fast),
    ]  # fmt: skip


def rows(scale: Scale) -> Iterator[Measured]:
    """Measure the ratios of every case."""
    turns = TURNS if scale is FULL_SCALE else 1
    every = cases(scale)
    for case in every:
        sized = replace(scale, dim=case.dim, n_loops=LOOPS)
        model = build(sized, "mla", case.experts).eval()
        with threads(1):
            yield from _of(case, scale, model, turns)
            if case is every[0]:
                yield from _against_depth(case, scale, model)
        del model
        release()


def _of(case: Case, scale: Scale, model: OpenMythos, turns: int) -> Iterator[Finding]:
    work, slots = _jobs(case, model), _slots(scale)
    if case.shape == "all loops":
        found = compare_forms(model, work, LOOPS, slots, forms=(FULL, ENGINE), turns=turns)
        yield _finding(case, found, "engine over a static batch", "static", (ENGINE, FULL))
        seconds = own_seconds(model, work[:slots], LOOPS, slots)
        yield Finding(
            f"{case.name}: a tick of {slots} rows beside the model's loop", "float32",
            1e3 * seconds, "ms", seconds=seconds, at_most=True,
            goal=OWN_MILLISECONDS if case.goals else None,
        )  # fmt: skip
        return
    found = compare_forms(model, work, LOOPS, slots, turns=turns)
    for name, goal, pair in (
        ("engine over full depth", "", (ENGINE, FULL)),
        ("engine over lockstep", "lockstep", (ENGINE, LOCKSTEP)),
        ("engine over compact", "compact", (ENGINE, COMPACT)),
        ("exact engine over the fast one", "exact", (EXACT, ENGINE)),
    ):
        yield _finding(case, found, name, goal, pair)
    if "bound" in case.goals or scale is not FULL_SCALE:
        yield Finding(
            f"{case.name}: part of the bound", "float32", 100 * found.of_bound, "%",
            goal=case.goals.get("bound"), numbers=found.numbers(),
            why=f"bound {found.bound:.2f}x of full depth; {_why(found)}",
        )  # fmt: skip


def _against_depth(case: Case, scale: Scale, model: OpenMythos) -> Iterator[Finding]:
    """The engine and static batches at geometric depths of several means."""
    forms, full = (FULL, LOCKSTEP, ENGINE), scale is FULL_SCALE
    for mean in MEANS if full else MEANS[:1]:
        lengths = (33,) * _slots(scale) if full else case.lengths
        given = depths(case.shape, sum(lengths), mean, LOOPS)
        work = jobs(lengths, given, PROMPT, LOOPS, model.cfg.vocab_size)
        turns = 2 if full else 1
        found = compare_forms(model, work, LOOPS, _slots(scale), forms=forms, turns=turns)
        named = replace(case, name=f"{BY_DEPTH} {mean:g}", goals={})
        yield _finding(named, found, "engine over full depth", "", (ENGINE, FULL))


def _finding(case: Case, found: Comparison, name: str, goal: str, pair: tuple[str, str]) -> Finding:
    return Finding(
        f"{case.name}: {name}", "float32", found.ratio(*pair), "x",
        goal=case.goals.get(goal), seconds=found.taken[pair[0]].median, numbers=found.numbers(),
        why=_why(found),
    )  # fmt: skip


def _why(found: Comparison) -> str:
    """Format tokens per second of all forms and where the engine's time goes."""
    speeds = ", ".join(
        f"{name} {found.n_tokens / taken.median:.0f}" for name, taken in found.taken.items()
    )
    stages = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in found.stages.items())
    return (
        f"tokens per CPU second: {speeds}; full batch: {stages}; the engine has "
        f"{found.rows['loop']:.1f} rows in a loop and {found.rows['edge']:.1f} in an edge"
    )


def _jobs(case: Case, model: OpenMythos) -> list[Job]:
    n = sum(case.lengths)
    given = [LOOPS] * n if case.shape == "all loops" else depths(case.shape, n, MEAN, LOOPS)
    return jobs(case.lengths, given, PROMPT, LOOPS, model.cfg.vocab_size)
