"""C1: the arms train as they are called, answers are counted rightly, the verdict follows."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise

from experiments import c1_depth as c1
from experiments.c1_depth import ARMS, DENSE_RIVALS, LEARNABLE, LOOPED, asked, without_injection
from experiments.c1_depth.chain_recipe import TASK, accuracy_grid, chains, recipe
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART
from experiments.tasks import ChainLoader
from experiments.tasks.accuracy import answered
from open_mythos.train import RunConfig, build_model

CELLS = c1.cells("cpu")


@pytest.mark.parametrize("cell", c1.cells("quick"), ids=lambda cell: cell.arm)
def test_a_quick_cell_runs(cell, place):
    figures = c1.run_cell(cell, place)
    loops = 1 if cell.arm == "dense" else 2
    assert [len(row) for row in figures["grid"]] == [loops, loops]
    assert all(0 <= share <= 1 for row in figures["grid"] for share in row)
    assert len(figures["curve"]) == 5
    assert set(figures["rules"]) == (
        set() if cell.arm == "dense" else {*c1.cells("cpu")[0].settings["ask"]["rules"]}
    )
    assert figures["training_flops"] > 0


def test_arms_differ_from_the_recipe_in_what_they_say():
    runs = {cell.arm: cell.settings for cell in CELLS if cell.seed == 0}
    base = runs[LOOPED]
    assert set(runs) == set(ARMS)
    for arm, settings in runs.items():
        RunConfig.from_dict(settings["run"])
        assert (settings["run"] | settings == base["run"] | base) == (arm == LOOPED)
    assert runs["single-chains"]["pair_from"] is None
    assert base["pair_from"] == 192
    assert runs["dense-equal-flops"]["pair_from"] == 672
    assert runs[LEARNABLE]["hops"] == 10
    assert len({cell.name for cell in CELLS}) == len(CELLS)


def test_the_quick_recipe_is_the_recipe_made_small():
    whole, quick = recipe(3), recipe(3, quick=True)
    assert whole.depth == quick.depth
    assert whole.train.seed == quick.train.seed == 3
    assert chains(whole).state_dict()["pair_from"] == 192
    assert chains(quick).next_batch(4).input_ids.shape == (8, 12)


def test_questions_are_held_out_chains():
    ids_BT, answers_B = TASK.questions(6, 600)
    entity, relations = ids_BT[:, 0].numpy(), ids_BT[:, 1:].numpy() - TASK.entities
    assert TASK.is_held_out(entity, relations)[:, -1].all()
    assert answers_B.tolist() == TASK.answers(entity, relations)[:, -1].tolist()
    assert 30 < len(ids_BT) < 100


def test_one_pass_answers_as_separate_calls():
    model = randomise(build_model(recipe(quick=True)))
    ids_BT, answers_B = TASK.questions(4, 900)
    found = answered(model, ids_BT, answers_B, (1, 3, 7), rows=32)
    for loops, share in zip((1, 3, 7), found, strict=True):
        with torch.no_grad():
            right_B = model(ids_BT, n_loops=loops)[:, -1].argmax(-1) == answers_B
        assert share == pytest.approx(right_B.float().mean().item())
    assert len(set(found)) > 1
    assert accuracy_grid(model, [4], (1, 3, 7), 900) == [
        answered(model, ids_BT, answers_B, (1, 3, 7))
    ]


def test_final_answers_alone_are_labelled():
    plain, final = (
        ChainLoader(TASK, global_batch=64, hops=3, pair_from=1, final_only=only)
        for only in (False, True)
    )
    for step, ends in ((0, [3]), (1, [3, 7])):
        every, last = plain.next_batch(step), final.next_batch(step)
        assert torch.equal(every.input_ids, last.input_ids)
        assert torch.equal(every.targets[:, ends], last.targets[:, ends])
        assert (last.targets != -100).any(0).nonzero().flatten().tolist() == ends
    assert plain.state_dict() != final.state_dict()


def test_without_injection_the_input_enters_as_the_state_alone():
    config = recipe(quick=True)
    config.model.initial_state = "prelude"
    model = randomise(build_model(config))
    without_injection(model)
    injection = model.recurrent.injection
    e_BTD = torch.randn(1, 3, 32)
    assert not injection.drive(e_BTD).any()
    torch.testing.assert_close(injection.hold(e_BTD), e_BTD, rtol=5e-3, atol=0)
    assert not injection.B.requires_grad
    assert not injection.log_A.requires_grad


def results(recorded, *, chosen=0.99, shallow=0.06, many=0.99, dense=0.06):
    """Records as if every cell had run."""
    found = []
    for cell in CELLS:
        ask = cell.settings["ask"]
        if cell.settings["run"]["architecture"] == "dense":
            row = [dense if cell.arm in DENSE_RIVALS else 0.9]
        else:
            row = [shallow if n <= 10 else many if n > 24 else chosen for n in ask["loops"]]
        rules = {rule: [{"accuracy": 0.9, "loops": 19.0}] * 2 for rule in ask["rules"]}
        found.append(
            recorded(
                cell, grid=[row] * len(ask["hops"]), longest=row, rules=rules, curve=[[1, 2.0]],
                parameters=100, training_flops=1e12, tokens=10,
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"chosen": 0.9, "many": 0.9}, HOLDS_IN_PART),
        ({"shallow": 0.7}, HOLDS_IN_PART),
        ({"many": 0.9}, HOLDS_IN_PART),
        ({"chosen": 0.4}, DOES_NOT_HOLD),
        ({"dense": 0.3}, DOES_NOT_HOLD),
    ],
)
def test_the_verdict_follows_the_pass_mark(recorded, changes, verdict):
    assert c1.summarise(results(recorded, **changes)).verdict == verdict


def test_one_seed_below_the_mark_is_enough_to_fail(recorded):
    records = results(recorded)
    records[0].figures["longest"] = [share - 0.1 for share in records[0].figures["longest"]]
    assert asked(records[0], 24) < 0.95
    assert c1.summarise(records).verdict == HOLDS_IN_PART


def test_the_picture_and_the_table_show_every_arm(recorded, tmp_path):
    summary = c1.summarise(results(recorded))
    assert [row[0] for row in summary.rows] == list(ARMS)
    assert all(len(row) == len(summary.head) for row in summary.rows)
    c1.plot(summary, tmp_path / "c1.png")
    assert (tmp_path / "c1.png").stat().st_size > 20_000
