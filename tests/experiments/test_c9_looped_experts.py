"""C9: active parameters are equal, tied experts are tied, the verdict by the mark."""

from __future__ import annotations

import pytest
import torch
from helpers import random_ids, small_model

from experiments import c9_looped_experts as c9
from experiments.c9_looped_experts import PER_LOOP, TIED, BiasedByLoop, TiedExperts, control_experts
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART
from open_mythos import LoopTrace, MythosConfig, account
from open_mythos.train import RunConfig


@torch.no_grad()
def test_tied_experts_stay_and_nothing_else_changes():
    model = small_model("gqa")
    free = LoopTrace(keep_routing=True)
    once, thrice = (
        model(random_ids(2, 9), n_loops=1),
        model(random_ids(2, 9), n_loops=3, trace=free),
    )
    control_experts(model, TIED)
    tied = LoopTrace(keep_routing=True)
    assert isinstance(model.recurrent.blocks[0].ffn, TiedExperts)
    assert torch.equal(model(random_ids(2, 9), n_loops=1), once)
    assert not torch.equal(model(random_ids(2, 9), n_loops=3, trace=tied), thrice)
    layer = next(iter(tied.load_by_layer()))
    assert free.expert_overlap(layer).min() < 1, "untied, experts change: the negative control"
    assert tied.expert_overlap(layer).min() == 1


@torch.no_grad()
def test_a_bias_of_a_loop_is_zero_at_first_and_acts_in_its_loop_alone():
    model = small_model("gqa")
    ids = random_ids(2, 9)
    once, twice = model(ids, n_loops=1), model(ids, n_loops=2)
    control_experts(model, PER_LOOP)
    layer = model.recurrent.blocks[0].ffn
    assert isinstance(layer, BiasedByLoop)
    assert torch.equal(model(ids, n_loops=2), twice)
    layer.loop_bias.view(-1, model.cfg.n_experts)[1, 0] = 50
    assert torch.equal(model(ids, n_loops=1), once)
    trace = LoopTrace(keep_routing=True)
    assert not torch.equal(model(ids, n_loops=2, trace=trace), twice)
    load_LE = trace.load_by_loop(next(iter(trace.load_by_layer())))
    assert load_LE[1, 0] == ids.numel(), "every token takes the favored expert in the second loop"
    assert load_LE[0, 0] < ids.numel()


def records(recorded, *, gain=0.1, more=0.05, disjoint=0.4, tied=0.03):
    """Every cell: what R = 4 gains with one expert, and how much more with several."""
    found = []
    for cell in c9.cells("cpu"):
        s = cell.settings
        gained = (gain + (more if s["experts"] > 1 else 0)) * (s["loops"] - 1) / 3
        loss = 2.0 - gained + 0.01 * cell.seed + 0.002 * (cell.seed - 1) * (s["experts"] == 1)
        if s["control"] == "tied":
            loss += tied + 0.001 * cell.seed
        figures = {"loss": loss, "parameters": 10, "active_parameters": 5}
        if s["experts"] > 1:
            figures["entropy"] = 0.9
            if s["loops"] > 1:
                figures |= {"disjoint": disjoint, "common": 1 - disjoint}
        found.append(recorded(cell, **figures))
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"disjoint": 0.1}, HOLDS_IN_PART),
        ({"tied": 0.0}, HOLDS_IN_PART),
        ({"more": 0.0}, HOLDS_IN_PART),
        ({"more": -0.05, "tied": -0.03}, DOES_NOT_HOLD),
    ],
)
def test_verdicts(recorded, changes, verdict, tmp_path):
    summary = c9.summarise(records(recorded, **changes))
    assert summary.verdict == verdict


def test_figures_and_plot(recorded, tmp_path):
    summary = c9.summarise(records(recorded))
    assert "gain 0.100 dense, 0.150 of 16" in summary.key
    assert [row[0] for row in summary.rows][:4] == [
        "experts1-loops1", "experts16-loops1", "experts1-loops4", "experts16-loops4",
    ]  # fmt: skip
    c9.plot(summary, tmp_path / "c9.png")
    assert (tmp_path / "c9.png").stat().st_size > 10_000


def test_quick_cell_runs(place):
    tied, biased = (c9.run_cell(cell, place) for cell in c9.cells("quick"))
    assert 0 < tied["loss"] < 8
    assert tied["disjoint"] == 0
    assert tied["common"] == 1
    assert 0 < tied["entropy"] <= 1
    assert 0 <= biased["disjoint"] <= 1


def test_active_parameters_are_equal():
    """Up to the routers, which score every expert."""
    active = set()
    for cell in c9.cells("cpu"):
        cfg = MythosConfig.from_dict(cell.settings["run"]["model"])
        routers = cfg.recurrent_layers * cfg.n_experts * cfg.dim
        active.add(account(cfg).active_parameters - routers)
    assert len(active) == 1


@pytest.mark.parametrize("scale", ["cpu", "gpu"])
def test_settings_are_valid(scale):
    for cell in c9.cells(scale):
        RunConfig.from_dict(cell.settings["run"])
