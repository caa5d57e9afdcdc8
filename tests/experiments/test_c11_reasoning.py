"""C11: answers by depth, the gate, the verdict by the mark."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from experiments import c11_reasoning as c11
from experiments.c11_reasoning.sudoku_recipe import answers, recipe, untrained
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from experiments.tasks.sudoku import Sudoku

TASK = Sudoku(pool=4)


def test_the_embedding_starts_as_a_sum():
    model = untrained(recipe(quick=True), TASK)
    of_cell_NnD = model.embedding.weight.detach().unflatten(0, (36, 7))
    digits = of_cell_NnD - of_cell_NnD[:, :1]
    assert torch.allclose(digits, digits[:1].expand_as(digits), atol=1e-6)
    box = of_cell_NnD[[0, 1, 6, 7], 0]  # two rows and two columns of one box
    assert torch.allclose(box[0] - box[1], box[2] - box[3], atol=1e-6)
    other = of_cell_NnD[[0, 3, 6, 9], 0]  # the columns 0 and 3 are in different boxes, alike
    assert torch.allclose(other[0] - other[1], other[2] - other[3], atol=1e-6)


def test_answers_at_each_depth_are_those_of_single_calls():
    model = untrained(recipe(quick=True), TASK).eval()
    with torch.no_grad():
        for block in model.recurrent.blocks:
            block.attn.out_proj.weight.normal_(std=0.3)
    clues = TASK.puzzles[0]
    found = answers(model, clues, [1, 3, 5], TASK, rows=3)
    assert found.loops == [1, 3, 5]
    ids = TASK.tokens(clues)
    for loops, boards in zip(found.loops, found.boards, strict=True):
        assert (TASK.boards(ids, model(ids, loops).detach()) == boards).all()
    assert not (found.boards[0] == found.boards[2]).all()


def test_shares_of_puzzles_and_cells():
    questions = TASK.questions(80)
    half = np.where(np.arange(80)[:, None] % 2, questions.solution, 1)
    found = c11.sudoku_recipe.Answers([1, 2], [half, questions.solution])
    level = c11.LEVELS[1]
    odd = (questions.level(level) % 2).mean()
    assert found.solved(questions, level) == [odd, 1.0]
    assert odd < found.cells(questions, level)[0] < 1


def figures(cell, deep, dense, equal, easy):
    levels = {level: [easy if level == c11.LEVELS[0] else deep] * len(c11.LOOPS)
              for level in c11.LEVELS}  # fmt: skip
    if cell.arm.startswith("dense"):
        share = equal if cell.arm in c11.EQUAL else dense
        levels = {level: [share] for level in c11.LEVELS}
    exits = {"by_level": dict.fromkeys(c11.LEVELS, 9.5), "loops": 9.5, "solved": 0.9,
             "solved_full": 0.91, "seconds": 1.0, "seconds_full": 2.0}  # fmt: skip
    return {"solved": levels, "cells": [0.5], "parameters": 9, "training_flops": 1e12,
            "asked": dict.fromkeys(c11.LEVELS, 5), "exits": exits}  # fmt: skip


@pytest.mark.parametrize(
    ("deep", "dense", "equal", "easy", "verdict"),
    [
        (0.9, 0.5, 0.1, 1.0, HOLDS),
        (0.9, 0.8, 0.1, 1.0, HOLDS_IN_PART),
        (0.2, 0.1, 0.1, 1.0, DOES_NOT_HOLD),
        (0.0, 0.0, 0.0, 0.2, UNCLEAR),
    ],
)
def test_verdicts(recorded, deep, dense, equal, easy, verdict):
    found = [recorded(c, **figures(c, deep, dense, equal, easy)) for c in c11.cells("cpu")]
    assert c11.summarise(found).verdict.startswith(verdict)


def test_figures_and_plot(recorded, tmp_path):
    found = [recorded(c, **figures(c, 0.9, 0.5, 0.1, 1.0)) for c in c11.cells("cpu")]
    summary = c11.summarise(found)
    assert "the best of all (dense-16-blocks) 50.0%" in summary.sentence
    assert "in 50% of the time" in summary.sentence
    c11.plot(summary, tmp_path / "c11.png")
    assert (tmp_path / "c11.png").stat().st_size > 10_000


def test_quick_cells_run(place):
    looped, dense = (c11.run_cell(cell, place) for cell in c11.cells("quick"))
    assert len(looped["solved"][c11.HARDEST]) == len(c11.LOOPS)
    assert len(dense["solved"][c11.HARDEST]) == 1
    assert abs(looped["parameters"] - dense["parameters"]) < 0.02 * dense["parameters"]
    assert 1 <= looped["exits"]["loops"] <= c11.CHOSEN_LOOPS
