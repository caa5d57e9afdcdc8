"""Trains one arm on facts and chains, and asks for every kind of chain."""

from __future__ import annotations

from typing import Any

import torch

from experiments.claim import Cell, Place
from experiments.synthetic import Curves, answered
from experiments.systematic.cells import HOPS, TASK
from experiments.tasks import TaskLoader
from experiments.tasks.facts import KINDS
from open_mythos.accounting import account
from open_mythos.model.dense import DenseTransformer
from open_mythos.seeding import derive_seed, seeded_generator
from open_mythos.train import RunConfig, Trainer, build_model
from open_mythos.train.build import Model

STAGES = ("trained", "known", "lone")
"""Kinds of chains whose learning is followed."""


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm; its accuracies by kind, hops and loops, and the stages on the way."""
    s = cell.settings
    run = RunConfig.from_dict(s["run"])
    run.train.seed = cell.seed
    model, ask = _build(run, s["layers"]), s["ask"]
    samples = {kind: _questions(kind, HOPS, ask["followed"]) for kind in STAGES}

    def follow(model: Model, depths: list[int]) -> dict[str, float]:
        return {kind: answered(model, *asked, [ask["at"]])[0] for kind, asked in samples.items()}

    curves = Curves("loss", *(f"eval/{kind}" for kind in STAGES))
    loader = TaskLoader(TASK, global_batch=run.train.global_batch, hops=HOPS)
    Trainer(model, loader, run, evaluate=follow, loggers=[curves]).fit()
    counts = account(model, context=HOPS + 1)
    tokens = run.train.steps * run.train.global_batch * (HOPS + 1)
    loops = [run.depth.expected] if run.architecture == "looped" else []
    return {
        "answered": {
            str(hops): {
                kind: answered(model, *_questions(kind, hops, ask["most"]), ask["loops"])
                for kind in KINDS
                if (kind, hops) != ("trained", ask["hops"][-1])
            }
            for hops in ask["hops"]
        },
        "curves": curves.points,
        "parameters": counts.parameters_without_embedding,
        "training_flops": tokens * counts.training_flops(*loops),
    }


def _build(run: RunConfig, layers: int | None) -> Model:
    """The model of the run; for a dense one ``layers`` as wide as the configuration says."""
    if layers is None:
        return build_model(run)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run.train.seed, "init"))
        return DenseTransformer(run.model, layers)


def _questions(kind: str, hops: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All questions of a kind, or ``most`` of them, the same in every cell."""
    ids_BT, answers_B = TASK.questions(kind, hops)
    generator = seeded_generator(0, f"systematic/{kind}", hops)
    chosen = torch.randperm(len(ids_BT), generator=generator)[:most]
    return ids_BT[chosen], answers_B[chosen]
