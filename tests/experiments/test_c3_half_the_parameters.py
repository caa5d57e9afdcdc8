"""C3: arms of the size they are said to have, the verdict by the mark, phi from all arms."""

from __future__ import annotations

import math

import pytest

from experiments import c3_half_the_parameters as c3
from experiments.c3_half_the_parameters import BETWEEN, HALF, LOOPED, UNROLLED, WHOLE
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from open_mythos.train import RunConfig

RUNS = sum(cell.arm in c3.LAW for cell in c3.cells("cpu"))


def records(recorded, value=0.46, slope=0.1, looped=None):
    """Every cell, as if the law held with phi = ``value``; a doubling is worth ``slope`` bits."""
    found = []
    for cell in c3.cells("cpu"):
        s = cell.settings
        blocks = s.get("n_layers", s["run"]["model"]["recurrent_layers"])
        worth = s["around"] + s["loops"] ** value * blocks
        bits = 2.0 - slope * math.log2(worth) + 0.01 * cell.seed
        if cell.arm == LOOPED:
            bits = (bits if looped is None else looped + 0.01 * cell.seed) + 0.002 * cell.seed
        found.append(recorded(cell, bits=[bits] * 2 * s["loops"], training_flops=worth,
                              parameters=100 * (blocks + s["around"])))  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("looped", "verdict"),
    [(1.799, HOLDS), (1.8, HOLDS), (1.84, HOLDS_IN_PART), (1.88, DOES_NOT_HOLD)],
)
def test_verdicts(recorded, looped, verdict):
    assert c3.summarise(records(recorded, looped=looped)).verdict == verdict


def test_no_gap_no_answer(recorded):
    assert c3.summarise(records(recorded, slope=0.0)).verdict.startswith(UNCLEAR)


def test_figures_of_a_law(recorded, tmp_path):
    summary = c3.summarise(records(recorded, value=0.5))
    assert "99% of the gap" in summary.key
    assert "phi is 0.50 [0.4" in summary.sentence
    assert f"{RUNS} runs" in summary.sentence
    assert [row[0] for row in summary.rows[: len(c3.SHOWN)]] == list(c3.SHOWN)
    c3.plot(summary, tmp_path / "c3.png")
    assert (tmp_path / "c3.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.1, "below 0.46, below 0.65"), (0.46, "consistent with 0.46, below 0.65"),
     (0.9, "above 0.46, above 0.65")],
)  # fmt: skip
def test_phi_is_compared_with_the_published_ones(recorded, value, words):
    assert words in c3.summarise(records(recorded, value=value)).sentence


def test_quick_cells_run(place):
    half, between, dense = (c3.run_cell(cell, place) for cell in c3.cells("quick"))
    assert len(half["bits"]) == 1
    assert len(between["bits"]) == 2 * c3.LOOPS
    assert all(0 < bits < 12 for bits in half["bits"] + between["bits"])
    assert between["training_flops"] > 3 * half["training_flops"]
    assert between["tokens"] == half["tokens"] == dense["tokens"]
    assert 0 < half["parameters"] - dense["parameters"] < dense["parameters"] / 2


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_models_have_the_sizes_of_the_claim(scale):
    found = {}
    for cell in c3.cells(scale):
        run = RunConfig.from_dict(cell.settings["run"])
        around = run.model.prelude_layers + run.model.coda_layers
        found[cell.arm] = cell.settings.get("n_layers", around + run.model.recurrent_layers)
        assert cell.settings["text"] == "packages"
        if cell.arm in c3.LAYERS:
            assert (run.depth.plan, run.depth.mean, run.architecture) == ("fixed", 1, "looped")
    assert found[WHOLE] == 2 * found[LOOPED] == 2 * found[HALF]
    assert found[BETWEEN] == found[WHOLE]
    assert found[UNROLLED] == c3.LOOPS * found[LOOPED]
    assert [found[arm] for arm in c3.DENSE] == [found[arm] for arm in c3.LAYERS]
