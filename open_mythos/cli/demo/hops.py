"""The part of the demo that needs depth: answers several hops away."""

from __future__ import annotations

from typing import Any

import torch

from open_mythos.cli.demo.setup import HOP_LOOPS, HOPS, TASK, TEST_HOPS
from open_mythos.data import Batch
from open_mythos.model import OpenMythos
from open_mythos.train.build import Model

TEST_PROGRAMS = 4096
"""A tenth of them is held out of training at their full length, and asked."""


class HopLoader:
    """Programs of :data:`HOPS` relations, fresh at every step."""

    def __init__(self, global_batch: int) -> None:
        self.step, self._global_batch = 0, global_batch

    def next_batch(self, step: int) -> Batch:
        """The programs of ``step``."""
        return TASK.batch(step, global_batch=self._global_batch, hops=HOPS)

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position."""
        self.step = state["step"]


@torch.no_grad()
def accuracy_grid(model: Model) -> list[list[float]]:
    """Share of held-out questions answered, (hops, loops); a dense model has one column."""
    grid = []
    for hops in TEST_HOPS:
        batch = TASK.batch(0, global_batch=TEST_PROGRAMS, hops=hops, held_out=True)
        asked_B = batch.targets[:, -1] >= 0
        ids, answers = batch.input_ids[asked_B], batch.targets[asked_B, -1]
        row = []
        for loops in HOP_LOOPS if isinstance(model, OpenMythos) else [None]:
            depth = {} if loops is None else {"n_loops": loops}
            said = model(ids, **depth)[:, -1].argmax(-1)
            row.append((said == answers).float().mean().item())
        grid.append(row)
    return grid
