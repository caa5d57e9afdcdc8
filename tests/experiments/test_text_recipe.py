"""Loops on text: every change starts as it says, the verdict by the mark."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import random_ids, small_model

from experiments import text_recipe as text
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART
from experiments.text_recipe.variants import VARIANTS
from open_mythos import OpenMythos
from open_mythos.train import OptimConfig
from open_mythos.train.optimizers.optim import build_optimizer

STACK = {"prelude_layers": 0, "coda_layers": 0, "recurrent_layers": 2, "n_experts": 0,
         "lora_rank": 0}  # fmt: skip


@pytest.fixture(scope="module")
def plain() -> OpenMythos:
    return small_model("gqa", **STACK)


def changed(plain: OpenMythos, name: str) -> OpenMythos:
    model = copy.deepcopy(plain)
    VARIANTS[name](model)
    return model


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_changes_train_and_serve_rows_of_unequal_depth(plain, name):
    model = changed(plain, name).train()
    ids, depths = random_ids(3, 6), torch.tensor([1, 4, 2])
    out = model(ids, n_loops=depths)
    out.square().mean().backward()
    new = model.state_dict().keys() - plain.state_dict().keys()
    gradients = {n: p.grad for n, p in model.named_parameters() if n in new}
    assert new == {*gradients} | {"readout.readout.weight"} & new
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.abs().sum() > 0, key
    model.eval()
    for row, depth in enumerate(depths.tolist()):
        *_, (_, h_BTD) = model.unroll(ids[row : row + 1], depth)
        assert torch.allclose(model.logits(h_BTD), out[row : row + 1], atol=1e-4)


@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"orthogonal"}))
def test_changes_start_as_the_unchanged_model(plain, name):
    ids = random_ids(2, 6)
    assert torch.allclose(changed(plain, name)(ids), plain(ids), atol=1e-5)


def test_the_orthogonal_injection_adds_nothing_along_the_state(plain):
    model = changed(plain, "orthogonal")
    h_BTD, drive_BTD = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    ctx = model.context(random_ids(2, 3))
    one = model.recurrent.step(h_BTD, drive_BTD, 0, ctx)
    along = model.recurrent.step(h_BTD, drive_BTD + 0.7 * h_BTD, 0, ctx)
    assert torch.allclose(one, along, atol=1e-4)
    assert not torch.allclose(one, plain.recurrent.step(h_BTD, drive_BTD, 0, ctx), atol=1e-2)


def test_weight_decay_pulls_changes_to_their_start(plain):
    """A decayed parameter must have its start at zero."""
    for name in VARIANTS:
        model = OpenMythos(plain.cfg)
        VARIANTS[name](model)
        groups = build_optimizer(model, OptimConfig()).param_groups
        decayed = {n for g in groups if g["weight_decay"] for n in g["param_names"]}
        new = model.state_dict().keys() - plain.state_dict().keys()
        for key in decayed & new:
            assert not model.state_dict()[key].any(), (name, key)


def records(recorded, *, ahead=0.1, falls=0.05, beyond=0.0):
    """Every cell: the recipe is ``ahead`` of dense, falls with every loop, loses ``beyond``."""
    found = []
    for cell in text.cells("cpu"):
        noise = 0.002 * (cell.seed - 1)
        if cell.arm.startswith("dense"):
            larger = {"dense-2x-blocks": 1, "dense-4x-blocks": 2}.get(cell.arm, 0)
            bits = [2.0 - 0.1 * larger + noise]
        else:
            best = 2.0 - ahead + noise * (-1 if "gains" in cell.arm else 1)
            at = {1: 3 * falls, 2: 2 * falls, 3: falls, 4: 0, 6: beyond, 8: beyond, 16: beyond}
            bits = [best + at[loops] for loops in text.EVALUATED]
        size = {"dense-2x-blocks": 200, "dense-4x-blocks": 400}.get(cell.arm, 100)
        figures = {"bits": bits, "parameters": size, "training_flops": 1e12}
        found.append(recorded(cell, **figures))
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"ahead": 0.03}, HOLDS_IN_PART),
        ({"falls": 0.0}, HOLDS_IN_PART),
        ({"beyond": 0.05}, HOLDS_IN_PART),
        ({"ahead": -0.01}, DOES_NOT_HOLD),
    ],
)
def test_verdicts(recorded, changes, verdict):
    assert text.summarise(records(recorded, **changes)).verdict == verdict


def test_changes_and_plot(recorded, tmp_path):
    found = records(recorded)
    for record in found:
        if record.arm == "fixed":
            record.figures["bits"] = [bits - 0.02 for bits in record.figures["bits"]]
        if record.arm in ("poisson", "grown-wide"):
            record.figures["bits"] = [bits + 0.02 for bits in record.figures["bits"]]
    summary = text.summarise(found)
    assert "Trained and run at one loop, the model of width 64 needs 0.1500" in (summary.sentence)
    assert summary.sentence.endswith(
        "by more than one deviation: fixed (-0.0200) at width 64, none at width 128; "
        "that raise it: poisson (+0.0200), 2-loops (+0.1000) at width 64, grown (+0.0200) at "
        "width 128."
    )
    text.plot(summary, tmp_path / "text.png")
    assert (tmp_path / "text.png").stat().st_size > 10_000


def test_phi_of_the_records(recorded):
    # 0.1 bits for twice the parameters: at 4 loops the recipe is worth twice, 4 ** 0.5
    assert "4 loops have phi 0.50 [0.50" in text.summarise(records(recorded)).sentence


def test_quick_cell_runs(place):
    (cell,) = text.cells("quick")
    figures = text.run_cell(cell, place)
    assert len(figures["bits"]) == len(text.EVALUATED)
    assert all(0 < bits < 12 for bits in figures["bits"])
