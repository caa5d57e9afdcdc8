"""SUDOKU: fill the empty cells of a board; the model sees all cells at once.

A token is a clue (or an empty cell) together with its place, so that attention needs no positions;
the target of an empty cell is its digit. Every row is a fresh puzzle: one of a pool of puzzles with
its digits, rows and columns permuted at random (two million ways on a 6 x 6 board). Test puzzles
come from another pool and are sorted by what a solver needs: rounds of elimination, or guesses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.puzzle import Questions
from experiments.tasks.sudoku_solver import Grid
from open_mythos.checks import check_count
from open_mythos.data import Batch
from open_mythos.data.batch import IGNORE_INDEX
from open_mythos.data.permutation import Int64Array
from open_mythos.seeding import derive_seed


@dataclass(frozen=True)
class Sudoku:
    """The task: boards in boxes of ``height`` rows and ``width`` columns.

    Attributes:
        pool: Puzzles that training rows are made of.
        fewest: Fewest clues of a puzzle.
        easy_steps: Steps at the start of training in which half of the rows show a share of their
            empty cells too, uniform in [0, 1].
    """

    height: int = 2
    width: int = 3
    pool: int = 2000
    fewest: int = 0
    easy_steps: int = 0
    seed: int = 0

    @cached_property
    def grid(self) -> Grid:
        """Return the board."""
        return Grid(self.height, self.width)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens: every cell, empty or with one of n digits."""
        return self.grid.cells * (self.grid.digits + 1)

    @property
    def answers(self) -> slice:
        """Return the tokens that answer: the digits."""
        return slice(1, self.grid.digits + 1)

    @cached_property
    def puzzles(self) -> tuple[Int64Array, Int64Array]:
        """Return the (pool, N) puzzles of training and their solutions."""
        return self._made("sudoku/train", self.pool)

    def prolonged(self, times: int) -> Sudoku:
        """Return the task with ``times`` as many easy steps, for as many more steps in all."""
        return replace(self, easy_steps=self.easy_steps * times)

    def batch(self, step: int, *, global_batch: int) -> Batch:
        """Draw the rows (B, N) of ``step``, a pure function of the arguments."""
        check_count("step", step, 0)
        check_count("global_batch", global_batch)
        rng = np.random.default_rng(derive_seed(self.seed, "sudoku/rows", step))
        chosen_B = rng.integers(self.pool, size=global_batch)
        clues_BN, solution_BN = self.grid.shuffle(rng, *(x[chosen_B] for x in self.puzzles))
        if step < self.easy_steps:
            share_B1 = rng.random((global_batch, 1)) * rng.integers(2, size=(global_batch, 1))
            clues_BN = np.where(rng.random(clues_BN.shape) < share_B1, solution_BN, clues_BN)
        first = step * global_batch
        return Batch(
            self.tokens(clues_BN), self._targets(clues_BN, solution_BN), None,
            torch.arange(first, first + global_batch),
        )  # fmt: skip

    def tokens(self, boards_MN: Int64Array) -> Tensor:
        """Return the ids (M, N) of boards."""
        place_N = np.arange(self.grid.cells) * (self.grid.digits + 1)
        return torch.from_numpy(boards_MN + place_N)

    def clues(self, ids_MN: Tensor) -> Int64Array:
        """Return the (M, N) boards of ids, 0 at empty cells."""
        found: Int64Array = ids_MN.cpu().numpy() % (self.grid.digits + 1)
        return found

    def filled(self, ids_MN: Tensor, digits_MN: Tensor) -> Int64Array:
        """Return the (M, N) boards whose empty cells hold ``digits``."""
        clues_MN = self.clues(ids_MN)
        return np.where(clues_MN > 0, clues_MN, digits_MN.cpu().numpy())

    def questions(self, count: int) -> Questions:
        """Draw ``count`` test puzzles, rated."""
        clues_MN, solution_MN = self._made("sudoku/test", count)
        solved = self.grid.solve(clues_MN)
        return Questions(
            self.tokens(clues_MN), self._targets(clues_MN, solution_MN), solved.rounds,
            solved.guesses,
        )  # fmt: skip

    @staticmethod
    def _targets(clues_MN: Int64Array, solution_MN: Int64Array) -> Tensor:
        return torch.from_numpy(np.where(clues_MN == 0, solution_MN, IGNORE_INDEX))

    def _made(self, stream: str, count: int) -> tuple[Int64Array, Int64Array]:
        rng = np.random.default_rng(derive_seed(self.seed, stream))
        return self.grid.puzzles(count, rng, self.fewest)
