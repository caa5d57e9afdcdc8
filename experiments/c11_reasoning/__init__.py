"""C11: do loops solve what dense models cannot?"""

from __future__ import annotations

from experiments.c11_reasoning.solving import LOOPED, PuzzleClaim
from experiments.c11_reasoning.sudoku_recipe import (
    CHOSEN_LOOPS,
    LEVELS,
    LOOPS,
    STEPS,  # noqa: F401 (named in claim.yaml)
    TASK,
    TRAINED_LOOPS,
    recipe,
    untrained,
)
from experiments.claim import Claim

DOUBLE = 2 * TRAINED_LOOPS
UNROLLED = 2 * TRAINED_LOOPS
"""Blocks of the dense model that is as deep as the loops of two blocks."""
AHEAD, LEARNT = 20, 0.9
SEEDS = 5

CLAIM = Claim.read(__file__, vars())
PUZZLES = PuzzleClaim(
    name="Sudoku",
    task=TASK,
    recipe=recipe,
    arms={
        LOOPED: {"seeds": SEEDS},
        "random-start": {"random_start": True},
        "dense": {"dense": True, "seeds": 2},
        "dense-lr5e-3": {"dense": True, "lr": 5e-3},
        "dense-lr2e-2": {"dense": True, "lr": 2e-2},
        "dense-equal-flops": {"dense": True, "times": TRAINED_LOOPS},
        "dense-16-blocks": {"dense": True, "unrolled": TRAINED_LOOPS, "seeds": 2},
        "dense-16-blocks-lr5e-3": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 5e-3},
        "dense-16-blocks-lr2e-2": {"dense": True, "unrolled": TRAINED_LOOPS, "lr": 2e-2},
    },
    levels=LEVELS,
    hard=("guess", "guessing"),
    needs="rounds, or guesses, that a solver needs",
    trained=TRAINED_LOOPS,
    chosen=CHOSEN_LOOPS,
    loops=LOOPS,
    asked=3000,
    ahead=AHEAD,
    learnt=LEARNT,
    untrained=untrained,
)
cells, run_cell = PUZZLES.cells, PUZZLES.run_cell
summarise, plot = PUZZLES.summarise, PUZZLES.plot
