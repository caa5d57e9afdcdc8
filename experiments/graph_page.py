"""Show how a looped model measures the distances in a graph, loop by loop."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from experiments.c10_branches.branches import look
from experiments.tasks.distances import Distances, Graphs
from experiments.tasks.saved import looped_model
from open_mythos.checks import check_count
from open_mythos.errors import DataError
from open_mythos.reports.html import render

TEMPLATES = Path(__file__).parent / "templates"
_STEP, _MARGIN = 62, 22
"""Pixels between nodes, and around them."""


def graph_page(folder: Path, task: Distances, prompt: str, n_loops: int | None) -> str:
    """Return the page of one graph through the loops of the model in ``folder``.

    Args:
        folder: Model folder with its task (the claim c10 keeps one).
        task: Its task.
        prompt: The source and the edges, such as "0: 0>3 3>5 0>1"; "" draws a graph.
        n_loops: Number of loops; None for the model's max_loop_iters.

    Raises:
        ConfigError: The number of loops is not valid, or the model is dense.
        DataError: ``prompt`` is not a graph of the task.
    """
    model = looped_model(folder)
    most = model.cfg.max_loop_iters if n_loops is None else check_count("--n-loops", n_loops)
    graph = _read(task, prompt) if prompt else _drawn(task)
    found = look(model, task, graph, range(1, most + 1))
    truth = graph.distance[0]
    near = truth <= task.farthest
    at = _places(truth, task)
    edges = [tuple(at[node] for node in divmod(int(edge), task.nodes)) for edge in graph.edges[0]]
    pictures = []
    for loops, named_Mn in zip(found.loops, found.named, strict=True):
        named = named_Mn[0]
        nodes = [
            {"x": at[i][0], "y": at[i][1], "name": str(i), "kind": _kind(truth[i], named[i], task),
             "said": "-" if named[i] == 0 else str(named[i])}
            for i in range(task.nodes)
        ]  # fmt: skip
        right = [bool(named[i] == truth[i]) for i in range(task.nodes) if near[i] and truth[i]]
        caption = f"{loops} loop{'s' * (loops > 1)}: {sum(right)} of {len(right)} found"
        pictures.append({"nodes": nodes, "caption": caption})
    layers = [int((truth == d).sum()) for d in range(1, task.farthest + 1)]
    return render(
        "graph.html", TEMPLATES, title="A graph, loop by loop", edges=edges, pictures=pictures,
        width=max(x for x, _ in at) + _MARGIN, height=max(y for _, y in at) + _MARGIN,
        layers=", ".join(map(str, layers)), source=int(graph.source[0]), model=str(folder),
    )  # fmt: skip


def _kind(truth: int, named: int, task: Distances) -> str:
    """Return the CSS class of a node: its distance is found, not yet, or never asked."""
    if truth == 0:
        return "source"
    if truth > task.farthest:
        return "beyond" if named == 0 else "wrong"
    return "right" if named == truth else "open" if named == 0 else "wrong"


def _places(truth: np.ndarray, task: Distances) -> list[tuple[int, int]]:
    """Return the (x, y) of every node: a column for every distance, the last out of reach."""
    column = np.minimum(truth, task.farthest + 1)
    row = [int((column[:i] == column[i]).sum()) for i in range(len(column))]
    # every other node of a column a little aside, so that edges within it are seen
    return [
        (int(_MARGIN + c * _STEP * 1.4 + r % 2 * 16), _MARGIN + r * _STEP)
        for c, r in zip(column.tolist(), row, strict=True)
    ]


def _drawn(task: Distances) -> Graphs:
    """Return the one of 64 graphs that has the most nodes in reach."""
    graphs = task.graphs(1, 64, "test")
    best = int((graphs.distance <= task.farthest).sum(1).argmax())
    return Graphs(*(each[[best]] for each in (graphs.edges, graphs.source, graphs.distance)))


def _read(task: Distances, prompt: str) -> Graphs:
    """Return the graph of a prompt."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*:((?:\s*\d{1,6}>\d{1,6})+)\s*", prompt)
    numbers = [int(number) for number in re.findall(r"\d+", prompt)] if match else []
    if not match or max(numbers) >= task.nodes or len(numbers) > 1 + 2 * task.edges:
        raise DataError(
            "not a graph of the task", where="prompt", value=prompt,
            allowed=f"a source and up to {task.edges} edges between nodes 0 .. {task.nodes - 1}, "
            "such as '0: 0>3 3>5'",
            fix="pass '' for a graph of the task",
        )  # fmt: skip
    tail, head = np.array(numbers[1::2]), np.array(numbers[2::2])
    return task.measured((tail * task.nodes + head)[None], np.array(numbers[:1]))
