"""C11c: the same on boards of 81 cells, where two puzzles in five need guesses."""

from __future__ import annotations

from experiments.c11_reasoning.solving import LOOPED, PuzzleClaim
from experiments.c11_reasoning.sudoku_recipe import untrained
from experiments.claim import Claim
from experiments.tasks.puzzle import puzzle_recipe
from experiments.tasks.sudoku import Sudoku
from open_mythos.train import RunConfig

MEAN_LOOPS = 8
DOUBLE = 2 * MEAN_LOOPS
CHOSEN_LOOPS = 64
UNROLLED = 2 * MEAN_LOOPS
"""Blocks of the dense model that is as deep as the loops of two blocks."""
STEPS, EASY_STEPS, WIDTH, BATCH, RATE = 5000, 3000, 128, 16, 5e-3
TASK = Sudoku(height=3, width=3, easy_steps=EASY_STEPS)
AHEAD, LEARNT = 20, 0.9


def recipe(*, quick: bool = False, lr: float = RATE) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    run = puzzle_recipe(
        TASK.vocab_size, TASK.grid.cells, loops=MEAN_LOOPS, lr=lr, steps=STEPS, dim=WIDTH,
        batch=BATCH, mixed_share=1.0, quick=quick,
    )  # fmt: skip
    run.train.dtype, run.model.attn_backend = "bfloat16", "reference"  # half the time on CPUs
    return run


CLAIM = Claim.read(__file__, vars())
PUZZLES = PuzzleClaim(
    name="Sudoku",
    task=TASK,
    recipe=recipe,
    arms={
        LOOPED: {"seeds": 3},
        "dense-16-blocks": {"dense": True, "unrolled": MEAN_LOOPS},
        "dense-equal-flops": {"dense": True, "times": MEAN_LOOPS},
        "dense-16-blocks-lr2.5e-3": {"dense": True, "unrolled": MEAN_LOOPS, "lr": 2.5e-3},
        "dense-16-blocks-lr1e-2": {"dense": True, "unrolled": MEAN_LOOPS, "lr": 1e-2},
        "dense": {"dense": True},
        "dense-lr2.5e-3": {"dense": True, "lr": 2.5e-3},
        "dense-lr1e-2": {"dense": True, "lr": 1e-2},
    },
    levels=("1-4", "5-8", "9+", "1 guess", "2-3 guesses", "4+ guesses"),
    hard=("guess", "guessing"),
    needs="rounds, or guesses, that a solver needs",
    trained=DOUBLE,
    chosen=CHOSEN_LOOPS,
    loops=(1, 2, 4, 8, DOUBLE, 32, CHOSEN_LOOPS, 128),
    asked=800,
    ahead=AHEAD,
    learnt=LEARNT,
    untrained=untrained,
)
cells, run_cell = PUZZLES.cells, PUZZLES.run_cell
summarise, plot = PUZZLES.summarise, PUZZLES.plot
