"""Recipe of a model that solves Sudokus by looping, and how it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from experiments.tasks import TaskLoader
from experiments.tasks.puzzle import puzzle_recipe
from experiments.tasks.sudoku import Questions, Sudoku
from experiments.training import build, seeded
from open_mythos.data.permutation import Int64Array
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos
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


def puzzles(run: RunConfig, task: Sudoku = TASK) -> TaskLoader:
    """Return the training data."""
    return TaskLoader(task, global_batch=run.train.global_batch)


@dataclass(frozen=True)
class Answers:
    """What a model answers at each number of loops; one for a dense model."""

    loops: list[int]
    boards: list[Int64Array]
    """(M, N) per number of loops."""

    def solved(self, questions: Questions, level: str) -> list[float]:
        """Return the share of the puzzles of ``level`` that are right in every cell."""
        asked = questions.level(level)
        right = [(found == questions.solution).all(1)[asked] for found in self.boards]
        return [float(each.mean()) for each in right]

    def cells(self, questions: Questions, level: str) -> list[float]:
        """Return the share of the empty cells of ``level`` that are right."""
        asked = questions.level(level)
        empty = questions.clues[asked] == 0
        right = [(found == questions.solution)[asked][empty] for found in self.boards]
        return [float(each.mean()) for each in right]


def answers(
    model: Model, clues_MN: Int64Array, loops: Sequence[int] = LOOPS, task: Sudoku = TASK,
    rows: int = 512,
) -> Answers:  # fmt: skip
    """Return the boards that ``model`` fills in after each of ``loops`` (rising)."""
    ids_MN = task.tokens(clues_MN)
    found: list[list[Int64Array]] = []
    with frozen(model, torch.float32) as device:
        for part in ids_MN.to(device).split(rows):
            if not isinstance(model, OpenMythos):
                found.append([task.boards(part, model(part))])
                continue
            ctx = model.context(part)
            states = model.unroll(part, max(loops), ctx)
            found.append([
                task.boards(part, model.logits(h_BTD, ctx)) for t, h_BTD in states if t + 1 in loops
            ])  # fmt: skip
    shown = list(loops) if isinstance(model, OpenMythos) else [1]
    return Answers(shown, [np.concatenate(parts) for parts in zip(*found, strict=True)])
