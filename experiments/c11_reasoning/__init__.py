"""C11: do loops solve what dense models cannot?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.c11_reasoning.exits import measure_gate
from experiments.c11_reasoning.sudoku_recipe import (
    CHOSEN_LOOPS,
    HARDEST,
    LEVELS,
    LOOPS,
    RATE,
    STEPS,  # noqa: F401 (named in claim.yaml)
    TASK,
    TRAINED_LOOPS,
    answers,
    puzzles,
    recipe,
    untrained,
)
from experiments.claim import (
    QUICK,
    Cell,
    Claim,
    Place,
    Record,
    Summary,
    arms_by_seed,
    sweep,
    verdict,
)
from experiments.figure import COLOURS, lines, log2_ticks, panels
from experiments.spread import at_depth, by_arm, columns, share
from experiments.tasks.sudoku import Sudoku
from experiments.training import build, fit, run_of
from open_mythos.accounting import account
from open_mythos.model.mythos import OpenMythos

DOUBLE = 2 * TRAINED_LOOPS
BLOCKS = 2
UNROLLED = BLOCKS * TRAINED_LOOPS
AHEAD, LEARNT = 20, 0.9
LOOPED = "looped"
EQUAL = ("dense", "dense-lr5e-3", "dense-lr2e-2", "dense-equal-flops")
"""Dense arms of equal parameters."""
SEEDS = 3
_ASKED = 3000

CLAIM = Claim.read(__file__, vars())
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {"seeds": SEEDS},
    "random-start": {"random_start": True},
    "dense": {"dense": True, "seeds": 2},
    "dense-lr5e-3": {"dense": True, "lr": 5e-3},
    "dense-lr2e-2": {"dense": True, "lr": 2e-2},
    "dense-equal-flops": {"dense": True, "times": TRAINED_LOOPS},
    "dense-16-blocks": {"dense": True, "unrolled": TRAINED_LOOPS, "seeds": 2},
    "dense-16-blocks-lr5e-3": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 5e-3},
    "dense-16-blocks-lr2e-2": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 2e-2},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, one seed after the other."""
    if scale == QUICK:
        return sweep({LOOPED: _settings(scale), "dense": _settings(scale, dense=True)}, [0])
    return arms_by_seed(_ARMS, partial(_settings, scale))


def _settings(
    scale: str, *, dense: bool = False, lr: float = RATE, times: int = 1,
    unrolled: int | None = None, random_start: bool = False,
) -> dict[str, Any]:  # fmt: skip
    quick = scale == QUICK
    run = recipe(quick=quick, lr=lr)
    run.architecture = "dense" if dense else "looped"
    run.train.steps *= times
    if scale == "gpu":
        run.train.device = "cuda"
    gate = (
        {"rows": 2, "positions": 64, "steps": 2} if quick
        else {"rows": 256, "positions": 4096, "steps": 600}
    )  # fmt: skip
    task = asdict(replace(TASK, pool=4) if quick else TASK)
    return {"run": run.to_dict(), "task": task, "random_start": random_start,
            "unrolled": unrolled, "loops": list(LOOPS),
            "asked": 60 if quick else _ASKED, "gate": None if dense else gate}  # fmt: skip


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm and ask it at every number of loops; train a gate on a looped one."""
    run, s = run_of(cell), cell.settings
    task = Sudoku(**s["task"])
    model = build(run) if s["random_start"] else untrained(run, task, unrolled=s["unrolled"])
    curves = fit(model, puzzles(run, task), run)
    questions = task.questions(s["asked"])
    found = answers(model, questions.clues, s["loops"], task)
    counts = account(model, context=run.train.seq_len)
    rows = run.train.steps * run.train.global_batch * run.train.seq_len
    figures = {
        "parameters": counts.parameters_without_embedding,
        "training_flops": rows * counts.training_flops(run.depth.expected),
        "asked": {level: len(questions.level(level)) for level in LEVELS},
        "solved": {level: found.solved(questions, level) for level in LEVELS},
        "cells": found.cells(questions, HARDEST),
        "curve": curves["loss"],
    }
    if isinstance(model, OpenMythos):
        figures["exits"] = measure_gate(model, task, questions, cell.seed, **s["gate"])
    return figures


def solved(level: str = HARDEST, loops: int = CHOSEN_LOOPS) -> Any:
    """Return the metric of the share solved; a dense model has no loops."""

    def of(record: Record) -> float:
        return at_depth(record.figures["solved"][level], record.settings["loops"], loops)

    return of


def _mean(found: Sequence[Record], level: str = HARDEST, loops: int = CHOSEN_LOOPS) -> float:
    return mean(map(solved(level, loops), found))


def summarise(records: Sequence[Record]) -> Summary:
    """Compare the looped model with every dense arm on the puzzles that need guessing."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    deep, learnt = _mean(looped), _mean(looped, LEVELS[0])
    dense = {arm: _mean(found) for arm, found in arms.items() if arm.startswith("dense")}
    equal = max(dense[arm] for arm in EQUAL if arm in dense)
    best = max(dense, key=lambda arm: dense[arm])
    exits = _exits(looped)
    hops = ", ".join(f"{loops:.1f}" for loops in exits["loops"].values())
    return Summary(
        verdict(
            100 * (deep - dense[best]) >= AHEAD, 100 * (deep - equal) >= AHEAD,
            unclear="" if learnt >= LEARNT else "the rules were not learnt in these steps",
        ),
        f"Of the puzzles that need guessing the looped model solves {_mean(looped, loops=4):.1%} "
        f"with 4 loops, {_mean(looped, loops=TRAINED_LOOPS):.1%} with {TRAINED_LOOPS}, {deep:.1%} "
        f"with {CHOSEN_LOOPS} and {_mean(looped, loops=LOOPS[-1]):.1%} with {LOOPS[-1]}; the best "
        f"dense arm of equal parameters {equal:.1%}, the best of all ({best}) {dense[best]:.1%}. "
        f"With a trained gate it solves {exits['solved']:.1%} of all puzzles with "
        f"{exits['mean']:.1f} loops on average ({exits['full']:.1%} with {CHOSEN_LOOPS}) in "
        f"{exits['time']:.0%} of the time; by difficulty the loops are {hops}.",
        f"guessing {deep:.1%} at {CHOSEN_LOOPS} loops, dense {equal:.1%} (equal parameters), "
        f"{dense[best]:.1%} (equal FLOPs)",
        ("arm", "seeds", "parameters", "training FLOPs", "loops",
         *(f"{level} ({looped[0].figures['asked'][level]})" for level in LEVELS)),
        [row for arm, found in arms.items() for row in _rows(arm, found)],
        {"loops": list(LOOPS), "levels": list(LEVELS),
         "grid": [columns(r.figures["solved"][level] for r in looped) for level in LEVELS],
         "dense": {arm: [_mean(arms[arm], level) for level in LEVELS] for arm in dense},
         "exits": exits},
    )  # fmt: skip


def _exits(looped: Sequence[Record]) -> dict[str, Any]:
    """Return the means over seeds of what the gate does."""
    found = [record.figures["exits"] for record in looped]
    return {
        "loops": {level: mean(each["by_level"][level] for each in found) for level in LEVELS},
        "mean": mean(each["loops"] for each in found),
        "solved": mean(each["solved"] for each in found),
        "full": mean(each["solved_full"] for each in found),
        "time": mean(each["seconds"] / each["seconds_full"] for each in found),
    }


def plot(summary: Summary, path: Path) -> None:
    """Plot the share solved over loops, all arms over difficulty, and loops under the gate."""
    data = summary.data
    with panels(path, 3) as (grid, arms, exits):
        lines(grid, data["loops"], dict(zip(data["levels"], data["grid"], strict=True)), small=True)
        log2_ticks(grid, data["loops"])
        grid.set(title="Sudoku: same weights, more loops", xlabel="loops", ylabel="puzzles solved",
                 ylim=(0, 1.03))  # fmt: skip
        place = data["loops"].index(CHOSEN_LOOPS)
        shown = {f"looped, {CHOSEN_LOOPS} loops": [row[place] for row in data["grid"]]}
        lines(arms, range(len(data["levels"])), shown | data["dense"], small=True)
        arms.set_xticks(range(len(data["levels"])), data["levels"])
        arms.set(title="All arms by difficulty", xlabel="rounds that a solver needs",
                 ylim=(0, 1.03))  # fmt: skip
        exits.bar(data["levels"], list(data["exits"]["loops"].values()), color=COLOURS[0])
        exits.set(title="Loops per cell under the gate", xlabel="rounds that a solver needs")


def _rows(arm: str, found: Sequence[Record]) -> list[tuple[str, ...]]:
    first = found[0].figures
    depths = [4, TRAINED_LOOPS, CHOSEN_LOOPS, LOOPS[-1]] if arm == LOOPED else [CHOSEN_LOOPS]
    return [
        (
            arm, str(len(found)), f"{first['parameters']:,}", f"{first['training_flops']:.1e}",
            "-" if arm.startswith("dense") else str(loops),
            *(share(found, solved(level, loops)) for level in LEVELS),
        )
        for loops in depths
    ]  # fmt: skip
