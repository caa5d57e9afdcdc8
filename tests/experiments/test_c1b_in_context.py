"""C1b: questions come from rows of their own, and the verdict follows the mark."""

from __future__ import annotations

import pytest

from experiments import c1b_in_context as c1b
from experiments.c1b_in_context import ASKED_HOPS, LOOPED, SINGLE, TASK, questions
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from open_mythos.train import RunConfig

CELLS = c1b.cells("cpu")


@pytest.mark.parametrize("cell", c1b.cells("quick"), ids=lambda cell: cell.arm)
def test_a_quick_cell_runs(cell, place):
    figures = c1b.run_cell(cell, place)
    depths = 9 if cell.arm == LOOPED else 1
    assert [len(row) for row in figures["grid"]] == [depths] * 7
    assert [step for step, _ in figures["curve"]] == [2, 4]


def test_questions_are_not_training_rows():
    ids_BT, answers_B = questions(ASKED_HOPS, 64)
    trained = TASK.batch(0, global_batch=64, hops=ASKED_HOPS).input_ids
    assert not {tuple(row) for row in ids_BT.tolist()} & {tuple(row) for row in trained.tolist()}
    # six of eight facts on, a chain is back at none of what it has passed
    assert (answers_B != ids_BT[:, TASK.stated]).all()


def test_settings_describe_runs():
    assert len({cell.name for cell in CELLS}) == len(CELLS) == 10
    for cell in CELLS:
        run = RunConfig.from_dict(cell.settings["run"])
        assert run.model.vocab_size == TASK.vocab_size


def results(recorded, *, trained=1.0, deep=0.95, dense=0.2):
    """Records as if every cell had run."""
    found = []
    for cell in CELLS:
        ask = cell.settings["ask"]
        looped = cell.arm in (LOOPED, SINGLE)
        last = [0.1 if n < 6 else deep for n in ask["loops"]] if looped else [dense]
        grid = [[trained] * len(last) if hops <= 3 else last for hops in ask["hops"]]
        found.append(recorded(cell, grid=grid, curve=[[50, 1.0]], parameters=9))
    return found


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, HOLDS),
        ({"deep": 0.6}, HOLDS_IN_PART),
        ({"dense": 0.6}, HOLDS_IN_PART),
        ({"deep": 0.3}, DOES_NOT_HOLD),
        ({"trained": 0.5}, UNCLEAR),
    ],
)
def test_the_verdict_follows_the_pass_mark(recorded, changes, verdict):
    assert c1b.summarise(results(recorded, **changes)).verdict.startswith(verdict)


def test_the_picture_and_the_table_show_every_arm(recorded, tmp_path):
    summary = c1b.summarise(results(recorded))
    assert "10.0% at 3 loops" in summary.sentence
    assert all(len(row) == len(summary.head) for row in summary.rows)
    c1b.plot(summary, tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 20_000
