"""Paths of every kind, made to measure; and a model that has several."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import random_ids, small_model

from open_mythos.dynamics import KINDS, Trajectory, classify, run_trajectory
from open_mythos.errors import ConfigError

LENGTH, WIDTH = 96, 24


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


BASE = noise(WIDTH, seed=1)
ASIDE = noise(WIDTH, seed=2)
UP = noise(WIDTH, seed=3)
TIME = torch.arange(LENGTH, dtype=torch.float32).unsqueeze(1)


def turn(period: float) -> torch.Tensor:
    """A circle in two directions, ``period`` loops a round."""
    angle = 2 * math.pi * TIME / period
    return angle.cos() * ASIDE + angle.sin() * UP


PATHS = {
    "converged": BASE + 0.5**TIME * ASIDE,
    "cyclic": BASE + turn(5),
    "converging": BASE + 0.97**TIME * ASIDE,
    "diverging": 1.05**TIME * BASE,
    "drifting": BASE + 0.02 * TIME * ASIDE,
    "wandering": BASE + noise(LENGTH, WIDTH, seed=4).cumsum(0),
}


def judge(path: torch.Tensor, **options):
    return classify(Trajectory(path[:, None, None]), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    assert judge(PATHS[kind]).names() == [[kind]]


@pytest.mark.parametrize("period", [2, 3, 7, 24])
def test_periods(period):
    found = judge(BASE + turn(period))
    assert (found.names(), found.period.item()) == ([["cyclic"]], period)


def test_a_period_needs_two_rounds_in_the_tail():
    assert judge(BASE + turn(25)).period.item() == 0  # tail 48
    assert judge(BASE + turn(25), tail=50).period.item() == 25
    assert judge(BASE + turn(7), max_period=6).period.item() == 0


def test_the_tolerance_decides():
    """A circle of a hundredth of the state's norm is rest or motion, as one likes."""
    path = BASE + 0.005 * turn(4)
    assert judge(path).names() == [["converged"]]
    strict = judge(path, tolerance=1e-4)
    assert (strict.names(), strict.period.item()) == ([["cyclic"]], 4)
    noisy = PATHS["cyclic"] + 0.01 * noise(LENGTH, WIDTH, seed=5)
    assert judge(noisy, tolerance=1e-3).period.item() == 0
    assert judge(noisy, tolerance=0.05).period.item() == 5


def test_scale_does_not_matter():
    for kind, path in PATHS.items():
        assert judge(1000 * path).names() == [[kind]]


def test_a_swing_that_dies_away_is_no_cycle():
    assert judge(BASE + (-0.96) ** TIME * ASIDE).names() == [["converging"]]


def test_a_drift_with_a_wobble_is_a_drift():
    assert judge(BASE + 0.2 * TIME * ASIDE + 0.3 * turn(6)).names() == [["drifting"]]


def test_a_random_walk_is_as_straight_as_promised():
    walks = 10 + noise(48, 64, 200).cumsum(0)
    found = classify(Trajectory(walks[:, None]), tail=48)
    assert found.straightness.mean().item() == pytest.approx(0.6, abs=0.05)
    assert set(found.names()[0]) == {"wandering"}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_diverges(value):
    path = PATHS["converged"].clone()
    path[80:] = value
    found = judge(path)
    assert found.names() == [["diverging"]]
    assert (found.period.item(), found.growth.item()) == (0, torch.inf)


def test_the_origin_is_a_resting_place():
    assert judge(torch.zeros(LENGTH, WIDTH)).names() == [["converged"]]


def test_tokens_are_judged_one_by_one():
    states = torch.stack(list(PATHS.values()), dim=1)[:, None]
    found = classify(Trajectory(states))
    assert found.names() == [list(PATHS)]
    assert found.counts() == dict.fromkeys(KINDS, 1)


def test_a_model(contracting_model):
    ids = random_ids(3, 6)
    rests = classify(run_trajectory(contracting_model("gqa"), ids, 64))
    assert rests.counts()["converged"] == 18
    restless = small_model("gqa", seed=1)
    with torch.no_grad():
        for block in restless.recurrent.blocks:
            block.attn.out_proj.weight.mul_(6)
            block.ffn.down.mul_(6)
    counts = classify(run_trajectory(restless, ids, 128)).counts()
    assert counts["converged"] < 18


@pytest.mark.parametrize("tail", [7, LENGTH + 1])
def test_tails_that_are_none(tail):
    with pytest.raises(ConfigError, match="tail"):
        judge(PATHS["cyclic"], tail=tail)
