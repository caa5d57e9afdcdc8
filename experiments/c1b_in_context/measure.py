"""Trains one arm on rows of facts and chains, and asks for more hops."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from experiments.c1b_in_context.cells import TASK, TRAINED_HOPS
from experiments.claim import Cell, Place
from experiments.tasks import TaskLoader
from experiments.tasks.accuracy import answered
from experiments.training import build, fit, run_of
from open_mythos.accounting import account


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm; measure its accuracy over hops and loops, on rows of another stream."""
    run, ask = run_of(cell), cell.settings["ask"]
    model = build(run, unrolled=cell.settings["unrolled"])
    loader = TaskLoader(TASK, global_batch=run.train.global_batch, hops=TRAINED_HOPS)
    curves = fit(model, loader, run)
    return {
        "grid": [
            answered(model, *questions(hops, ask["rows"]), ask["loops"]) for hops in ask["hops"]
        ],
        "curve": curves["loss"],
        "parameters": account(model, context=run.train.seq_len).parameters_without_embedding,
    }


def questions(hops: int, rows: int) -> tuple[Tensor, Tensor]:
    """Draw rows (B, M + hops) of facts and a chain, and the entity each chain leads to (B,)."""
    batch = TASK.batch(0, global_batch=rows, hops=hops, test=True)
    return batch.input_ids, batch.targets[:, -1]
