"""Text, where the loops a byte needs are unknown and only the loss can be measured."""

from __future__ import annotations

from typing import Any

from experiments.c4_halting.points import measure
from experiments.claim import Cell, Place
from experiments.text import loader, train
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import GateConfig, train_gate


def run_text(cell: Cell, place: Place) -> dict[str, Any]:
    """Train a byte-level language model and measure every exit rule on it."""
    s = cell.settings
    trained = train(cell, place)
    model, run = trained.model, trained.run
    assert isinstance(model, OpenMythos)
    unseen = loader(run)
    unseen.step = run.train.steps  # windows not used in training
    points = []
    for name, target in s["gates"].items():
        train_gate(model, unseen, GateConfig(target=target, seed=cell.seed, **s["gate"]))
        points += measure(
            model, trained.batches, s["loops"], name, s["thresholds"], cell.seed, chains=False
        )
    for name, specs in s["rules"].items():
        points += measure(model, trained.batches, s["loops"], name, specs, cell.seed, chains=False)
    return trained.costs() | {
        "static": trained.losses(list(range(1, s["loops"] + 1))), "points": points
    }  # fmt: skip
