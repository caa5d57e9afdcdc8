"""Recipe of a model that measures distances in a graph by looping."""

from __future__ import annotations

import torch

from experiments.tasks import TaskLoader
from experiments.tasks.distances import Distances
from experiments.tasks.puzzle import puzzle_recipe
from experiments.training import build, seeded
from open_mythos.train import RunConfig
from open_mythos.train.build import Model

TASK = Distances()
TRAINED_LOOPS = 8
STEPS, RATE = 1500, 3e-3


def recipe(*, quick: bool = False, lr: float = RATE, steps: int = STEPS) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    return puzzle_recipe(
        TASK.vocab_size, TASK.length, loops=TRAINED_LOOPS, lr=lr, steps=steps, quick=quick
    )


def untrained(run: RunConfig, *, unrolled: int | None = None) -> Model:
    """Build the model, or a dense one as deep as ``unrolled`` loops.

    The embedding of an edge starts as the sum of a vector of its tail and one of its head, those of
    the source and of a question contain the head and the tail of their node.
    """
    model = build(run, unrolled=unrolled)
    n = TASK.nodes
    std = model.embedding.weight.std().item() / 2**0.5  # of each of the two
    with seeded(run.train.seed, "distances/embedding"), torch.no_grad():
        tail_nD, head_nD, kinds_2D = (std * torch.randn(rows, model.cfg.dim) for rows in (n, n, 2))
        edges_ND = (tail_nD.unsqueeze(1) + head_nD).flatten(0, 1)
        rows = torch.cat([edges_ND, head_nD + kinds_2D[0], tail_nD + kinds_2D[1]])
        model.embedding.weight.copy_(rows)
    return model


def graphs(run: RunConfig) -> TaskLoader:
    """Return the training data."""
    return TaskLoader(TASK, global_batch=run.train.global_batch)
