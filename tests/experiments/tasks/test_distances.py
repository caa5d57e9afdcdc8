"""DISTANCES: answers are shortest paths, rows are pure functions of the step."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from experiments.tasks.distances import Distances
from open_mythos.errors import ConfigError

TASK = Distances(nodes=7, edges=11, farthest=3)


def test_distances_are_those_of_a_search():
    graphs = TASK.graphs(3, 40)
    for edges, source, distance in zip(graphs.edges, graphs.source, graphs.distance, strict=True):
        pairs = [divmod(int(edge), 7) for edge in edges]
        assert len(set(pairs)) == 11
        assert all(tail != head for tail, head in pairs)
        found, waiting = {int(source): 0}, deque([int(source)])
        while waiting:
            node = waiting.popleft()
            for tail, head in pairs:
                if tail == node and head not in found:
                    found[head] = found[node] + 1
                    waiting.append(head)
        assert distance.tolist() == [found.get(node, 7) for node in range(7)]


def test_targets_stand_at_the_questions_alone():
    batch = TASK.batch(5, global_batch=30)
    graphs = TASK.graphs(5, 30)
    assert batch.input_ids.shape == batch.targets.shape == (30, TASK.length)
    assert int(batch.input_ids.max()) < TASK.vocab_size
    assert (batch.targets[:, :-7] == -100).all()
    asked = batch.targets[:, -7:].numpy()
    assert ((asked == -100) == (graphs.distance == 0)).all()
    assert ((asked == 0) == (graphs.distance > 3)).all()
    near = (graphs.distance >= 1) & (graphs.distance <= 3)
    assert (asked[near] == graphs.distance[near]).all()


def test_rows_depend_on_the_step_and_the_stream():
    again, other = TASK.batch(1, global_batch=4), TASK.batch(2, global_batch=4)
    assert (TASK.batch(1, global_batch=4).input_ids == again.input_ids).all()
    assert not (other.input_ids == again.input_ids).all()
    train, test = TASK.graphs(0, 4), TASK.graphs(0, 4, "test")
    assert not np.array_equal(train.edges, test.edges)


@pytest.mark.parametrize("field", ["nodes", "edges", "farthest"])
def test_sizes_are_checked(field):
    with pytest.raises(ConfigError, match=field):
        Distances(**{field: 0})
    with pytest.raises(ConfigError, match="pairs"):
        Distances(nodes=4, edges=13)
