"""``python -m experiments trace``: follow a question of a task through the loops of a model."""

from __future__ import annotations

from pathlib import Path

from experiments.graph_page import graph_page
from experiments.maze_page import maze_page
from experiments.sudoku_page import sudoku_page
from experiments.tasks import PermHop
from experiments.tasks.distances import Distances
from experiments.tasks.maze import Maze
from experiments.tasks.saved import load_task, reached
from experiments.tasks.sudoku import Sudoku
from open_mythos.errors import DataError
from open_mythos.reports.html import write_html
from open_mythos.reports.trace_page import page
from open_mythos.reports.trace_record import Goal, PromptTrace, trace_of


def trace_chain(
    folder: Path, prompt: str, *, n_loops: int | None = None, exit: str = ""
) -> PromptTrace:
    """Trace ``prompt``, such as "e3 r1 r4", through the chain model in ``folder``.

    Args:
        folder: Model folder of the demo: weights, tokenizer and task.json.
        prompt: An entity followed by relations; more chains may follow.
        n_loops: Number of loops; None for the model's max_loop_iters.
        exit: Early-exit rule to mark; "" for the gate, if one was trained.

    Raises:
        ConfigError: Invalid exit rule or number of loops.
        DataError: The folder holds no chain model, or ``prompt`` is not a chain.
    """
    task = load_task(folder)
    if not isinstance(task, PermHop):
        raise DataError(
            "not a model of chains", where=str(folder), value=type(task).__name__,
            allowed="a task of chains", fix="call write_trace",
        )  # fmt: skip

    def goals(ids: list[int]) -> list[Goal | None]:
        found = reached(task, ids)
        return [each and Goal(token=each[1], hops=each[0]) for each in found]

    return trace_of(
        str(folder), prompt, n_loops=n_loops, exit=exit, goals=goals, goal_name="the entity reached"
    )


def write_trace(folder: Path, prompt: str, *, n_loops: int | None, exit: str, out: Path) -> None:
    """Write the HTML page of :func:`trace_chain`, of a Sudoku, a graph or a maze, to ``out``."""
    task = load_task(folder)
    if isinstance(task, Sudoku):
        write_html(sudoku_page(folder, task, prompt, n_loops), out)
    elif isinstance(task, Distances):
        write_html(graph_page(folder, task, prompt, n_loops), out)
    elif isinstance(task, Maze):
        write_html(maze_page(folder, task, prompt, n_loops), out)
    else:
        write_html(page(trace_chain(folder, prompt, n_loops=n_loops, exit=exit)), out)
    print(f"page: {out}")
