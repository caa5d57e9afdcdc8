"""The harness catches what it is there to catch."""

from __future__ import annotations

import random

import pytest

from chaos import small_run
from chaos.lifetimes import Story


@pytest.mark.goal("control", "a trainer that is broken on purpose, killed once")
@pytest.mark.parametrize(
    ("control", "finding"),
    [
        ("resuming forgets the step", "step 0"),
        ("resuming forgets the moments", "grad_norm"),
        ("resuming moves one weight by one bit", "head.weight at the end"),
        ("depths come from one stream", "depths"),
    ],
)
def test_a_broken_resume_is_caught(forks, data, straight, tmp_path, row, control, finding):
    story = Story(forks, data, tmp_path / "run", control=control)
    story.life({"phase": "step", "nth": straight.moments["step"] // 2, "signals": [9]})
    found = story.finish(straight)
    assert any(finding in each for each in found), found
    row.outcome = f"{control}: caught"


@pytest.mark.goal("control", "a save that is broken on purpose, killed at random operations")
@pytest.mark.parametrize(
    ("control", "finding"),
    [
        ("a checkpoint is written in place", "has its name and is damaged"),
        ("old checkpoints go first", "a checkpoint existed, and none does"),
    ],
)
def test_a_broken_save_is_caught(forks, data, straight, tmp_path, row, control, finding):
    rng, found = random.Random(0), []
    for i in range(20):
        story = Story(forks, data, tmp_path / str(i), control=control)
        story.life({"phase": "refill", "nth": 2 * small_run.SAVE_EVERY + 1, "signals": [9]})
        assert small_run.has_checkpoint(story.out)
        nth = rng.randrange(straight.moments["save"] * small_run.SAVE_EVERY // small_run.STEPS)
        story.life({"phase": "save", "nth": nth, "signals": [9]})
        found += story.found
        row.count()
        if any(finding in each for each in found):
            break
    assert any(finding in each for each in found), found
    row.outcome = f"{control}: caught"
