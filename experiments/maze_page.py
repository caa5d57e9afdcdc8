"""Show a maze as a looped model finds the way through it, loop by loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.tasks.maze import OPENINGS, Maze
from experiments.tasks.puzzle import Questions, answers
from experiments.tasks.saved import looped_model
from open_mythos.checks import check_count
from open_mythos.errors import DataError
from open_mythos.reports.html import render

TEMPLATES = Path(__file__).parent / "templates"
_TEST_MAZES = 1000
_BORDERS = ("top", "bottom", "left", "right")


def maze_page(folder: Path, task: Maze, prompt: str, n_loops: int | None) -> str:
    """Return the page of a test maze through the loops of the model in ``folder``.

    Args:
        folder: Model folder with its task (the claim c11d keeps one).
        task: Its task.
        prompt: Rounds of filling dead ends that the maze needs, such as "20"; "" for the most.
        n_loops: Number of loops; None for four times the model's max_loop_iters.

    Raises:
        ConfigError: The number of loops is not valid, or the model is dense.
        DataError: ``prompt`` is not a number of rounds that a test maze needs.
    """
    model = looped_model(folder)
    default = 4 * model.cfg.max_loop_iters
    depth = default if n_loops is None else check_count("--n-loops", n_loops)
    maze = _chosen(task, prompt)
    found = answers(model, maze.ids, range(1, depth + 1), task)
    ids, path = maze.ids[0].tolist(), maze.targets[0].tolist()
    boards, right = list[dict[str, object]](), list[int]()
    for loops, tokens in zip(found.loops, found.tokens, strict=True):
        said = tokens[0].tolist()
        wrong = sum(a != b for a, b in zip(said, path, strict=True))
        right += [loops] * (wrong == 0)
        boards.append({"rows": _rows(task, ids, said, path), "loops": loops, "wrong": wrong})
    needed = (
        f"A path of {sum(path)} cells; a solver filling dead ends needs {maze.rounds[0]} rounds, "
        f"in the mazes of training at most {task.most_rounds}."
    )
    solved = (
        f"The model first has every cell right at loop {right[0]} of {depth}." if right
        else f"The model does not solve it in {depth} loops."
    )  # fmt: skip
    return render(
        "maze.html", TEMPLATES, title="A maze, loop by loop", summary=f"{needed} {solved}",
        boards=boards, model=str(folder),
    )  # fmt: skip


def _chosen(task: Maze, prompt: str) -> Questions:
    """Return the first test maze that needs the rounds of the prompt."""
    mazes = task.questions(_TEST_MAZES)
    rounds = prompt or str(mazes.rounds.max())
    is_number = rounds.isdecimal() and len(rounds) < 9
    chosen = (mazes.rounds == int(rounds)).nonzero()[0][:1] if is_number else mazes.rounds[:0]
    if not len(chosen):
        raise DataError(
            "no test maze needs that", where="prompt", value=prompt,
            allowed=f"rounds, {mazes.rounds.min()} .. {mazes.rounds.max()} (not all in between)",
            fix="pass '' for the maze that needs the most",
        )  # fmt: skip
    return mazes.only(chosen)


def _rows(
    task: Maze, ids: Sequence[int], said: Sequence[int], path: Sequence[int]
) -> list[list[dict[str, str]]]:
    """Return the cells of every row: what stands in them, and their CSS classes."""
    kinds = {(1, 1): "right", (1, 0): "wrong", (0, 1): "missed", (0, 0): ""}
    cells = [
        {
            "digit": "●" if token & 1 else "",
            "kind": " ".join([kinds[a, b], *(
                f"wall-{_BORDERS[d]}" for d in range(len(OPENINGS)) if not token >> d + 1 & 1
            )]),
        }
        for token, a, b in zip(ids, said, path, strict=True)
    ]  # fmt: skip
    return [cells[i : i + task.side] for i in range(0, task.cells, task.side)]
