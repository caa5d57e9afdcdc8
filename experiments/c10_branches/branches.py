"""What the state holds after every loop: probes of the edges, and branches named at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.tasks.distances import Distances, Graphs
from open_mythos.data.permutation import Int64Array
from open_mythos.dynamics import probe
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.mythos import OpenMythos
from open_mythos.train.build import Model

MANY = 3
"""Nodes at one distance that count as many branches."""


@dataclass(frozen=True)
class Looked:
    """Answers and states of (M,) graphs after each of ``loops``."""

    loops: list[int]
    named: Int64Array
    """(L, M, nodes) distances that the model names, 0 for out of reach."""
    right: np.ndarray
    """(L, M, nodes) whether they are right."""
    edges: list[Tensor]
    """(M, D) states of one edge of each graph, per number of loops."""


def look(
    model: Model, task: Distances, graphs: Graphs, loops: Sequence[int], edge: int = 0,
    rows: int = 512,
) -> Looked:  # fmt: skip
    """Run ``model`` on the graphs and keep its answers, and the state of edge number ``edge``."""
    named, edges = list[list[Tensor]](), list[list[Tensor]]()
    with frozen(model, torch.float32):
        for ids_BT in task.tokens(graphs).split(rows):
            if not isinstance(model, OpenMythos):
                named.append([_named(model(ids_BT), task)])
                continue
            ctx = model.context(ids_BT)
            kept = [h for t, h in model.unroll(ids_BT, max(loops), ctx) if t + 1 in loops]
            named.append([_named(model.logits(h, ctx), task) for h in kept])
            edges.append([h[:, edge] for h in kept])
    shown = list(loops) if isinstance(model, OpenMythos) else [1]
    named_LMn = np.stack([torch.cat(parts).numpy() for parts in zip(*named, strict=True)])
    return Looked(
        shown, named_LMn, named_LMn == task.answers(graphs),
        [torch.cat(parts) for parts in zip(*edges, strict=True)],
    )  # fmt: skip


def _named(logits_BTV: Tensor, task: Distances) -> Tensor:
    """Return the likeliest distance of every node."""
    return logits_BTV[:, -task.nodes :, : task.farthest + 1].argmax(-1)


def by_distance(found: Looked, graphs: Graphs, task: Distances) -> list[list[float]]:
    """Return (distance 0 .. farthest, loops) shares of nodes named right; 0 is out of reach."""
    answers_Mn = task.answers(graphs)
    return [
        [float(right_Mn[answers_Mn == d].mean()) for right_Mn in found.right]
        for d in range(task.farthest + 1)
    ]


def at_once(found: Looked, graphs: Graphs, task: Distances) -> dict[str, Any]:
    """Compare graphs with one node at a distance with graphs of many.

    Returns:
        Per distance (1 .. farthest - 1, those with enough graphs): the share of graphs whose nodes
        at that distance are *all* right, over the loops, and the mean loop after which they stay
        right, each for "one" node and for "many".
    """
    shown: dict[str, Any] = {}
    for d in range(1, task.farthest):
        front_Mn = graphs.distance == d
        branches_M = front_Mn.sum(1)
        whole_LM = (found.right | ~front_Mn).all(2)
        stay_M = _first_stable(whole_LM, found.loops)
        groups = {"one": branches_M == 1, "many": branches_M >= MANY}
        if min(group.sum() for group in groups.values()) < 2:
            continue
        shown[str(d)] = {
            name: {
                "graphs": int(group_M.sum()),
                "all_right": [float(x) for x in whole_LM[:, group_M].mean(1)],
                "loops": float(stay_M[group_M].mean()),
            }
            for name, group_M in groups.items()
        }
    return shown


def _first_stable(whole_LM: np.ndarray, loops: Sequence[int]) -> np.ndarray:
    """Return the loop from which a graph stays right; the last one if it is wrong at the end."""
    wrong_LM = ~whole_LM
    last_M = np.where(wrong_LM.any(0), len(loops) - wrong_LM[::-1].argmax(0), 0)
    found: np.ndarray = np.array([*loops, loops[-1]])[last_M]
    return found


def probes(
    found: Looked, graphs: Graphs, task: Distances, edge: int = 0, seed: int = 0
) -> list[dict[str, float]]:
    """Decode, after each number of loops, how far the tail of an edge is from the source.

    One edge of each graph, so that no graph is on both sides of the split. Nothing is labelled at
    edges in training.
    """
    tail_M = graphs.edges[:, edge] // task.nodes
    distance_M: Int64Array = np.take_along_axis(graphs.distance, tail_M[:, None], 1)[:, 0]
    labels_M = torch.from_numpy(np.minimum(distance_M, task.farthest + 1))
    scores = [probe(states_MD, labels_M, seed=seed) for states_MD in found.edges]
    return [{"accuracy": s.score, "control": s.control, "baseline": s.baseline} for s in scores]
