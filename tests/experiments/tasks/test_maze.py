"""Maze: trees of cells, one path between two ends, easy rows for training, rated questions."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch

from experiments.tasks import TaskLoader
from experiments.tasks.maze import OPENINGS, Maze
from open_mythos.errors import ConfigError, DataError

TASK = Maze(side=5, pool=20, most_rounds=6)


def graph(openings: list[int]) -> networkx.Graph:
    """Return the cells that are open to each other; every opening leads both ways."""
    found = networkx.DiGraph()
    found.add_nodes_from(range(len(openings)))
    for cell, open_ in enumerate(openings):
        row, column = divmod(cell, TASK.side)
        for d, (down, right) in enumerate(OPENINGS):
            if open_ >> d & 1:
                assert 0 <= row + down < TASK.side
                assert 0 <= column + right < TASK.side
                found.add_edge(cell, (row + down) * TASK.side + column + right)
    assert all(found.has_edge(b, a) for a, b in found.edges)
    return found.to_undirected()


def rounds(tree: networkx.Graph, ends: list[int]) -> int:
    """Return the cells of the longest branch off the path between the ends."""
    path = networkx.shortest_path(tree, *ends)
    return max(map(len, networkx.multi_source_dijkstra_path(tree, path).values())) - 1


def test_every_question_is_a_tree_with_its_path():
    questions = TASK.questions(60)
    for ids, targets, rated in zip(
        questions.ids.tolist(), questions.targets.tolist(), questions.rounds, strict=True
    ):
        tree = graph([token >> 1 for token in ids])
        assert networkx.is_tree(tree)
        ends = [cell for cell, token in enumerate(ids) if token & 1]
        assert len(ends) == 2
        path = networkx.shortest_path(tree, *ends)
        assert {cell for cell, on in enumerate(targets) if on} == set(path)
        assert rated == rounds(tree, ends)
    assert int(questions.ids.max()) < TASK.vocab_size
    assert len(set(map(tuple, questions.ids.tolist()))) == 60


def test_mazes_turn_and_mirror():
    maze = TASK.mazes[:1]
    ways = TASK.turned(np.repeat(maze, 8, axis=0), np.arange(8))
    assert len({way.tobytes() for way in ways}) == 8
    degrees = sorted(maze.sum(-1)[0])
    for way in ways:
        tree = graph((way @ (1 << np.arange(4))).tolist())
        assert networkx.is_tree(tree)
        assert sorted(dict(tree.degree).values()) == degrees
    corners = maze[0].reshape(5, 5, 4)
    assert (ways[1].reshape(5, 5, 4)[0, :, 1] == corners[4, :, 0]).all()  # upside down
    assert (ways[4].reshape(5, 5, 4)[:, 0, 3] == corners[0, :, 1]).all()  # rows become columns


def openings(ids: torch.Tensor) -> list[tuple[int, ...]]:
    """Return the openings of every cell, for each maze."""
    return [tuple(row) for row in (ids >> 1).tolist()]


def test_test_mazes_are_none_of_training():
    task = Maze(pool=500)
    turned = task.turned(task.mazes.repeat(8, axis=0), np.tile(np.arange(8), 500))
    known = set(map(tuple, (turned @ (1 << np.arange(4))).tolist()))
    assert not known & set(openings(task.questions(500).ids))


def test_batches_are_pure_fresh_and_easy():
    known = set(map(tuple, (TASK.mazes @ (1 << np.arange(4))).tolist()))
    one, again, next_ = (TASK.batch(step, global_batch=40) for step in (3, 3, 4))
    assert torch.equal(one.input_ids, again.input_ids)
    assert torch.equal(one.targets, again.targets)
    assert not torch.equal(one.input_ids, next_.input_ids)
    assert one.sample_index.tolist() == list(range(120, 160))
    assert sum(row in known for row in openings(one.input_ids)) < 0.5 * 40  # turned or mirrored
    for ids in one.input_ids.tolist():
        ends = [cell for cell, token in enumerate(ids) if token & 1]
        assert rounds(graph([token >> 1 for token in ids]), ends) <= TASK.most_rounds
    assert max(TASK.questions(200).rounds) > TASK.most_rounds


def test_corridors_are_long_and_short():
    ways = Maze(side=9, pool=100).mazes.sum(-1)
    corridors = (ways == 2).mean(1)
    assert corridors.min() < 0.5 < 0.7 < corridors.max()


def test_no_row_is_easy_enough():
    with pytest.raises(ConfigError, match="raise most_rounds"):
        Maze(side=9, pool=4, most_rounds=1).batch(0, global_batch=2)


def test_the_loader_resumes_and_refuses_another_task():
    loader = TaskLoader(TASK, global_batch=3)
    loader.step = 7
    other = TaskLoader(TASK, global_batch=3)
    other.load_state_dict(loader.state_dict())
    assert other.step == 7
    with pytest.raises(DataError, match="other rows"):
        TaskLoader(Maze(side=5, pool=21), global_batch=3).load_state_dict(loader.state_dict())
