"""Trains one arm on rows of facts and chains, and asks for more hops."""

from __future__ import annotations

from typing import Any

import torch

from experiments.c1b_in_context.cells import TASK, TRAINED_HOPS
from experiments.claim import Cell, Place
from experiments.synthetic import Curves, answered
from experiments.tasks import TaskLoader
from open_mythos.accounting import account
from open_mythos.model.dense import DenseTransformer
from open_mythos.seeding import derive_seed
from open_mythos.train import RunConfig, Trainer, build_model
from open_mythos.train.build import Model


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm; its accuracies over hops and loops, on rows of a stream of their own."""
    s = cell.settings
    run = RunConfig.from_dict(s["run"])
    run.train.seed = cell.seed
    model, ask = _build(run, s["unrolled"]), s["ask"]
    loader = TaskLoader(TASK, global_batch=run.train.global_batch, hops=TRAINED_HOPS)
    curves = Curves("loss")
    Trainer(model, loader, run, loggers=[curves]).fit()
    return {
        "grid": [
            answered(model, *questions(hops, ask["rows"]), ask["loops"]) for hops in ask["hops"]
        ],
        "curve": curves.points["loss"],
        "parameters": account(model, context=run.train.seq_len).parameters_without_embedding,
    }


def questions(hops: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (B, M + hops) of facts and a chain, and the entity that each chain leads to (B,)."""
    batch = TASK.batch(0, global_batch=rows, hops=hops, test=True)
    return batch.input_ids, batch.targets[:, -1]


def _build(run: RunConfig, unrolled: int | None) -> Model:
    """The model of the run; the dense one with a layer for each block of ``unrolled`` loops."""
    if unrolled is None:
        return build_model(run)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run.train.seed, "init"))
        return DenseTransformer.like(run.model, match="depth", n_loops=unrolled)
