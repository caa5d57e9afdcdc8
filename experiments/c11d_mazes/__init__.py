"""C11d: trained on easy mazes, do loops solve hard ones?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.c11_reasoning.solving import LOOPED, PuzzleClaim
from experiments.claim import Claim, Record, Summary
from experiments.figure import COLOURS, panels
from experiments.spread import by_arm, over_seeds
from experiments.tasks.maze import OPENINGS, Maze
from experiments.tasks.puzzle import puzzle_recipe
from open_mythos.train import RunConfig

TRAINED_LOOPS = 8
DOUBLE = 2 * TRAINED_LOOPS
CHOSEN_LOOPS = 32
"""Depth of the verdict, fixed before the runs."""
UNROLLED = 2 * TRAINED_LOOPS
"""Blocks of the dense model that is as deep as the loops of two blocks."""
STEPS, BATCH, RATE = 2000, 32, 1e-2
TASK = Maze()
EASY, HARD = TASK.most_rounds, 2 * TASK.most_rounds + 1
AHEAD, LEARNT = 20, 0.9
_CONTROLS = ("all-mazes", "all-mazes-dense-16-blocks")
_ALL = {"most_rounds": TASK.cells}


def recipe(*, quick: bool = False, lr: float = RATE) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    run = puzzle_recipe(
        TASK.vocab_size, TASK.cells, loops=TRAINED_LOOPS, lr=lr, steps=STEPS, batch=BATCH,
        rope_theta=100.0, quick=quick,
    )  # fmt: skip
    run.train.dtype, run.model.attn_backend = "bfloat16", "reference"  # half the time on CPUs
    return run


CLAIM = Claim.read(__file__, vars())
PUZZLES = PuzzleClaim(
    name="Mazes",
    task=TASK,
    recipe=recipe,
    arms={
        LOOPED: {"seeds": 3},
        "dense-16-blocks": {"dense": True, "unrolled": TRAINED_LOOPS, "seeds": 2},
        "dense": {"dense": True, "seeds": 2},
        "dense-16-blocks-lr5e-3": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 5e-3},
        "dense-16-blocks-lr2e-2": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 2e-2},
        "dense-lr5e-3": {"dense": True, "lr": 5e-3},
        "dense-lr2e-2": {"dense": True, "lr": 2e-2},
        "dense-equal-flops": {"dense": True, "times": TRAINED_LOOPS},
        _CONTROLS[0]: {"task": _ALL},
        _CONTROLS[1]: {"task": _ALL, "dense": True, "unrolled": TRAINED_LOOPS},
    },
    levels=("1-8", "9-12", "13-16", "17-24", "25-32", "33+"),
    hard=(f"{HARD}+", f"{HARD} rounds or more"),
    needs="rounds that a solver needs",
    trained=TRAINED_LOOPS,
    chosen=CHOSEN_LOOPS,
    loops=(1, 2, 4, 6, TRAINED_LOOPS, 12, 16, CHOSEN_LOOPS, 64),
    asked=4000,
    ahead=AHEAD,
    learnt=LEARNT,
    gate_asked=100,
)
cells, run_cell = PUZZLES.cells, PUZZLES.run_cell
_SHOWN = (4, 12, CHOSEN_LOOPS)
"""Loops after which a maze is shown."""


def summarise(records: Sequence[Record]) -> Summary:
    """Judge the hard mazes, name what all mazes in training give, and keep one maze to show."""
    found, arms = PUZZLES.summarise(records), by_arm(records)
    looped, dense = (f"{over_seeds(arms[arm], PUZZLES.solved())[0]:.1%}" for arm in _CONTROLS)
    sentence = (
        f"{found.sentence} Trained on mazes of any difficulty, the looped model solves {looped} of "
        f"the hard ones and the dense model of {UNROLLED} blocks {dense}."
    )
    data = found.data | {"example": arms[LOOPED][0].figures["example"]}
    return replace(found, sentence=sentence, data=data)


def plot(summary: Summary, path: Path) -> None:
    """Plot the claim, and below it a hard maze after some of the loops."""
    with panels(path, 3, rows=2) as axes:
        PUZZLES.draw(summary, axes[:3])
        for ax, loops in zip(axes[3:], _SHOWN, strict=True):
            _draw(ax, summary.data["example"], loops)


def _draw(ax: Any, example: Mapping[str, Any], loops: int) -> None:
    """Draw a maze with the cells that the model names, green on the path and red off it."""
    ids, path = example["ids"], example["targets"]
    said, side = example["tokens"][PUZZLES.loops.index(loops)], TASK.side
    for cell, token in enumerate(ids):
        row, column = divmod(cell, side)
        if said[cell]:
            colour = COLOURS[2] if path[cell] else COLOURS[3]
            ax.fill_between((column, column + 1), row, row + 1, color=colour, alpha=0.45, lw=0)
        for d, (down, right) in enumerate(OPENINGS):
            if not token >> d + 1 & 1:
                x, y = column + (right > 0), row + (down > 0)
                ax.plot((x, x + (down != 0)), (y, y + (right != 0)), color="#0f172a", lw=1.8)
        if token & 1:
            ax.plot(column + 0.5, row + 0.5, "o", color="#0f172a")
    wrong = sum(a != b for a, b in zip(said, path, strict=True))
    outcome = f"{wrong} cells wrong" if wrong else "solved"
    ax.set(title=f"A maze after {loops} loops: {outcome}", aspect="equal", ylim=(side, 0))
    ax.axis("off")
