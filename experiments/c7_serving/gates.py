"""Depths that trained gates choose, on chains of relations and on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch

from experiments.c1_depth.chain_recipe import ASKED_HOPS, TASK, TRAINED_HOPS, chains
from experiments.claim import Cell, Place
from experiments.text import loader, train
from experiments.training import run_of
from open_mythos.data import Batch
from open_mythos.evaluation.early_exit import run_exits
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import GateConfig, Trainer, build_model, train_gate

_FRESH = 1 << 20
"""First step of chains not drawn in training."""


def of_chains(cell: Cell, place: Place) -> list[int]:
    """Train a model and its gate on chains; return the depths of longer chains, one by one."""
    s, run = cell.settings, run_of(cell)
    trainer = Trainer(build_model(run), chains(run), run)
    trainer.fit()
    assert isinstance(trainer.model, OpenMythos)
    model, rows = trainer.model.eval(), s["gate_rows"]
    batches = (TASK.batch(step, global_batch=rows, hops=TRAINED_HOPS) for step in count(_FRESH))
    train_gate(model, batches, GateConfig(seed=cell.seed, **s["gate"]))
    asked = TASK.batch(2 * _FRESH, global_batch=rows, hops=ASKED_HOPS)
    return _depths(model, [asked], s)


def of_text(cell: Cell, place: Place) -> list[int]:
    """Train a byte-level model and its gate; return the depths of unseen text, in order."""
    s, trained = cell.settings, train(cell, place)
    assert isinstance(trained.model, OpenMythos)
    unseen = loader(trained.run)
    unseen.step = trained.run.train.steps  # windows not used in training
    train_gate(trained.model, unseen, GateConfig(seed=cell.seed, **s["gate"]))
    return _depths(trained.model, trained.batches, s)


def _depths(model: OpenMythos, batches: Sequence[Batch], s: dict[str, Any]) -> list[int]:
    with frozen(model, torch.float32):
        rules = [exit_rule(s["threshold"], model) for _ in batches]
        return list(_flat(run_exits(model, batches, s["loops"], rules).exits))


def _flat(exits: Sequence[torch.Tensor]) -> Iterator[int]:
    for exits_BT in exits:
        yield from exits_BT.flatten().tolist()
