"""C11b: do more loops follow a state for longer than in training?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from experiments.c1_depth.chain_recipe import recipe
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
from experiments.tasks import ChainLoader
from experiments.tasks.accuracy import answered
from experiments.tasks.word_problem import WordProblem
from experiments.training import build, chain_costs, fit, run_of

TASK = WordProblem()
TRAINED = 5
TWICE, FARTHER = 2 * TRAINED, 3 * TRAINED
LENGTHS = (TRAINED, 7, TWICE, FARTHER)
FEWEST, MOST = TRAINED, 2 * TRAINED
CHOSEN_LOOPS, MANY_LOOPS = 24, 64
"""Depth of the verdict, fixed before the runs; a much larger one."""
LOOPS = (1, 2, 5, 7, 10, 16, CHOSEN_LOOPS, 32, MANY_LOOPS)
STEPS, RATE, WORDS, SEVERAL_AFTER = 500, 1e-2, 4, 0.6
SOLVED, PART, LEARNT = 0.95, 0.5, 0.9
LOOPED = "looped"
RIVALS = ("dense", "dense-lr3e-3", "dense-lr3e-2", "dense-equal-flops", "dense-equal-depth")
_PROGRAMS = 8192

CLAIM = Claim.read(__file__, vars())
_DENSE: dict[str, Any] = {"architecture": "dense"}
_ARMS: dict[str, dict[str, Any]] = {
    LOOPED: {"seeds": 5},
    "dense": _DENSE,
    "dense-lr3e-3": _DENSE | {"lr": 3e-3},
    "dense-lr3e-2": _DENSE | {"lr": 3e-2},
    "dense-equal-flops": _DENSE | {"times": 3.5},
    "dense-equal-depth": _DENSE | {"unrolled": MOST, "lr": 3e-3},
}


def cells(scale: str) -> list[Cell]:
    """Return every arm with its seeds, one seed after the other."""
    if scale == QUICK:
        return sweep({LOOPED: _settings(scale), "dense": _settings(scale, **_DENSE)}, [0])
    return arms_by_seed(_ARMS, partial(_settings, scale))


def _settings(
    scale: str, *, architecture: str = "looped", lr: float = RATE, times: float = 1,
    unrolled: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    quick = scale == QUICK
    run = recipe(quick=quick)
    run.architecture = architecture
    run.model.vocab_size = TASK.vocab_size
    run.model.max_loop_iters = MOST
    run.depth.low, run.depth.high = FEWEST, MOST
    run.optim.name, run.optim.lr = "muon", lr
    steps = run.train.steps if quick else round(STEPS * times)
    run.train.steps, run.train.warmup_steps = steps, max(1, steps // 16)
    run.train.log_every, run.train.seq_len = max(1, steps // 32), WORDS * (TRAINED + 1)
    if architecture == "dense":
        run.train.grad_loops = None
    values = run.to_dict()
    del values["train"]["seed"], values["data"]
    return {"run": values, "unrolled": unrolled, "words": WORDS,
            "pair_from": round(SEVERAL_AFTER * steps), "lengths": list(LENGTHS),
            "loops": list(LOOPS), "programs": 300 if quick else _PROGRAMS}  # fmt: skip


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm and ask it for the products of unseen words."""
    s, run = cell.settings, run_of(cell)
    loader = ChainLoader(
        TASK, global_batch=run.train.global_batch, hops=TRAINED, pair_from=s["pair_from"],
        chains=s["words"],
    )  # fmt: skip
    model = build(run, unrolled=s["unrolled"])
    curve = fit(model, loader, run)["loss"]
    return {
        **chain_costs(model, run, loader, TRAINED),
        "right": [
            answered(model, *TASK.questions(length, s["programs"]), s["loops"])
            for length in s["lengths"]
        ],
        "curve": curve,
    }


def right(length: int = TWICE, loops: int = CHOSEN_LOOPS) -> Any:
    """Return the metric of the share of words of ``length`` answered; a dense model has one."""

    def of(record: Record) -> float:
        s = record.settings
        return at_depth(record.figures["right"][s["lengths"].index(length)], s["loops"], loops)

    return of


def _mean(found: Sequence[Record], length: int = TWICE, loops: int = CHOSEN_LOOPS) -> float:
    return mean(map(right(length, loops), found))


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the words of twice the trained length."""
    arms = by_arm(records)
    looped = arms[LOOPED]
    ours, known = _mean(looped), _mean(looped, TRAINED)
    dense = {arm: _mean(found) for arm, found in arms.items() if arm in RIVALS}
    best = max(dense, key=lambda arm: dense[arm])
    return Summary(
        verdict(
            ours >= SOLVED and dense[best] < SOLVED, ours >= PART and ours > dense[best],
            unclear="" if known >= LEARNT else "words of the trained length were not learnt",
        ),
        f"Trained on words of {TRAINED}, the looped model answers {known:.1%} of unseen words of "
        f"that length, {_mean(looped, 7):.1%} of 7, {ours:.1%} of {TWICE} (worst seed "
        f"{min(map(right(), looped)):.1%}) and {_mean(looped, FARTHER):.1%} of {FARTHER} at "
        f"{CHOSEN_LOOPS} loops; of {TWICE} it answers {_mean(looped, loops=TRAINED):.1%} at "
        f"{TRAINED} loops and {_mean(looped, loops=MANY_LOOPS):.1%} at {MANY_LOOPS}. The best "
        f"dense arm ({best}) answers {dense[best]:.1%} of {TWICE}, and "
        f"{_mean(arms[best], TRAINED):.1%} of {TRAINED}.",
        f"length {TWICE}: {ours:.1%} at {CHOSEN_LOOPS} loops, dense {dense[best]:.1%}",
        ("arm", "seeds", "parameters", "training FLOPs", "loops",
         *(f"length {length}" for length in LENGTHS)),
        [row for arm, found in arms.items() for row in _rows(arm, found)],
        {"loops": list(LOOPS), "lengths": list(LENGTHS),
         "looped": [columns(r.figures["right"][i] for r in looped) for i in range(len(LENGTHS))],
         "dense": {arm: [_mean(arms[arm], length) for length in LENGTHS] for arm in dense}},
    )  # fmt: skip


def plot(summary: Summary, path: Path) -> None:
    """Plot the looped model over loops, and all arms over the length."""
    data = summary.data
    with panels(path, 2) as (over_loops, arms):
        curves = {
            f"length {n}": row for n, row in zip(data["lengths"], data["looped"], strict=True)
        }
        lines(over_loops, data["loops"], curves, small=True)
        log2_ticks(over_loops, data["loops"])
        over_loops.set(title="Word problem of S5: same weights, more loops", xlabel="loops",
                       ylabel="words answered", ylim=(0, 1.03))  # fmt: skip
        place = data["loops"].index(CHOSEN_LOOPS)
        ours = {f"looped, {CHOSEN_LOOPS} loops": [row[place] for row in data["looped"]]}
        lines(arms, data["lengths"], ours | data["dense"], small=True)
        arms.axvspan(0, TRAINED, color=COLOURS[0], alpha=0.07, lw=0)
        arms.set(title="All arms", xlabel="length (shaded: seen in training)",
                 xlim=(TRAINED - 1, FARTHER), ylim=(0, 1.03))  # fmt: skip


def _rows(arm: str, found: Sequence[Record]) -> list[tuple[str, ...]]:
    first = found[0].figures
    depths = (TRAINED, MOST, CHOSEN_LOOPS, MANY_LOOPS) if arm == LOOPED else (CHOSEN_LOOPS,)
    return [
        (
            arm, str(len(found)), f"{first['parameters']:,}", f"{first['training_flops']:.1e}",
            str(loops) if arm == LOOPED else "-",
            *(share(found, right(length, loops)) for length in LENGTHS),
        )
        for loops in depths
    ]  # fmt: skip
