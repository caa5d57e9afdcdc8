"""C11, C11c and C11d: answers by depth, the gate, the verdict by the mark."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import c11_reasoning as c11
from experiments import c11c_larger_boards as c11c
from experiments import c11d_mazes as c11d
from experiments.c11_reasoning.sudoku_recipe import recipe, untrained
from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, UNCLEAR
from experiments.tasks.puzzle import Answers, answers
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
    ids = TASK.tokens(TASK.puzzles[0])
    found = answers(model, ids, [1, 3, 5], TASK, rows=3)
    assert found.loops == [1, 3, 5]
    for loops, digits in zip(found.loops, found.tokens, strict=True):
        assert torch.equal(model(ids, loops).detach()[..., 1:7].argmax(-1) + 1, digits)
    assert not torch.equal(found.tokens[0], found.tokens[2])


def test_shares_of_puzzles_and_cells():
    questions = TASK.questions(80)
    half = torch.where(torch.arange(80)[:, None] % 2 > 0, questions.targets, 1)
    found = Answers([1, 2], [half, questions.targets])
    level = c11.LEVELS[1]
    odd = (questions.level(level) % 2).mean()
    assert found.solved(questions, level) == [odd, 1.0]
    assert odd < found.cells(questions, level)[0] < 1
    assert found.right(questions, 1).tolist() == [False, True] * 40


def test_the_example_is_the_hardest_that_only_more_loops_solve():
    rounds, guesses = np.arange(80), np.arange(80) == 0
    questions = replace(TASK.questions(80), rounds=rounds, guesses=guesses.astype(int))
    late = (rounds > 3) & (rounds < 60)
    early = late & (rounds > 50)
    tokens = [torch.where(torch.from_numpy(right)[:, None], questions.targets, 0)
              for right in (early, late)]  # fmt: skip
    assert Answers([4, 8], tokens).example(questions, 4, 8) == {
        "ids": questions.ids[50].tolist(), "targets": questions.targets[50].tolist(),
        "tokens": [each[50].tolist() for each in tokens],
    }  # fmt: skip
    never = Answers([4, 8], [tokens[0]] * 2).example(questions, 4, 8)
    assert never["ids"] == questions.ids[0].tolist()  # it needs a guess


@pytest.fixture(params=[c11, c11c, c11d], ids=["c11", "c11c", "c11d"])
def claim(request):
    return request.param


def test_every_claim_has_its_arms():
    for cell in c11c.cells("cpu"):
        steps = cell.settings["run"]["train"]["steps"]
        assert cell.settings["task"]["easy_steps"] / steps == c11c.EASY_STEPS / c11c.STEPS
    assert {len(c.equal) for c in (c11.PUZZLES, c11c.PUZZLES, c11d.PUZZLES)} == {4}
    assert not any("all-mazes" in arm for arm in c11d.PUZZLES.rivals)
    depth = c11c.recipe().depth
    assert (depth.mean, depth.mixed_share) == (c11c.MEAN_LOOPS, 1)


def figures(cell, deep, dense, equal, easy, puzzles):
    levels = {level: [easy if level == puzzles.levels[0] else deep] * len(puzzles.loops)
              for level in puzzles.asked_levels}  # fmt: skip
    if puzzles.arms[cell.arm].get("dense"):
        share = equal if cell.arm in puzzles.equal else dense
        levels = {level: [share] for level in puzzles.asked_levels}
    exits = {"by_level": dict.fromkeys(puzzles.asked_levels, 9.5), "loops": 9.5, "solved": 0.9,
             "solved_full": 0.91, "seconds": 1.0, "seconds_full": 2.0}  # fmt: skip
    example = {"ids": [6] * 81, "targets": [1] * 81, "tokens": [[0] * 81] * len(puzzles.loops)}
    return {"solved": levels, "cells": [0.5], "parameters": 9, "training_flops": 1e12,
            "asked": dict.fromkeys(puzzles.asked_levels, 5), "exits": exits,
            "example": example}  # fmt: skip


def summary(claim, recorded, *shares):
    cells = claim.cells("cpu")
    return claim.summarise([recorded(c, **figures(c, *shares, claim.PUZZLES)) for c in cells])


@pytest.mark.parametrize(
    ("deep", "dense", "equal", "easy", "verdict"),
    [
        (0.9, 0.5, 0.1, 1.0, HOLDS),
        (0.9, 0.8, 0.1, 1.0, HOLDS_IN_PART),
        (0.2, 0.1, 0.1, 1.0, DOES_NOT_HOLD),
        (0.0, 0.0, 0.0, 0.2, UNCLEAR),
    ],
)
def test_verdicts(claim, recorded, deep, dense, equal, easy, verdict):
    assert summary(claim, recorded, deep, dense, equal, easy).verdict.startswith(verdict)


def test_figures_and_plot(claim, recorded, tmp_path):
    found = summary(claim, recorded, 0.9, 0.5, 0.1, 1.0)
    assert "the best of all (dense-16-blocks) 50.0%" in found.sentence
    assert "in 50% of the time" in found.sentence
    claim.plot(found, tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "claim",
    [
        pytest.param(c11, id="c11"),
        pytest.param(c11c, id="c11c", marks=pytest.mark.slow),
        pytest.param(c11d, id="c11d", marks=pytest.mark.slow),
    ],
)
def test_quick_cells_run(claim, place):
    looped, dense = (claim.run_cell(cell, place) for cell in claim.cells("quick"))
    hard = claim.PUZZLES.hard[0]
    assert len(looped["solved"][hard]) == len(claim.PUZZLES.loops)
    assert len(dense["solved"][hard]) == 1
    assert abs(looped["parameters"] - dense["parameters"]) < 0.02 * dense["parameters"]
    assert 1 <= looped["exits"]["loops"] <= claim.CHOSEN_LOOPS
