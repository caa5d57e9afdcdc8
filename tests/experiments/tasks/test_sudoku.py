"""Sudoku: solver against search, puzzles with one solution, batches as pure functions."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from experiments.tasks import TaskLoader
from experiments.tasks.sudoku import Sudoku
from experiments.tasks.sudoku_solver import Grid
from open_mythos.data import IGNORE_INDEX
from open_mythos.errors import DataError

SMALL, SIX = Grid(2, 2), Grid(2, 3)


@pytest.fixture(scope="module")
def made():
    return SIX.puzzles(40, np.random.default_rng(0))


def _every_board():
    """All 288 complete 4 x 4 boards, by search."""
    rows = list(permutations(range(1, 5)))
    boards = np.array([(*a, *b, *c, *d) for a in rows for b in rows if not _clash(a, b)
                       for c in rows for d in rows if not _clash(c, d)])  # fmt: skip
    return boards[SMALL.check(boards)]


def _clash(a, b):
    return any(x == y for x, y in zip(a, b, strict=True))


def test_the_solver_counts_as_search_does():
    every = _every_board()
    assert len(every) == 288
    rng = np.random.default_rng(1)
    boards = np.where(rng.random((60, 16)) < 0.35, every[rng.integers(288, size=60)], 0)
    boards[0], boards[1, :2] = 0, 1  # everything is a solution; nothing is
    fits = ((boards[:, None] == 0) | (boards[:, None] == every)).all(-1).sum(1)
    solved = SMALL.solve(boards, most=300)
    assert (solved.solutions == fits).all()
    assert SMALL.check(solved.solution[fits > 0]).all()
    assert (SMALL.solve(boards).solutions == fits.clip(max=2)).all()


def test_an_empty_board_has_several_solutions_at_once():
    solved = SIX.solve(np.zeros((3, 36), np.int64))
    assert solved.solutions.tolist() == [2, 2, 2]
    assert SIX.check(solved.solution).all()


def test_puzzles_have_one_solution(made):
    clues, solution = made
    solved = SIX.solve(clues)
    assert (solved.solutions == 1).all()
    assert (solved.solution == solution).all()
    assert SIX.check(solution).all()
    assert not SIX.check(clues).any()
    assert len(np.unique(solution, axis=0)) == len(solution)


def test_rounds():
    full = SIX.fill(1, np.random.default_rng(2))
    one = full.copy()
    one[0, 7] = 0
    assert SIX.solve(full).rounds.tolist() == [0]
    assert SIX.solve(one).rounds.tolist() == [1]


def test_clues_stay_as_many_as_asked(made):
    clues, _ = SIX.puzzles(20, np.random.default_rng(3), fewest=16)
    assert (clues > 0).sum(1).min() >= 16
    assert (made[0] > 0).sum(1).min() < 16


def test_shuffled_boards_stay_right_and_as_hard(made):
    clues, solution = SIX.shuffle(np.random.default_rng(4), *made)
    assert SIX.check(solution).all()
    assert ((clues == 0) | (clues == solution)).all()
    assert (SIX.solve(clues).rounds == SIX.solve(made[0]).rounds).all()
    assert (clues != made[0]).any(1).all()


def test_batches_are_pure_and_fresh():
    task = Sudoku(pool=6)
    one, again, next_ = (task.batch(step, global_batch=5) for step in (3, 3, 4))
    assert torch.equal(one.input_ids, again.input_ids)
    assert torch.equal(one.targets, again.targets)
    assert not torch.equal(one.input_ids, next_.input_ids)
    assert one.sample_index.tolist() == [15, 16, 17, 18, 19]
    clues = one.input_ids.numpy() % 7
    filled = np.where(clues > 0, clues, one.targets.numpy())
    assert task.grid.check(filled).all()
    assert ((one.targets == IGNORE_INDEX).numpy() == (clues > 0)).all()
    assert int(one.input_ids.max()) < task.vocab_size
    assert (one.input_ids // 7 == torch.arange(36)).all()


def test_half_of_the_first_rows_show_more_cells():
    task = Sudoku(pool=6, easy_steps=4)
    easy, plain = task.batch(3, global_batch=200), Sudoku(pool=6).batch(3, global_batch=200)
    of_easy, of_plain = ((row.targets != IGNORE_INDEX).numpy() for row in (easy, plain))
    assert not (of_easy & ~of_plain).any()  # what is shown was empty
    assert 0.4 < (of_easy == of_plain).all(1).mean() < 0.6
    assert 0.65 < of_easy.sum() / of_plain.sum() < 0.85
    clues = easy.input_ids.numpy() % 7
    assert SIX.check(np.where(clues > 0, clues, easy.targets.numpy())).all()
    after = task.batch(4, global_batch=200).input_ids
    assert torch.equal(after, Sudoku(pool=6).batch(4, global_batch=200).input_ids)


def test_boards_are_filled_at_empty_cells():
    task = Sudoku(pool=6)
    batch = task.batch(0, global_batch=4)
    assert (task.clues(batch.input_ids) == batch.input_ids.numpy() % 7).all()
    assert task.grid.check(task.filled(batch.input_ids, batch.targets)).all()


def test_questions_are_sorted_by_difficulty():
    questions = Sudoku(pool=6).questions(120)
    levels = [questions.level(name) for name in ("0-3", "4", "5", "6+", "guess")]
    assert sorted(np.concatenate(levels).tolist()) == list(range(120))
    assert (questions.guesses[levels[-1]] > 0).all()
    assert (questions.rounds[levels[3]] >= 6).all()
    by_guesses = [questions.level(name) for name in ("1 guess", "2-3 guesses", "4+ guesses")]
    assert sorted(np.concatenate(by_guesses).tolist()) == levels[-1].tolist()
    assert (questions.guesses[by_guesses[0]] == 1).all()
    few = questions.at_most(5, ("0-3", "4", "guess"))
    assert len(few.level("4")) == 5
    assert len(few.ids) == 10 + min(5, len(levels[-1]))
    assert torch.equal(few.ids[few.level("4")], questions.ids[levels[1][:5]])


def test_the_loader_resumes_and_refuses_another_task():
    loader = TaskLoader(Sudoku(pool=6), global_batch=3)
    loader.step = 7
    other = TaskLoader(Sudoku(pool=6), global_batch=3)
    other.load_state_dict(loader.state_dict())
    assert other.step == 7
    with pytest.raises(DataError, match="other rows"):
        TaskLoader(Sudoku(pool=5), global_batch=3).load_state_dict(loader.state_dict())
