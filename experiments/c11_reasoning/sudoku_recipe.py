"""Recipe of a model that solves Sudokus by looping."""

from __future__ import annotations

import numpy as np
import torch

from experiments.tasks.puzzle import puzzle_recipe
from experiments.tasks.sudoku import Sudoku
from experiments.training import build, seeded
from open_mythos.train import RunConfig
from open_mythos.train.build import Model

TASK = Sudoku()
TRAINED_LOOPS = 8
CHOSEN_LOOPS = 32
"""Depth of the verdict, fixed before the runs."""
LOOPS = (1, 2, 4, 6, TRAINED_LOOPS, 12, 16, CHOSEN_LOOPS, 64)
LEVELS = ("1-3", "4", "5", "6-7", "8+", "guess")
"""Difficulty: rounds of elimination that a solver needs, or that it has to guess."""
STEPS = 1000
RATE = 1e-2


def recipe(
    seed: int = 0, *, quick: bool = False, lr: float = RATE, steps: int = STEPS
) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    return puzzle_recipe(
        TASK.vocab_size, TASK.grid.cells, loops=TRAINED_LOOPS, lr=lr, steps=steps, quick=quick,
        seed=seed,
    )  # fmt: skip


def untrained(run: RunConfig, task: Sudoku = TASK, *, unrolled: int | None = None) -> Model:
    """Build the model, or a dense one as deep as ``unrolled`` loops.

    The embedding of every token starts as the sum of a vector of its digit, row, column and box:
    otherwise the rules are found much later (the arm "random-start").
    """
    model = build(run, unrolled=unrolled)
    n = task.grid.digits
    cell = np.arange(task.grid.cells)
    box = cell // n // task.grid.height * task.grid.height + cell % n // task.grid.width
    places = [torch.from_numpy(each) for each in (cell // n, cell % n, box)]
    std = model.embedding.weight.std().item() / 2  # of each of the four
    with seeded(run.train.seed, "sudoku/embedding"), torch.no_grad():
        place_ND = torch.stack([std * torch.randn(n, model.cfg.dim)[each] for each in places]).sum(
            0
        )
        digit_nD = std * torch.randn(n + 1, model.cfg.dim)
        model.embedding.weight.copy_((place_ND.unsqueeze(1) + digit_nD).flatten(0, 1))
    return model
