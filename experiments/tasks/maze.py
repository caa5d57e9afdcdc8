"""MAZE: which cells lie on the way between two cells; the model sees all cells at once.

A token is a cell: its openings (up, down, left, right) and whether it is one of the two ends; the
target says whether the path between them passes it. There is one path, since no maze has a cycle.
A cell off the path is known by its neighbours alone, but only after all that lies behind it: a
solver that fills dead ends needs as many rounds as the longest branch off the path has cells.

Every row is a fresh pair of ends in one of a pool of mazes, turned or mirrored at random. Training
has easy pairs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from experiments.tasks.puzzle import Questions
from open_mythos.checks import check_count
from open_mythos.data import Batch
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError
from open_mythos.seeding import derive_seed

OPENINGS = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""(rows, columns) of an opening up, down, left and right; ``d ^ 1`` is the way back of ``d``."""
_TRIES = 64
"""Most draws of four times the rows that are needed."""
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Maze:
    """The task: mazes of ``side`` x ``side`` cells.

    Attributes:
        pool: Mazes that training rows are made of.
        most_rounds: Most rounds that a training row needs. Test mazes may need more.
    """

    side: int = 9
    pool: int = 4000
    most_rounds: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("side", self.side, 2)
        check_count("pool", self.pool)
        check_count("most_rounds", self.most_rounds)

    @property
    def cells(self) -> int:
        """Return N, the number of cells."""
        return self.side**2

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens: every set of openings, at an end or not."""
        return 2 << len(OPENINGS)

    @property
    def answers(self) -> slice:
        """Return the tokens that answer: 0 off the path, 1 on it."""
        return slice(0, 2)

    @cached_property
    def mazes(self) -> BoolArray:
        """Return the (pool, N, 4) openings of the mazes of training."""
        return self.made(self.pool, np.random.default_rng(derive_seed(self.seed, "maze/train")))

    @cached_property
    def neighbours(self) -> Int64Array:
        """Return the (N, 4) cells next to each cell; N outside the maze."""
        row_N, column_N = np.divmod(np.arange(self.cells), self.side)
        found = np.full((self.cells, len(OPENINGS)), self.cells)
        for d, (down, right) in enumerate(OPENINGS):
            row, column = row_N + down, column_N + right
            inside = (row >= 0) & (row < self.side) & (column >= 0) & (column < self.side)
            found[inside, d] = (row * self.side + column)[inside]
        return found

    def prolonged(self, times: int) -> Maze:
        """Return the task for a longer training: the same, no step of it is special."""
        return self

    def batch(self, step: int, *, global_batch: int) -> Batch:
        """Draw the rows (B, N) of ``step``, a pure function of the arguments."""
        check_count("step", step, 0)
        check_count("global_batch", global_batch)
        rng = np.random.default_rng(derive_seed(self.seed, "maze/rows", step))
        kept, have = list[Questions](), 0
        for _ in range(_TRIES):
            mazes = self.mazes[rng.integers(self.pool, size=4 * global_batch)]
            asked = self._asked(self.turned(mazes, rng.integers(8, size=len(mazes))), rng)
            kept.append(asked.only(asked.rounds <= self.most_rounds))
            have += len(kept[-1].ids)
            if have >= global_batch:
                break
        else:
            raise ConfigError(
                "hardly any pair of ends needs so few rounds", where="most_rounds",
                value=self.most_rounds, allowed=f"more, for {self.side} x {self.side} cells",
                fix="raise most_rounds",
            )  # fmt: skip
        ids, targets = (torch.cat([getattr(part, name) for part in kept])[:global_batch]
                        for name in ("ids", "targets"))  # fmt: skip
        first = step * global_batch
        return Batch(ids, targets, None, torch.arange(first, first + global_batch))

    def questions(self, count: int) -> Questions:
        """Draw ``count`` test mazes with their ends, rated."""
        rng = np.random.default_rng(derive_seed(self.seed, "maze/test"))
        return self._asked(self.made(count, rng), rng)

    def _asked(self, open_MN4: BoolArray, rng: np.random.Generator) -> Questions:
        """Draw two ends in every maze."""
        end_M2 = rng.random((len(open_MN4), self.cells)).argpartition(1, axis=1)[:, :2]
        end_MN = np.zeros((len(open_MN4), self.cells), bool)
        np.put_along_axis(end_MN, end_M2, True, axis=1)
        path_MN, rounds_M = self.solve(open_MN4, end_MN)
        openings_MN = open_MN4 @ (1 << np.arange(len(OPENINGS)))
        return Questions(
            torch.from_numpy(2 * openings_MN + end_MN),
            torch.from_numpy(path_MN.astype(np.int64)),
            rounds_M,
            np.zeros_like(rounds_M),
        )

    def solve(self, open_MN4: BoolArray, end_MN: BoolArray) -> tuple[BoolArray, Int64Array]:
        """Fill dead ends, all at once, until none is left.

        Returns:
            (M, N) whether a cell is left, on the path, and (M,) rounds.
        """
        left_MN = np.pad(np.ones_like(end_MN), ((0, 0), (0, 1)), constant_values=False)
        rounds_M = np.zeros(len(end_MN), np.int64)
        while True:
            ways_MN = (open_MN4 & left_MN[:, self.neighbours]).sum(-1)
            dead_MN = left_MN[:, :-1] & ~end_MN & (ways_MN <= 1)
            if not dead_MN.any():
                return left_MN[:, :-1], rounds_M
            left_MN[:, :-1] &= ~dead_MN
            rounds_M += dead_MN.any(1)

    def made(self, count: int, rng: np.random.Generator) -> BoolArray:
        """Return the (count, N, 4) openings of random mazes, by the growing tree algorithm.

        A maze grows from its newest cell with a probability drawn for each maze, or else from any:
        from long corridors (always the newest) to many short branches (never).
        """
        open_MN4 = np.zeros((count, self.cells, len(OPENINGS)), bool)
        near = self.neighbours.tolist()
        for maze, newest in zip(open_MN4, rng.random(count), strict=True):
            # a cell is looked at once per neighbour that it adds, and once when it is closed
            draw = iter(rng.random(6 * self.cells).tolist())
            growing = [int(next(draw) * self.cells)]
            seen = [False] * self.cells + [True]
            seen[growing[0]] = True
            while growing:
                i = -1 if next(draw) < newest else int(next(draw) * len(growing))
                ways = [d for d, cell in enumerate(near[growing[i]]) if not seen[cell]]
                if not ways:
                    del growing[i]
                    continue
                way = ways[int(next(draw) * len(ways))]
                cell = near[growing[i]][way]
                maze[growing[i], way] = maze[cell, way ^ 1] = seen[cell] = True
                growing.append(cell)
        return open_MN4

    def turned(self, open_MN4: BoolArray, way_M: Int64Array) -> BoolArray:
        """Return every maze turned or mirrored in one of eight ways."""
        cell_8N, step_84 = self._symmetries
        turned = np.take_along_axis(open_MN4, cell_8N[way_M][..., None], axis=1)
        return np.take_along_axis(turned, step_84[way_M][:, None], axis=2)

    @cached_property
    def _symmetries(self) -> tuple[Int64Array, Int64Array]:
        """Return, for each symmetry of a square, the (8, N) cells and (8, 4) steps that move in."""
        cell_NN = np.arange(self.cells).reshape(self.side, self.side)
        cells, steps = list[Int64Array](), list[list[int]]()
        for way in range(8):
            moved, step = cell_NN, [0, 1, 2, 3]
            if way & 1:
                moved, step = moved[::-1], [step[i] for i in (1, 0, 2, 3)]
            if way & 2:
                moved, step = moved[:, ::-1], [step[i] for i in (0, 1, 3, 2)]
            if way & 4:
                moved, step = moved.T, [step[i] for i in (2, 3, 0, 1)]
            cells.append(moved.ravel())
            steps.append(step)
        return np.stack(cells), np.array(steps)
