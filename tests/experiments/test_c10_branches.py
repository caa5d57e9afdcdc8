"""C10: answers are counted by distance and by branches, probes find what is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments import c10_branches as c10
from experiments.c10_branches.branches import Looked, at_once, by_distance, look, probes
from experiments.c10_branches.distance_recipe import TASK, recipe, untrained
from experiments.claim import HOLDS, HOLDS_IN_PART, Record

GRAPHS = TASK.graphs(0, 600, "test")
NODES = TASK.nodes


def looked(right_LMn: np.ndarray, edges: list[torch.Tensor] | None = None) -> Looked:
    """Return answers at loops 1, 2, .."""
    named_LMn = np.where(right_LMn, TASK.answers(GRAPHS), -1)
    return Looked(list(range(1, len(right_LMn) + 1)), named_LMn, right_LMn, edges or [])


def breadth_first(loops: int) -> np.ndarray:
    """Return answers that are right from as many loops on as a node is far."""
    return np.stack([GRAPHS.distance <= t for t in range(1, loops + 1)])


def test_quick_cells_run(place):
    looped, dense = (c10.run_cell(cell, place) for cell in c10.cells("quick"))
    assert [len(row) for row in looped["right"]] == [len(c10.LOOPS)] * (TASK.farthest + 1)
    assert len(looped["probes"]) == len(c10.LOOPS)
    assert [len(row) for row in dense["right"]] == [1] * (TASK.farthest + 1)
    assert "probes" not in dense


def test_a_breadth_first_search_needs_as_many_loops_for_one_branch_as_for_many():
    found = looked(breadth_first(5))
    for d, groups in at_once(found, GRAPHS, TASK).items():
        for group in groups.values():
            assert group["loops"] == int(d)
            assert group["all_right"] == [float(t >= int(d)) for t in range(1, 6)]


def test_a_search_that_follows_one_branch_at_a_time_is_later_with_many():
    order = np.argsort(np.argsort(GRAPHS.distance, axis=1, kind="stable"), axis=1)
    one_by_one = np.stack([order <= t for t in range(1, NODES + 1)])
    for groups in at_once(looked(one_by_one), GRAPHS, TASK).values():
        assert groups["many"]["loops"] > groups["one"]["loops"] + 1


def test_right_answers_are_counted_by_distance():
    rows = by_distance(looked(breadth_first(3)), GRAPHS, TASK)
    assert rows[2] == [0.0, 1.0, 1.0]
    assert rows[3] == [0.0, 0.0, 1.0]
    assert rows[0] == [0.0, 0.0, 0.0]


def test_a_probe_finds_a_distance_that_is_in_the_state_and_nothing_in_noise():
    tail_M = GRAPHS.edges[:, 0] // NODES
    distance_M = torch.from_numpy(np.take_along_axis(GRAPHS.distance, tail_M[:, None], 1)[:, 0])
    told = torch.nn.functional.one_hot(distance_M, NODES + 1).float()
    noise = torch.randn(len(told), 8, generator=torch.Generator().manual_seed(0))
    found, nothing = probes(looked(breadth_first(2), [told, noise]), GRAPHS, TASK)
    assert found["accuracy"] > 0.98
    assert found["control"] < found["accuracy"] - 0.2
    assert nothing["accuracy"] < found["accuracy"] - 0.2


def test_looking_is_calling_the_model():
    model = untrained(recipe(quick=True)).eval()
    graphs = TASK.graphs(1, 9, "test")
    found = look(model, TASK, graphs, (1, 3), rows=4)
    logits = model(TASK.tokens(graphs), n_loops=3)[:, -NODES:, : TASK.farthest + 1]
    expected = logits.argmax(-1).numpy() == TASK.answers(graphs)
    assert (found.right[1] == expected).all()
    assert [edges.shape for edges in found.edges] == [(9, 16), (9, 16)]


def records(accuracy: float, later: float) -> list[Record]:
    """Return records of a probe's score and of the loops that many branches take longer."""
    loops, found = len(c10.LOOPS), []
    for cell in c10.cells("cpu"):
        dense = cell.arm.startswith("dense")
        score = {
            "accuracy": accuracy if cell.arm == c10.LOOPED else 0.5,
            "control": 0.4,
            "baseline": 0.4,
        }
        branch = {
            "one": {"all_right": [1.0] * loops, "loops": 2.0},
            "many": {"all_right": [1.0] * loops, "loops": 2.0 + later},
        }
        figures = {
            "parameters": 7, "training_flops": 1e9, "whole": [0.9] * (1 if dense else loops),
            "right": [[1.0] * (1 if dense else loops)] * (TASK.farthest + 1),
            "probes": [score] * loops, "at_once": {"1": branch, "2": branch},
        }  # fmt: skip
        found.append(
            Record("c10", "cpu", cell.arm, cell.seed, cell.settings, figures, 1.0, "", "", "")
        )
    return found


@pytest.mark.parametrize(
    ("accuracy", "later", "expected"),
    [(0.95, 0.5, HOLDS), (0.8, 0.5, HOLDS_IN_PART), (0.95, 3.0, HOLDS_IN_PART)],
)
def test_the_verdict_follows_the_pass_mark(accuracy, later, expected, tmp_path):
    summary = c10.summarise(records(accuracy, later))
    assert summary.verdict == expected
    c10.plot(summary, tmp_path / "c10.png")
    assert (tmp_path / "c10.png").stat().st_size > 1000
