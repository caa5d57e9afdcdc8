"""Solve, rate and make Sudokus, many at once.

A board is (N cells,) of digits, 0 for an empty cell; the solver works on (M, N, n) candidates. A
round finds every cell with one candidate left and every digit with one cell left in a row, column
or box, and removes them from the others, all at once. Where a round finds nothing, the board is
copied for every candidate of the cell with the fewest: a guess.

Solvers from packages work on one board in Python; the tasks need ten thousand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from open_mythos.checks import check_count
from open_mythos.data.permutation import Int64Array

AT_ONCE = 4096
"""Boards that are looked at together, so that a board with few clues does not fill the memory."""
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True)
class Grid:
    """Boards of ``height * width`` digits, in boxes of ``height`` rows and ``width`` columns."""

    height: int = 2
    width: int = 3

    def __post_init__(self) -> None:
        check_count("height", self.height)
        check_count("width", self.width, 2)

    @property
    def digits(self) -> int:
        """Return n, the digits of a row."""
        return self.height * self.width

    @property
    def cells(self) -> int:
        """Return N = n^2."""
        return self.digits**2

    @cached_property
    def groups(self) -> Int64Array:
        """Return the cells of every row, column and box, (3 n, n)."""
        n, cells = self.digits, np.arange(self.cells).reshape(self.digits, self.digits)
        boxes = cells.reshape(n // self.height, self.height, n // self.width, self.width)
        return np.concatenate([cells, cells.T, boxes.swapaxes(1, 2).reshape(n, n)])

    @cached_property
    def peers(self) -> np.ndarray:
        """Return (N, N) float32: 1 where two different cells share a group."""
        found = np.zeros((self.cells, self.cells), np.float32)
        for group in self.groups:
            found[np.ix_(group, group)] = 1
        np.fill_diagonal(found, 0)
        return found

    @cached_property
    def member(self) -> np.ndarray:
        """Return (3 n, N) float32: 1 where a cell belongs to a group."""
        found = np.zeros((len(self.groups), self.cells), np.float32)
        np.put_along_axis(found, self.groups, 1, axis=1)
        return found

    def candidates(self, boards_MN: Int64Array) -> BoolArray:
        """Return (M, N, n): the digit of a filled cell, all digits of an empty one."""
        digits = np.arange(1, self.digits + 1)
        return (boards_MN[..., None] == digits) | (boards_MN[..., None] == 0)

    def round(self, open_MNn: BoolArray) -> BoolArray:
        """Return the candidates after one round."""
        alone_MNn = open_MNn & (open_MNn.sum(-1, keepdims=True) == 1)
        places = np.einsum("gN,MNn->Mgn", self.member, open_MNn.astype(np.float32), optimize=True)
        only_MNn = np.einsum("gN,Mgn->MNn", self.member, (places == 1).astype(np.float32),
                             optimize=True) > 0  # fmt: skip
        found_MNn = alone_MNn | (open_MNn & only_MNn)
        seen = np.einsum("NK,MKn->MNn", self.peers, found_MNn.astype(np.float32), optimize=True)
        left_MNn = open_MNn & (seen == 0)
        sole_MN1 = found_MNn.any(-1, keepdims=True)
        return np.where(sole_MN1, left_MNn & found_MNn, left_MNn)

    def settle(self, open_MNn: BoolArray) -> tuple[BoolArray, Int64Array]:
        """Repeat rounds while they remove anything; return candidates and rounds of each board."""
        open_MNn = open_MNn.copy()
        rounds_M = np.zeros(len(open_MNn), np.int64)
        going = np.arange(len(open_MNn))
        while len(going):
            after = self.round(open_MNn[going])
            moved = (after != open_MNn[going]).any((1, 2))
            open_MNn[going] = after
            going = going[moved]
            rounds_M[going] += 1
        return open_MNn, rounds_M

    def solve(self, boards_MN: Int64Array, most: int = 2) -> Solved:
        """Find up to ``most`` solutions of every board, the latest copies first."""
        check_count("most", most)
        open_KNn, rounds_M = self.settle(self.candidates(boards_MN))
        owner_K = np.arange(len(boards_MN))
        found_M = np.zeros(len(boards_MN), np.int64)
        guesses_M = np.zeros(len(boards_MN), np.int64)
        solution_MN = np.zeros_like(boards_MN)
        while len(owner_K):
            first, last = slice(-AT_ONCE), slice(-AT_ONCE, None)
            waiting, (now_KNn, now_K) = (open_KNn[first], owner_K[first]), (
                open_KNn[last], owner_K[last]
            )  # fmt: skip
            left_KN = now_KNn.sum(-1)
            alive_K = (left_KN > 0).all(1) & (found_M[now_K] < most)
            done_K = alive_K & (left_KN == 1).all(1)
            for k in done_K.nonzero()[0]:
                found_M[now_K[k]] += 1
                solution_MN[now_K[k]] = now_KNn[k].argmax(-1) + 1
            stuck = (alive_K & ~done_K).nonzero()[0]
            np.add.at(guesses_M, now_K[stuck], 1)
            copies_KNn, copies_K = self._guess(now_KNn[stuck], left_KN[stuck], now_K[stuck])
            copies_KNn, _ = self.settle(copies_KNn)
            open_KNn = np.concatenate([waiting[0], copies_KNn])
            owner_K = np.concatenate([waiting[1], copies_K])
        return Solved(np.minimum(found_M, most), solution_MN, rounds_M, guesses_M)

    def _guess(
        self, open_KNn: BoolArray, left_KN: Int64Array, owner_K: Int64Array
    ) -> tuple[BoolArray, Int64Array]:
        """Copy every board for each candidate of the cell that has the fewest, but two."""
        cell_K = np.where(left_KN > 1, left_KN, self.digits + 1).argmin(1)
        board, digit = open_KNn[np.arange(len(cell_K)), cell_K].nonzero()
        copies = open_KNn[board]
        copies[np.arange(len(board)), cell_K[board]] = False
        copies[np.arange(len(board)), cell_K[board], digit] = True
        return copies, owner_K[board]

    def fill(self, count: int, rng: np.random.Generator) -> Int64Array:
        """Return (count, N) random complete boards."""
        done, have = list[Int64Array](), 0
        while have < count:
            open_KNn: BoolArray = np.ones((count - have, self.cells, self.digits), bool)
            while len(open_KNn):
                open_KNn, _ = self.settle(open_KNn)
                left_KN = open_KNn.sum(-1)
                open_KNn, left_KN = (x[(left_KN > 0).all(1)] for x in (open_KNn, left_KN))
                full_K = (left_KN == 1).all(1)
                done.append(open_KNn[full_K].argmax(-1) + 1)
                open_KNn, left_KN = open_KNn[~full_K], left_KN[~full_K]
                if len(open_KNn):
                    open_KNn = self._place(open_KNn, left_KN, rng)
            have = sum(map(len, done))
        return np.concatenate(done)[:count]

    def _place(
        self, open_KNn: BoolArray, left_KN: Int64Array, rng: np.random.Generator
    ) -> BoolArray:
        """Put a random candidate into a random cell that has several."""
        rows = np.arange(len(open_KNn))
        cell_K = (rng.random(left_KN.shape) * (left_KN > 1)).argmax(1)
        of_cell_Kn = open_KNn[rows, cell_K]
        digit_K = (rng.random(of_cell_Kn.shape) * of_cell_Kn).argmax(1)
        open_KNn[rows, cell_K] = False
        open_KNn[rows, cell_K, digit_K] = True
        return open_KNn

    def puzzles(
        self, count: int, rng: np.random.Generator, fewest: int = 0
    ) -> tuple[Int64Array, Int64Array]:
        """Return (count, N) puzzles with one solution, and their solutions.

        Cells are emptied in random order as long as the solution stays the only one, and ``fewest``
        clues, drawn for each puzzle up to half of the cells, remain.
        """
        full_MN = self.fill(count, rng)
        puzzle_MN = full_MN.copy()
        least_M = rng.integers(fewest, self.cells // 2, count, endpoint=True)
        for column in rng.permuted(np.tile(np.arange(self.cells), (count, 1)), axis=1).T:
            more = ((puzzle_MN > 0).sum(1) > least_M).nonzero()[0]
            without = puzzle_MN[more]
            without[np.arange(len(more)), column[more]] = 0
            unique = self.is_unique(without, full_MN[more], column[more])
            puzzle_MN[more[unique]] = without[unique]
        return puzzle_MN, full_MN

    def is_unique(
        self, boards_MN: Int64Array, solution_MN: Int64Array, cell_M: Int64Array
    ) -> BoolArray:
        """Return whether boards, unique until ``cell`` was emptied, have one solution still.

        Any other solution has another digit in that cell.
        """
        open_MNn = self.candidates(boards_MN)
        rows = np.arange(len(boards_MN))
        open_MNn[rows, cell_M, solution_MN[rows, cell_M] - 1] = False
        open_KNn, owner_K = open_MNn, rows
        unique_M = np.ones(len(boards_MN), bool)
        while len(owner_K):
            open_KNn, _ = self.settle(open_KNn)
            left_KN = open_KNn.sum(-1)
            alive_K = (left_KN > 0).all(1)
            unique_M[owner_K[alive_K & (left_KN == 1).all(1)]] = False
            stuck = (alive_K & unique_M[owner_K]).nonzero()[0]
            open_KNn, owner_K = self._guess(open_KNn[stuck], left_KN[stuck], owner_K[stuck])
        return unique_M

    def check(self, boards_MN: Int64Array) -> BoolArray:
        """Return whether boards are complete and right."""
        counts = np.einsum("gN,MNn->Mgn", self.member, self.candidates(boards_MN), optimize=True)
        return (boards_MN > 0).all(1) & (counts == 1).all((1, 2))

    def shuffle(self, rng: np.random.Generator, *boards: Int64Array) -> tuple[Int64Array, ...]:
        """Permute digits, rows and columns of (M, N) boards at random, in the same way in each.

        Rows move within their band and with it, columns within their stack and with it, so that
        right boards stay right and a puzzle stays as hard as it was.
        """
        count, n = len(boards[0]), self.digits
        digit_Mn = rng.permuted(np.tile(np.arange(1, n + 1), (count, 1)), axis=1)
        name_M = np.c_[np.zeros((count, 1), np.int64), digit_Mn]
        row_Mn = self._order(count, n // self.height, self.height, rng)
        column_Mn = self._order(count, n // self.width, self.width, rng)
        cell_MN = (row_Mn[:, :, None] * n + column_Mn[:, None, :]).reshape(count, -1)
        return tuple(
            np.take_along_axis(name_M, np.take_along_axis(board, cell_MN, 1), 1) for board in boards
        )

    @staticmethod
    def _order(count: int, bands: int, size: int, rng: np.random.Generator) -> Int64Array:
        """Return (count, bands * size) random orders of lines that keep bands together."""
        band = rng.permuted(np.tile(np.arange(bands), (count, 1)), axis=1)
        line = rng.permuted(np.tile(np.arange(size), (count, bands, 1)), axis=2)
        return (band[:, :, None] * size + line).reshape(count, -1)


@dataclass(frozen=True)
class Solved:
    """What a solver found about (M,) boards."""

    solutions: Int64Array
    """Number of solutions, up to the most that were asked for."""
    solution: Int64Array
    """(M, N) one of them; zeros if there is none."""
    rounds: Int64Array
    """Rounds before the first guess, or to the solution."""
    guesses: Int64Array
    """Boards that had to be copied; 0 if rounds are enough."""
