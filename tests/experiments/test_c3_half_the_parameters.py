"""C3: matched models, the best learning rate of each, the verdict by the mark."""

from __future__ import annotations

import pytest

from experiments import c3_half_the_parameters as c3
from experiments.c3_half_the_parameters import HALF, LOOPED, UNROLLED, WHOLE
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from open_mythos.train import RunConfig

FLOPS = {HALF: 1.0, LOOPED: 5.6, WHOLE: 2.0, UNROLLED: 5.6}


def records(recorded, **losses):
    """Every cell; an arm's loss varies by seed, and is worse at all but its best learning rate."""
    found = []
    for cell in c3.cells("cpu"):
        arm = cell.settings["arm"]
        worse = 0.5 if cell.settings["lr"] != 5e-3 else 0.0
        loss = losses[arm.partition("-")[2] or arm] + worse + 0.01 * cell.seed
        if arm == LOOPED:
            loss += 0.002 * (cell.seed - 1)
        found.append(recorded(cell, loss=loss, training_flops=FLOPS[arm], parameters=100,
                              curve=[[1, 2.0]]))  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("looped", "verdict"),
    [(1.999, HOLDS), (2.001, HOLDS), (2.03, HOLDS_IN_PART), (2.08, DOES_NOT_HOLD)],
)
def test_verdicts(recorded, looped, verdict):
    losses = {"6": 2.1, "12": 2.0, "34": 1.9, "looped": looped}
    assert c3.summarise(records(recorded, **losses)).verdict == verdict


def test_no_gap_no_answer(recorded):
    losses = {"6": 2.0, "12": 2.0, "34": 1.9, "looped": 2.0}
    assert c3.summarise(records(recorded, **losses)).verdict.startswith(UNCLEAR)


def test_figures_come_from_the_best_learning_rate(recorded, tmp_path):
    losses = {"6": 2.1, "12": 2.0, "34": 1.9, "looped": 2.03}
    summary = c3.summarise(records(recorded, **losses))
    assert {row[0]: row[3] for row in summary.rows} == dict.fromkeys(FLOPS, "0.005")
    assert "70% of the gap" in summary.key
    assert "2.8 times its FLOPs" in summary.sentence
    c3.plot(summary, tmp_path / "c3.png")
    assert (tmp_path / "c3.png").stat().st_size > 10_000


def test_quick_cells_run(place):
    looped, half = (c3.run_cell(cell, place) for cell in c3.cells("quick"))
    assert 0 < looped["loss"] < 8
    assert 0 < half["loss"] < 8
    # the looped model adds B and C, A and dt, the gate and a norm to the blocks
    assert 0 < looped["parameters"] - half["parameters"] < 2 * 32**2 + 6 * 32
    assert looped["training_flops"] > 5 * half["training_flops"]
    assert looped["tokens"] == half["tokens"]


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_settings_are_valid(scale):
    for cell in c3.cells(scale):
        RunConfig.from_dict(cell.settings["run"])
