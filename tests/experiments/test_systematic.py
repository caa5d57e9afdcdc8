"""Systematic generalisation: arms are of the sizes they claim, the verdict follows the mark."""

from __future__ import annotations

import pytest

from experiments import systematic
from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    UNCLEAR,
)
from experiments.systematic import ARMS, BETWEEN, LOOPED, STAGES
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


def results(recorded, *, lone=0.9, known=1.0, dense=0.05):
    """Records as if every cell had run."""
    found = []
    for cell in CELLS:
        looped = cell.settings["run"]["architecture"] == "looped"
        of_kind = {"known": known, "lone": lone if looped else dense}
        row = {kind: [of_kind.get(kind, 0.5)] * (5 if looped else 1) for kind in KINDS}
        curves = {f"eval/{kind}": [[40, 0.1], [80, 0.3 * (i + 1)]] for i, kind in enumerate(STAGES)}
        answered = {"2": row, "3": {kind: row[kind] for kind in KINDS[1:]}}
        found.append(
            recorded(cell, answered=answered, curves=curves, parameters=9, training_flops=1e9)
        )
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
