"""C11b: arms differ as they say, words of every length are asked, the verdict follows."""

from __future__ import annotations

import pytest

from experiments import c11b_state_tracking as c11b
from experiments.c11b_state_tracking import LENGTHS, LOOPED, LOOPS, RIVALS, right
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, Record
from open_mythos.train import RunConfig

CELLS = c11b.cells("cpu")


def test_quick_cells_run(place):
    looped, dense = (c11b.run_cell(cell, place) for cell in c11b.cells("quick"))
    assert [len(row) for row in looped["right"]] == [len(LOOPS)] * len(LENGTHS)
    assert [len(row) for row in dense["right"]] == [1] * len(LENGTHS)
    assert looped["training_flops"] > 2 * dense["training_flops"] > 0


def test_every_arm_is_a_run_of_its_own():
    runs = {cell.arm: cell.settings for cell in CELLS if cell.seed == 0}
    assert set(runs) == {LOOPED, *RIVALS}
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    for arm, settings in runs.items():
        run = RunConfig.from_dict(settings["run"])
        assert run.architecture == ("looped" if arm == LOOPED else "dense")
        assert settings["pair_from"] == round(0.6 * run.train.steps)


def records(looped: float, dense: float, known: float = 1.0) -> list[Record]:
    """Return records that answer words of twice the length as given."""
    found = []
    for cell in CELLS:
        ours = cell.arm == LOOPED
        share = looped if ours else dense
        rows = [[known if n == LENGTHS[0] else share] * (len(LOOPS) if ours else 1)
                for n in LENGTHS]  # fmt: skip
        figures = {"right": rows, "parameters": 7, "training_flops": 1e9}
        found.append(
            Record("c11b", "cpu", cell.arm, cell.seed, cell.settings, figures, 1.0, "", "", "")
        )
    return found


@pytest.mark.parametrize(
    ("looped", "dense", "known", "expected"),
    [
        (0.96, 0.2, 1.0, HOLDS), (0.94, 0.2, 1.0, HOLDS_IN_PART), (0.96, 0.97, 1.0, DOES_NOT_HOLD),
        (0.4, 0.2, 1.0, DOES_NOT_HOLD), (0.96, 0.2, 0.5, "unclear"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_pass_mark(looped, dense, known, expected, tmp_path):
    summary = c11b.summarise(records(looped, dense, known))
    assert summary.verdict.startswith(expected)
    c11b.plot(summary, tmp_path / "c11b.png")
    assert (tmp_path / "c11b.png").stat().st_size > 1000


def test_a_metric_reads_its_length_and_its_loops():
    (record, *_) = records(0.5, 0.1)
    record.figures["right"][2][LOOPS.index(10)] = 0.75
    assert right(LENGTHS[2], 10)(record) == 0.75
    assert right(LENGTHS[2], 24)(record) == 0.5
