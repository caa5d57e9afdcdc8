"""R1: killed at any moment, a run goes on as if nothing had happened."""

from __future__ import annotations

import random
import signal
from collections import Counter

import pytest

from chaos import small_run
from chaos.injection_points import PHASES
from chaos.lifetimes import Story, random_kills, reference
from chaos.outcome_table import sizes

BEHIND = {"train": {"async_save": True}}
PER_STORY = 5
EQUAL = "losses, rates, norms, depths, batches, weights equal bit for bit"


@pytest.mark.goal("R1", "SIGKILL at a random moment")
@sizes(8, 50)
def test_at_random_moments(forks, data, straight, tmp_path, row, times):
    rng, deaths, number = random.Random(1), Counter(), 0
    while row.times < times:
        changes = BEHIND if number % 2 else None
        story = Story(forks, data, tmp_path / str(number), changes)
        kills, found = random_kills(story, rng, min(PER_STORY, times - row.times), straight)
        assert found == []
        row.count(kills)
        deaths += story.deaths
        number += 1
    assert sum(deaths.values()) == times
    places = ", ".join(f"{deaths[phase]} in {phase}" for phase in PHASES if deaths[phase])
    row.outcome = f"{EQUAL} ({places}; every second run saves behind the training)"


@pytest.mark.goal("R1", "SIGKILL in a named phase")
@sizes(1, 5)
@pytest.mark.parametrize("phase", PHASES[1:])
def test_in_each_phase(forks, data, straight, tmp_path, row, phase, times):
    """At moments spread over the whole run."""
    rng = random.Random(phase)
    for i in range(times):
        nth = int((i + rng.random()) / times * straight.moments[phase])
        story = Story(forks, data, tmp_path / str(i), BEHIND if i % 2 else None)
        end = story.life({"phase": phase, "nth": nth, "signals": [signal.SIGKILL]})
        assert end.code == -signal.SIGKILL
        assert story.finish(straight) == []
        assert story.deaths == {phase: 1}
        row.count()
    row.outcome = f"{phase}: {EQUAL}"


@pytest.mark.goal("R1", "every life killed, one step after the other")
def test_one_checkpoint_per_process(forks, data, straight, tmp_path, row):
    """A run that dies after each of its saves gets to its end."""
    story = Story(forks, data, tmp_path / "run")
    per_save = straight.moments["save"] * small_run.SAVE_EVERY // small_run.STEPS
    for _ in range(small_run.STEPS // small_run.SAVE_EVERY - 1):
        # in the second save of this life: the first one stands
        moment = {"phase": "save", "nth": per_save + per_save // 2, "signals": [signal.SIGKILL]}
        assert story.life(moment).code == -signal.SIGKILL
        row.count()
    assert story.finish(straight) == []
    row.outcome = EQUAL


@pytest.mark.goal("R4", "a run that saves behind the training, beside one that does not")
def test_async_saving_changes_nothing(forks, data, straight, tmp_path, row):
    """Not even a byte of its checkpoints, but for the field that says so."""
    behind = reference(forks, data, tmp_path, BEHIND)
    assert behind.journal == straight.journal
    assert behind.end == straight.end
    names = ("model.safetensors", "optimizer.safetensors", "config.json", "average.safetensors")
    for path in sorted((straight.out / "checkpoints").iterdir()):
        for name in names:
            twin = behind.out / "checkpoints" / path.name / name
            assert twin.read_bytes() == (path / name).read_bytes()
    row.outcome = "weights, moments, averages and checkpoints equal byte for byte"
