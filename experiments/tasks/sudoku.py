"""SUDOKU: fill the empty cells of a board; the model sees all cells at once.

A token is a clue (or an empty cell) together with its place, so that attention needs no positions;
the target of an empty cell is its digit. Every row is a fresh puzzle: one of a pool of puzzles with
its digits, rows and columns permuted at random (two million ways on a 6 x 6 board). Test puzzles
come from another pool and are sorted by what a solver needs: rounds of elimination, or guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

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

    @cached_property
    def puzzles(self) -> tuple[Int64Array, Int64Array]:
        """Return the (pool, N) puzzles of training and their solutions."""
        return self._made("sudoku/train", self.pool)

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
        targets_BN = np.where(clues_BN == 0, solution_BN, IGNORE_INDEX)
        first = step * global_batch
        return Batch(
            self.tokens(clues_BN), torch.from_numpy(targets_BN), None,
            torch.arange(first, first + global_batch),
        )  # fmt: skip

    def tokens(self, boards_MN: Int64Array) -> Tensor:
        """Return the ids (M, N) of boards."""
        place_N = np.arange(self.grid.cells) * (self.grid.digits + 1)
        return torch.from_numpy(boards_MN + place_N)

    def boards(self, ids_MN: Tensor, logits_MNV: Tensor) -> Int64Array:
        """Return (M, N) boards whose empty cells hold the likeliest digits."""
        n = self.grid.digits
        clues_MN = ids_MN.cpu().numpy() % (n + 1)
        filled_MN = logits_MNV[..., 1 : n + 1].argmax(-1).cpu().numpy() + 1
        return np.where(clues_MN > 0, clues_MN, filled_MN)

    def questions(self, count: int) -> Questions:
        """Draw ``count`` test puzzles, rated."""
        clues_MN, solution_MN = self._made("sudoku/test", count)
        solved = self.grid.solve(clues_MN)
        return Questions(clues_MN, solution_MN, solved.rounds, solved.guesses)

    def _made(self, stream: str, count: int) -> tuple[Int64Array, Int64Array]:
        rng = np.random.default_rng(derive_seed(self.seed, stream))
        return self.grid.puzzles(count, rng, self.fewest)


@dataclass(frozen=True)
class Questions:
    """(M, N) test puzzles with their solutions and how hard they are for a solver."""

    clues: Int64Array
    solution: Int64Array
    rounds: Int64Array
    """(M,) rounds of elimination that solve the puzzle, or precede the first guess."""
    guesses: Int64Array
    """(M,) boards that a solver has to copy; 0 if elimination is enough."""

    def at_most(self, most: int, levels: Sequence[str]) -> Questions:
        """Return the first ``most`` puzzles of every difficulty."""
        kept = np.sort(np.concatenate([self.level(name)[:most] for name in levels]))
        return Questions(*(getattr(self, field.name)[kept] for field in fields(self)))

    def level(self, name: str) -> Int64Array:
        """Return the puzzles of a difficulty: "3", "6-7", "8+" rounds; "guess", "2-3 guesses"."""
        amount, _, guesses = ("1+ guesses" if name == "guess" else name).partition(" ")
        needed_M = self.guesses if guesses else np.where(self.guesses > 0, -1, self.rounds)
        low, _, high = amount.rstrip("+").partition("-")
        most = np.inf if amount.endswith("+") else int(high or low)
        return ((needed_M >= int(low)) & (needed_M <= most)).nonzero()[0]
