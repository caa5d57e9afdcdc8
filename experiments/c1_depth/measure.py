"""Trains one arm and asks it for chains of every length at every depth."""

from __future__ import annotations

import math
from typing import Any

import torch

from experiments.c1_depth.recipe import TASK, accuracy_grid, questions
from experiments.claim import Cell, Place
from experiments.tasks import PermHopLoader
from experiments.training import build, fit, run_of
from open_mythos.accounting import account
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.model.mythos import OpenMythos
from open_mythos.model.trace import LoopTrace
from open_mythos.train import RunConfig
from open_mythos.train.build import Model


def run_cell(cell: Cell, place: Place) -> dict[str, Any]:
    """Train the arm, then measure it on chains whose answers it was never told."""
    s = cell.settings
    run = run_of(cell)
    loader = PermHopLoader(
        TASK, global_batch=run.train.global_batch, hops=s["hops"], pair_from=s["pair_from"],
        final_only=s["final_only"],
    )  # fmt: skip
    model = build(run, unrolled=s["unrolled"])
    if not s["injection"]:
        without_injection(model)
    curve = fit(model, loader, run)["loss"]
    ask = s["ask"]
    return {
        "grid": accuracy_grid(model, ask["hops"], ask["loops"], ask["programs"]),
        "longest": accuracy_grid(model, [ask["longest"]], ask["loops"], ask["longest_programs"])[0],
        "rules": {rule: _by_rule(model, rule, ask) for rule in ask["rules"]},
        "curve": curve,
        **_costs(model, run, s["hops"], s["pair_from"]),
    }


def without_injection(model: Model) -> None:
    """Let the input enter once, as h_0, and never again.

    B e is zero and A is held at its upper bound, so that the state is kept as a residual stream
    keeps it.
    """
    for module in model.modules():
        if isinstance(module, LTIInjection):
            torch.nn.init.zeros_(module.B).requires_grad_(False)
            torch.nn.init.constant_(module.log_A, -math.inf).requires_grad_(False)


def _by_rule(model: Model, rule: str, ask: dict[str, Any]) -> list[dict[str, float]]:
    """For each of ``rule_hops``: share answered at the depth ``rule`` chooses, and its loops."""
    found = []
    for hops in ask["rule_hops"]:
        ids_BT, answers_B = questions(hops, ask["programs"])
        trace = LoopTrace()
        with frozen(model, torch.float32):
            logits_BTV = model(
                ids_BT, n_loops=ask["most_loops"], exit_rule=exit_rule(rule, model), trace=trace
            )
        assert trace.exits is not None
        right_B = logits_BTV[:, -1].argmax(-1) == answers_B
        found.append(
            {
                "accuracy": right_B.float().mean().item(),
                "loops": trace.exits[:, -1].float().mean().item(),
            }
        )
    return found


def _costs(model: Model, run: RunConfig, hops: int, pair_from: int | None) -> dict[str, Any]:
    """Parameters, and training FLOPs with the loops that long steps add on average."""
    steps = run.train.steps
    rows = steps + (0 if pair_from is None else max(0, steps - pair_from))
    tokens = rows * run.train.global_batch * (hops + 1)
    counts = account(model, context=hops + 1)
    depth = run.depth
    deep = depth.expected + depth.expected_further
    loops = (deep, depth.expected) if isinstance(model, OpenMythos) else ()
    return {
        "parameters": counts.parameters_without_embedding,
        "tokens": tokens,
        "training_flops": tokens * counts.training_flops(*loops),
    }
