"""C2: the arms are what they are called, divergence is noticed, the verdict follows the mark."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_same, randomise

from experiments import c2_stability as c2
from experiments.c2_stability import LEARNING_RATES, Watch, largest_stable
from experiments.c2_stability.arms import RULES, build_arm
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from open_mythos import LTIInjection, MythosConfig

LOSSES = {"1": 2.2, "4": 2.1, "16": 2.0, "32": 2.0}
MODEL = {
    "vocab_size": 31, "dim": 16, "n_heads": 2, "n_kv_heads": 2, "attn_type": "gqa",
    "n_experts": 0, "lora_rank": 0, "prelude_layers": 1, "coda_layers": 1, "max_seq_len": 8,
    "readout": False,
}  # fmt: skip


def state(scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_every_arm_carries_state_and_input(rule):
    model = randomise(build_arm(rule, MODEL, 0)).eval()
    once = model.step(state(), state(0.5), 0)
    assert once.shape == (2, 8, 16)
    assert not torch.allclose(once, model.step(2 * state(), state(0.5), 0))
    assert not torch.allclose(once, model.step(state(), state(0.9), 0))
    assert math.isfinite(model.recurrent.injection.spectral_radius())
    again = randomise(build_arm(rule, MODEL, 0)).eval()
    assert torch.equal(again.step(state(), state(0.5), 0), once)


@torch.no_grad()
def test_linear_parts():
    """With branches that end in zeros a block is the identity, and what is left is linear."""
    h, e = state(), state(0.3)
    arms = {rule: build_arm(rule, MODEL, 0).eval() for rule in RULES}
    found = {rule: model.step(h, e, 0) for rule, model in arms.items()}
    assert_same(found["additive"], h + e)
    for rule in ("concat", "stable"):
        assert_same(found[rule], arms[rule].recurrent.injection(h, e))
    loop = arms["predecessor"].recurrent
    same = LTIInjection(16)
    same.load_state_dict(loop.injection.state_dict())
    assert_same(found["predecessor"], same(h, e) + loop.norm(h + e))
    assert found["sandwich"].pow(2).mean(-1).sqrt().allclose(torch.ones(2, 8), atol=1e-3)


def test_a_spike_ends_a_training_only_if_it_lasts():
    watch = Watch(patience=3)
    assert [watch.sees(loss, 1.0) for loss in (4.0, 2.0, 2.7, 2.7, 2.5, 2.7, 2.7)] == [""] * 7
    assert watch.sees(2.7, 1.0) == "loss"


@pytest.mark.parametrize(
    ("loss", "growth", "reason"),
    [(math.nan, 1.0, "not finite"), (2.0, math.inf, "not finite"), (2.0, 1001.0, "state"),
     (2.0, 999.0, "")],
)  # fmt: skip
def test_other_ends(loss, growth, reason):
    assert Watch(patience=3).sees(loss, growth) == reason


def records(recorded, first_diverged):
    """Every cell; arms diverge from the learning rate that ``first_diverged`` gives on."""
    found = []
    for cell in c2.cells("cpu"):
        ends = cell.settings["lr"] >= first_diverged.get(cell.settings["arm"], math.inf)
        figures = {"diverged": "state" if ends else "", "largest_growth": 5.0, "rho": 0.5,
                   "parameters": 100}  # fmt: skip
        found.append(recorded(cell, **figures, **({} if ends else {"loss": LOSSES})))
    return found


@pytest.mark.parametrize(
    ("first_diverged", "verdict"),
    [
        ({"concat": 2e-2, "additive": 1e-2}, HOLDS),
        ({"concat": 2e-2}, HOLDS_IN_PART),
        ({"concat": 4e-2, "additive": 4e-2, "lti": 4e-2}, DOES_NOT_HOLD),
        ({"lti": 1e-2}, DOES_NOT_HOLD),
        ({"concat": 3e-4, "additive": 3e-4, "lti": 3e-4}, DOES_NOT_HOLD),
        ({"concat": 3e-4, "additive": 3e-4}, HOLDS),
        ({}, UNCLEAR),
    ],
)
def test_verdicts(recorded, first_diverged, verdict):
    assert c2.summarise(records(recorded, first_diverged)).verdict.startswith(verdict)


def test_one_seed_that_diverges_is_enough(recorded):
    found = records(recorded, {})
    bad = next(r for r in found if r.settings["arm"] == "concat" and r.settings["lr"] == 1e-2)
    bad.figures.update(diverged="loss", largest_growth=None)
    of_arm = [r for r in found if r.settings["arm"] == "concat"]
    rates = {lr: [r for r in of_arm if r.settings["lr"] == lr] for lr in LEARNING_RATES["cpu"]}
    assert largest_stable(rates) == 3e-3
    summary = c2.summarise(found)
    assert "1 of 3 diverged" in next(row for row in summary.rows if row[0] == "concat")
    assert "1 of 84 runs diverged: 1 by the loss" in summary.sentence


def test_plot(recorded, tmp_path):
    c2.plot(c2.summarise(records(recorded, {"concat": 2e-2})), tmp_path / "c2.png")
    assert (tmp_path / "c2.png").stat().st_size > 10_000


def test_quick_cells_run(place):
    for cell in c2.cells("quick"):
        figures = c2.run_cell(cell, place)
        assert figures["diverged"] == ""
        assert figures["step"] == cell.settings["steps"]
        assert set(figures["loss"]) == {"1", "4"}
        assert all(0 < loss < 8 for loss in figures["loss"].values())
        assert len(figures["state_norm"]) == len(figures["delta_norm"]) == 4
    assert figures == c2.run_cell(cell, place), "a cell is a function of itself"


def test_a_training_that_explodes_is_a_result(place):
    cell = c2.cells("quick")[0]
    cell.settings["lr"] = 1e6
    figures = c2.run_cell(cell, place)
    assert figures["diverged"]
    assert figures["step"] < cell.settings["steps"]
    assert "loss" not in figures


def test_half_precision_runs_too(place):
    cell = c2.cells("quick")[1]
    cell.settings.update(dtype="bfloat16", steps=2)
    assert c2.run_cell(cell, place)["diverged"] == ""


def test_gpu_settings_are_valid():
    for cell in c2.cells("gpu"):
        MythosConfig.from_dict(cell.settings["model"] | RULES[cell.settings["rule"]]).validate()
