"""Chains of relations, where the number of loops a question needs is known: its hops."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from experiments.c1_depth.chain_recipe import TASK, TRAINED_HOPS, chains
from experiments.c4_halting.act import measure_act, train_act
from experiments.c4_halting.points import figures, hop_numbers, measure, ordering, shallowest
from experiments.claim import Cell, Place
from experiments.training import run_of
from open_mythos.data import IGNORE_INDEX, Batch
from open_mythos.evaluation.early_exit import GivenDepths, Variant, run_exits, wall_clock
from open_mythos.evaluation.frozen import frozen
from open_mythos.model.exit_rules import ExitRule, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import GateConfig, Trainer, build_model, train_gate
from open_mythos.train.gate import calibration_error, trajectory

_FRESH = 1 << 20
"""First step of chains not drawn in training."""


def run_chains(cell: Cell, place: Place) -> dict[str, Any]:
    """Train a model and measure every exit rule on it."""
    s, run = cell.settings, run_of(cell)
    trainer = Trainer(build_model(run), chains(run), run)
    trainer.fit()
    assert isinstance(trainer.model, OpenMythos)
    return measure_rules(trainer.model.eval(), s, cell.seed)


def run_act(cell: Cell, place: Place) -> dict[str, Any]:
    """Train a model by ACT and evaluate it with more loops."""
    s = cell.settings
    model = train_act(run_of(cell), s["ponder"], s["bias"])
    test = questions(s["hops"], s["rows"], s["drawn"])
    found = measure_act(model, test, s["allowed"])
    for each in found:
        each["spearman"] = ordering(each.pop("exits"), test)
    return {"static": static_depths(model, test, s["loops"]), "allowed": found}


def questions(hops: int, rows: int, drawn: int) -> Batch:
    """Draw chains and keep the ``rows`` with the most held-out prefixes, the labeled ones.

    Prefixes are held out by hash, so the selection does not favor easier questions.
    """
    batch = TASK.batch(0, global_batch=drawn, hops=hops, held_out=True)
    count_B = (batch.targets != IGNORE_INDEX).sum(1)
    keep_B = count_B.argsort(descending=True, stable=True)[:rows]
    return replace(
        batch, input_ids=batch.input_ids[keep_B], targets=batch.targets[keep_B],
        sample_index=batch.sample_index[keep_B],
    )  # fmt: skip


def measure_rules(model: OpenMythos, s: dict[str, Any], seed: int) -> dict[str, Any]:
    """Measure every gate after training it, then the rules without training."""
    test = questions(s["hops"], s["rows"], s["drawn"])
    static = static_depths(model, test, s["loops"])
    points, gates = list[dict[str, Any]](), dict[str, Any]()
    best: dict[str, ExitRule] = {}

    def measured(name: str, specs: list[str]) -> None:
        found = measure(model, [test], s["loops"], name, specs, seed, chains=True)
        points.extend(found)
        point = shallowest(found, static[-1] - s["lose"])
        if point is not None:
            # a copy: training the next gate overwrites this one
            best[name] = deepcopy(exit_rule(point["spec"], model))

    for name, about in s["gates"].items():
        config = GateConfig(target=about["target"], seed=seed, **s["gate"])
        report = train_gate(model, _gate_batches(about["hops"], s["gate_rows"]), config)
        gates[name] = {
            "cross_entropy": [report.curve[0], report.curve[-1]],
            "calibration": _calibration(model, config, s),
            "position_shift": _position_shift(model, s),
        }
        measured(name, s["thresholds"])
    for name, specs in s["rules"].items():
        measured(name, specs)
    return {
        "static": static, "points": points, "gates": gates,
        "seconds": _seconds(model, test, s["loops"], best, s["repeats"]),
        "oracle": oracle(model, test, s["loops"], s["delays"]),
    }  # fmt: skip


def _seconds(
    model: OpenMythos, test: Batch, n_loops: int, rules: dict[str, ExitRule], repeats: int
) -> dict[str, float]:
    """Time full depth, and each rule at its shallowest setting that loses little."""
    variants: list[Variant] = [(n_loops, [None]), *((n_loops, [rule]) for rule in rules.values())]
    with frozen(model, torch.float32):
        taken = wall_clock(model, [test], variants, repeats)
    return dict(zip(["full", *rules], taken, strict=True))


def answered(model: OpenMythos, batch: Batch, n_loops: int) -> Tensor:
    """Return (L, B, T): whether the top token after each loop is the target, without exits."""
    with frozen(model, torch.float32):
        return torch.stack(
            [
                model.logits(h_BTD).argmax(-1) == batch.targets
                for _, h_BTD in model.unroll(batch.input_ids, n_loops)
            ]
        )


def static_depths(model: OpenMythos, test: Batch, n_loops: int) -> list[float]:
    """Return the accuracy with 1 .. ``n_loops`` loops for every position."""
    right_LBT = answered(model, test, n_loops)
    return right_LBT[:, test.targets != IGNORE_INDEX].float().mean(1).tolist()


def oracle(
    model: OpenMythos, test: Batch, n_loops: int, delays: list[int]
) -> list[dict[str, float]]:
    """Exit each position ``delays`` loops after its answer stays right, given the answers.

    No rule can know this. It shows how long a state must be updated after its own answer has
    settled, because later positions attend to it.
    """
    ids = test.input_ids.numpy()
    answers_BT = torch.from_numpy(TASK.answers(ids[:, 0], ids[:, 1:] - TASK.entities))
    everything = replace(test, targets=torch.cat((test.targets[:, :1], answers_BT), 1))
    settled_LBT = answered(model, everything, n_loops).flip(0).cummin(0).values
    first_BT = n_loops + 1 - settled_LBT.sum(0).clamp_min(1)
    first_BT[:, 0] = first_BT[:, 1]  # the entity has no answer; it exits with the first relation
    found = []
    with frozen(model, torch.float32):
        for delay in delays:
            rule = GivenDepths((first_BT + delay).clamp_max(n_loops))
            done = run_exits(model, [test], n_loops, [rule])
            found.append({"delay": delay} | figures(done))
    return found


def _gate_batches(hops: int, rows: int) -> Iterator[Batch]:
    """Yield training chains of the gate endlessly."""
    return (TASK.batch(step, global_batch=rows, hops=hops) for step in count(_FRESH))


def _calibration(model: OpenMythos, config: GateConfig, s: dict[str, Any]) -> dict[str, float]:
    """Return the gate's calibration error on trained and on larger hop counts."""
    batch = TASK.batch(2 * _FRESH, global_batch=s["rows"], hops=s["hops"])
    hops_BT = hop_numbers(batch)
    errors = {}
    for name, asked_BT in (
        ("trained", (hops_BT >= 1) & (hops_BT <= TRAINED_HOPS)),
        ("unseen", hops_BT > TRAINED_HOPS),
    ):
        part = replace(batch, targets=batch.targets.masked_fill(~asked_BT, IGNORE_INDEX))
        path = trajectory(model, [part], config.n_loops, part.targets.numel())
        errors[name] = calibration_error(model.recurrent.halting, path, config)
    return errors


def _position_shift(model: OpenMythos, s: dict[str, Any]) -> float:
    """Return how many loops later the second of two chains in a row exits, at equal hops.

    In a single chain hops equal the position; a gate that followed it would exit six loops later.
    """
    pairs = TASK.batch(3 * _FRESH, global_batch=s["rows"], hops=TRAINED_HOPS, chains=2)
    rule = exit_rule(f"gate:{s['thresholds'][0].partition(':')[2]}", model)
    with frozen(model, torch.float32):
        exits_BT = run_exits(model, [pairs], s["loops"], [rule]).exits[0].float()
    first_BT, second_BT = exits_BT.chunk(2, dim=1)
    return float((second_BT - first_BT)[:, 1:].mean())
