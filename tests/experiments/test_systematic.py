"""Systematic generalisation: arms are of the sizes they claim, the verdict follows the mark."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise

from experiments import systematic
from experiments.c1_depth import without_injection
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    UNCLEAR,
)
from experiments.systematic import ARMS, BETWEEN, LOOPED, STAGES
from experiments.systematic.states import replaced, with_states_of
from experiments.tasks.facts import KINDS
from experiments.training import build
from open_mythos.model.dense import parameter_count
from open_mythos.model.mythos import OpenMythos
from open_mythos.train import RunConfig

CELLS = systematic.cells("cpu")


@pytest.mark.parametrize("cell", systematic.cells("quick"), ids=lambda cell: cell.arm)
def test_a_quick_cell_runs(cell, place):
    figures = systematic.run_cell(cell, place)
    depths = 5 if cell.arm == LOOPED else 1
    assert set(figures["answered"]["2"]) == set(KINDS)
    assert set(figures["answered"]["3"]) == {*KINDS} - {"trained"}
    for kinds in figures["answered"].values():
        assert all(len(row) == depths and 0 <= min(row) <= max(row) <= 1 for row in kinds.values())
    assert [step for step, _ in figures["curves"]["eval/lone"]] == [2, 4]
    assert set(figures["replaced"]) == ({"own", "known", "lone"} if cell.arm == LOOPED else set())


def test_arms_are_of_the_sizes_they_claim():
    models = {}
    for cell in CELLS:
        if cell.seed == 0:
            run = RunConfig.from_dict(cell.settings["run"])
            models[cell.arm] = build(run, n_layers=cell.settings["layers"])
    size = {arm: parameter_count(model) for arm, model in models.items()}
    # a looped model also holds its injection and a halting gate
    injection = sum(p.numel() for p in models[LOOPED].recurrent.injection.parameters())
    assert abs(size["dense"] + injection - size[LOOPED]) < 0.02 * size[LOOPED]
    assert len(models["dense-equal-depth"].blocks) == 6
    assert isinstance(models[BETWEEN], OpenMythos)
    assert len(models[BETWEEN].prelude) == 1
    assert not models[LOOPED].prelude
    assert set(models) == set(ARMS)


@torch.no_grad()
def test_the_state_of_a_first_hop_is_replaced():
    cell = next(cell for cell in CELLS if cell.arm == LOOPED)
    run = RunConfig.from_dict(cell.settings["run"])
    run.model.initial_state = "prelude"
    model = randomise(build(run))
    without_injection(model)
    ids_BT, _ = systematic.TASK.questions("lone", 2)
    plain_BV = model(ids_BT, n_loops=4)[:, -1]
    assert torch.allclose(with_states_of(model, ids_BT, ids_BT, 4), plain_BV, atol=1e-5)
    others_BT = ids_BT.clone()
    others_BT[:, 1] = ids_BT[:, 1].roll(1)
    others_BV = model(others_BT, n_loops=4)[:, -1]
    assert not torch.allclose(others_BV, plain_BV, atol=1e-3)
    # without injection the state at position 1 is all that the last position sees of its token
    assert torch.allclose(with_states_of(model, ids_BT, others_BT, 4), others_BV, atol=1e-5)
    found = replaced(model, systematic.TASK, ids_BT, plain_BV.argmax(-1), 4)
    assert found["own"] == 1


def results(recorded, *, lone=0.9, known=1.0, dense=0.05):
    """Records as if every cell had run."""
    found = []
    for cell in CELLS:
        looped = cell.settings["run"]["architecture"] == "looped"
        of_kind = {"known": known, "lone": lone if looped else dense}
        row = {kind: [of_kind.get(kind, 0.5)] * (5 if looped else 1) for kind in KINDS}
        curves = {f"eval/{kind}": [[40, 0.1], [80, 0.3 * (i + 1)]] for i, kind in enumerate(STAGES)}
        answered = {"2": row, "3": {kind: row[kind] for kind in KINDS[1:]}}
        replaced = {"own": lone, "known": 0.95, "lone": 0.7} if looped else {}
        costs = {"parameters": 9, "training_flops": 1e9}
        found.append(recorded(cell, answered=answered, curves=curves, replaced=replaced, **costs))
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"lone": 0.6}, HOLDS_IN_PART),
        ({"dense": 0.5}, HOLDS_IN_PART),
        ({"lone": 0.2}, DOES_NOT_HOLD),
        ({"dense": 0.9}, DOES_NOT_HOLD),
        ({"known": 0.5}, UNCLEAR),
    ],
)
def test_the_verdict_follows_the_pass_mark(recorded, changes, verdict):
    assert systematic.summarise(results(recorded, **changes)).verdict.startswith(verdict)


def test_stages_are_told_apart(recorded):
    sentence = systematic.summarise(results(recorded)).sentence
    assert "trained chains from step (none)" in sentence
    assert "held-out ones from step 80" in sentence


def test_the_picture_and_the_table_show_every_arm(recorded, tmp_path):
    summary = systematic.summarise(results(recorded))
    assert [row[0] for row in summary.rows] == list(ARMS)
    assert all(len(row) == len(summary.head) for row in summary.rows)
    systematic.plot(summary, tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 20_000
