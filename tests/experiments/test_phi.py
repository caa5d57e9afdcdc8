"""phi: the exponent of a law is found, alone and from several looped arms, with its interval."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.phi import Runs, phi


def law(once, recurrent, loops=1, value=0.46, spread=()):
    loss = 3.0 - 0.2 * math.log(once + loops**value * recurrent)
    return Runs([loss + by for by in spread or (0.0,)], recurrent, once, loops)


DENSE = [law(0, n) for n in (100.0, 200.0, 400.0)]


@pytest.mark.parametrize("value", [-0.5, 0.0, 0.46, 1.0])
def test_the_exponent_of_a_law(value):
    found = phi([*DENSE, law(0, 100, 4, value)])
    assert found.value == pytest.approx(value, abs=1e-6)
    assert (found.low, found.high) == pytest.approx((value, value), abs=1e-6)


def test_losses_that_approach_a_floor():
    def floored(recurrent, loops=1):
        return Runs([1.0 + (loops**0.46 * recurrent / 100) ** -1.3], recurrent, 0, loops)

    found = phi([*map(floored, (100.0, 200.0, 400.0)), floored(100, 2), floored(100, 4)])
    assert found.value == pytest.approx(0.46, abs=1e-6)


def test_several_looped_arms_with_layers_around_the_loop():
    found = phi([*DENSE, law(0, 100, 2), law(0, 100, 4), law(100, 100, 4)])
    assert found.value == pytest.approx(0.46, abs=1e-6)


def test_arms_that_disagree_are_weighed_by_least_squares():
    found = phi([*DENSE, law(0, 100, 4, 0.4), law(0, 100, 4, 0.5)])
    assert 0.44 < found.value < 0.46


def test_seeds_that_differ_widen_the_interval():
    arms = [law(0, n, spread=(0, by)) for n, by in ((100.0, 0.01), (200.0, -0.01), (400.0, 0.01))]
    found = phi([*arms, law(0, 100, 4, spread=(0, -0.01))])
    assert found.low < 0.45 < 0.47 < found.high


def test_the_interval_covers_the_truth_with_two_seeds(monkeypatch):
    monkeypatch.setattr("experiments.phi.RESAMPLES", 100)
    rng = np.random.default_rng(0)
    arms = [*DENSE, law(0, 100, 2), law(0, 100, 4), law(100, 100, 4)]
    hits = 0
    for _ in range(40):
        noisy = [
            Runs(list(arm.losses[0] + rng.normal(0, 0.004, 2)), arm.recurrent, arm.once, arm.loops)
            for arm in arms
        ]
        found = phi(noisy)
        hits += found.low <= 0.46 <= found.high
    assert hits >= 34


def test_larger_models_that_are_not_better_determine_nothing():
    flat = [Runs([1.0, 1.1], n) for n in (100.0, 200.0, 400.0)]
    assert str(phi([*flat, Runs([1.0], 100, loops=4)])) == "not determined"


def test_what_a_seed_adds_to_every_arm_moves_nothing():
    arms = [*DENSE, law(0, 100, 2), law(0, 100, 4)]
    seeds = (3, 2, 1, 1, 2)
    moved = [
        Runs([arm.losses[0] + 0.1 * j for j in range(n)], arm.recurrent, arm.once, arm.loops)
        for arm, n in zip(arms, seeds, strict=True)
    ]
    found = phi(moved)
    assert found.value == pytest.approx(0.46, abs=1e-6)
    assert found.high - found.low < 1e-3
