"""Show a Sudoku as a looped model fills it in, loop by loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from experiments.tasks.puzzle import answers
from experiments.tasks.saved import looped_model
from experiments.tasks.sudoku import Sudoku
from experiments.tasks.sudoku_solver import Grid
from open_mythos.checks import check_count
from open_mythos.errors import DataError
from open_mythos.reports.html import render

TEMPLATES = Path(__file__).parent / "templates"


def boards(
    grid: Grid,
    clues: Sequence[int],
    filled: Mapping[int, Sequence[int]],
    solution: Sequence[int],
) -> Markup:
    """Return the boards after each number of loops, their cells marked right, wrong and changed."""
    shown, before = list[dict[str, object]](), list(clues)
    for loops, board in filled.items():
        wrong = sum(a != b for a, b in zip(board, solution, strict=True))
        cells = [
            {"digit": digit, "kind": _kind(grid, i, clues[i], digit, solution[i], before[i])}
            for i, digit in enumerate(board)
        ]
        rows = [cells[i : i + grid.digits] for i in range(0, grid.cells, grid.digits)]
        shown.append({"rows": rows, "loops": loops, "wrong": wrong})
        before = list(board)
    return render("boards.html", TEMPLATES, boards=shown)


def _kind(grid: Grid, cell: int, clue: int, digit: int, right: int, before: int) -> str:
    """Return the CSS classes of a cell."""
    row, column = divmod(cell, grid.digits)
    kinds = ["clue" if clue else "right" if digit == right else "wrong"]
    kinds += ["changed"] * (not clue and digit != before)
    kinds += ["below"] * (row % grid.height == grid.height - 1 and row < grid.digits - 1)
    kinds += ["beside"] * (column % grid.width == grid.width - 1 and column < grid.digits - 1)
    return " ".join(kinds)


def sudoku_page(folder: Path, task: Sudoku, puzzle: str, n_loops: int | None) -> str:
    """Return the page of ``puzzle`` through the loops of the model in ``folder``.

    Args:
        folder: Model folder of the demo.
        task: Its task.
        puzzle: The cells row by row, "." or "0" for an empty one; "" draws a puzzle.
        n_loops: Number of loops; None for twice the model's max_loop_iters.

    Raises:
        ConfigError: The number of loops is not valid, or the model is dense.
        DataError: ``puzzle`` has no solution, or several.
    """
    model = looped_model(folder)
    default = 2 * model.cfg.max_loop_iters
    depth = default if n_loops is None else check_count("--n-loops", n_loops)
    clues = _read(task, puzzle)
    solved = task.grid.solve(clues)
    if solved.solutions[0] != 1:
        raise DataError(
            "not a puzzle with one solution", where="prompt", value=puzzle,
            allowed="clues that leave exactly one solution",
            fix="pass '' for a puzzle, or another one",
        )  # fmt: skip
    ids = task.tokens(clues)
    found = answers(model, ids, range(1, depth + 1), task)
    filled = {
        n: task.filled(ids, digits)[0].tolist()
        for n, digits in zip(found.loops, found.tokens, strict=True)
    }
    right = [n for n, board in filled.items() if board == solved.solution[0].tolist()]
    needs = (
        f"a solver needs {solved.rounds[0]} rounds of elimination" if not solved.guesses[0]
        else f"a solver has to guess after {solved.rounds[0]} rounds of elimination"
    )  # fmt: skip
    summary = f"{int((clues > 0).sum())} clues; {needs}. " + (
        f"The model first has every cell right at loop {right[0]} of {depth}." if right
        else f"The model does not solve it in {depth} loops."
    )  # fmt: skip
    shown = boards(task.grid, clues[0].tolist(), filled, solved.solution[0].tolist())
    return render("sudoku.html", TEMPLATES, title="A Sudoku, loop by loop", summary=summary,
                  boards=shown, model=str(folder))  # fmt: skip


def _read(task: Sudoku, puzzle: str) -> np.ndarray:
    """Return a puzzle as (1, N) clues."""
    if not puzzle:
        questions = task.questions(64)
        return task.clues(
            questions.ids[[int((100 * questions.guesses + questions.rounds).argmax())]]
        )
    cells = puzzle.replace(".", "0")
    n, digits = task.grid.cells, task.grid.digits
    if len(cells) != n or not cells.isdecimal() or max(map(int, cells)) > digits:
        raise DataError(
            "not a board", where="prompt", value=puzzle,
            allowed=f"{n} cells row by row: 1 .. {digits}, or . for an empty one",
            fix="pass '' for a puzzle of the task",
        )  # fmt: skip
    return np.array([[int(cell) for cell in cells]])
