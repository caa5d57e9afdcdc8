"""Trains one arm on facts and chains, and asks for every kind of chain."""

from __future__ import annotations

from typing import Any

import torch

from experiments.claim import Cell, Place
from experiments.systematic.cells import HOPS, TASK
from experiments.tasks import TaskLoader
from experiments.tasks.accuracy import answered
from experiments.tasks.facts import KINDS
from experiments.training import build, fit, run_of
from open_mythos.accounting import account
from open_mythos.seeding import seeded_generator
from open_mythos.train.build import Model

STAGES = ("trained", "known", "lone")
"""Kinds of chains whose learning is followed."""


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm; its accuracies by kind, hops and loops, and the stages on the way."""
    s = cell.settings
    run, ask = run_of(cell), s["ask"]
    model = build(run, n_layers=s["layers"])
    samples = {kind: _questions(kind, HOPS, ask["followed"]) for kind in STAGES}

    def follow(model: Model, depths: list[int]) -> dict[str, float]:
        return {kind: answered(model, *asked, [ask["at"]])[0] for kind, asked in samples.items()}

    loader = TaskLoader(TASK, global_batch=run.train.global_batch, hops=HOPS)
    curves = fit(model, loader, run, *(f"eval/{kind}" for kind in STAGES), evaluate=follow)
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
        "curves": curves,
        "parameters": counts.parameters_without_embedding,
        "training_flops": tokens * counts.training_flops(*loops),
    }


def _questions(kind: str, hops: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All questions of a kind, or ``most`` of them, the same in every cell."""
    ids_BT, answers_B = TASK.questions(kind, hops)
    generator = seeded_generator(0, f"systematic/{kind}", hops)
    chosen = torch.randperm(len(ids_BT), generator=generator)[:most]
    return ids_BT[chosen], answers_B[chosen]
