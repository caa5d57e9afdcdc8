"""The spike detector: hardly ever a false alarm, real spikes at once, exact over a resume."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from open_mythos.train.monitoring.spikes import SpikeDetector

RECORDED = Path(__file__).parents[3] / "docs" / "demo" / "results.json"
STEPS = 10_000


def falling(rng: np.random.Generator) -> np.ndarray:
    """A loss that falls fast, then slowly, as a power of the step."""
    step = np.arange(STEPS)
    return 2.0 + 5.0 * np.exp(-step / 300) + 2.0 * (step + 10.0) ** -0.3


def autocorrelated(rng: np.random.Generator) -> np.ndarray:
    shocks = rng.standard_t(3, STEPS)
    noise = np.zeros(STEPS)
    for i in range(1, STEPS):
        noise[i] = 0.5 * noise[i - 1] + shocks[i]
    return falling(rng) + 0.04 * noise


HEALTHY = {
    "heavy tails": lambda rng: falling(rng) + 0.05 * rng.standard_t(3, STEPS),
    "infinite variance": lambda rng: falling(rng) + 0.03 * rng.standard_t(2, STEPS),
    "skewed": lambda rng: falling(rng) + 0.05 * np.exp(rng.standard_normal(STEPS)),
    "proportional": lambda rng: falling(rng) * np.exp(0.03 * rng.standard_t(3, STEPS)),
    "autocorrelated": autocorrelated,
    "some steps run further loops": lambda rng: (
        falling(rng) + 0.02 * rng.standard_normal(STEPS) + 0.6 * (rng.random(STEPS) < 0.12)
    ),
    "slow swings": lambda rng: (
        falling(rng) + 0.3 * np.sin(np.arange(STEPS) / 400) + 0.05 * rng.standard_t(3, STEPS)
    ),
    "solved": lambda rng: 0.02 + 0.01 * np.abs(rng.standard_t(2, STEPS)),
    "constant": lambda rng: np.full(STEPS, 3.0),
}


def spikes(losses, **options) -> list[int]:
    """Steps at which the detector says so."""
    detector = SpikeDetector(**options)
    return [i for i, loss in enumerate(losses) if detector.observe(i, float(loss))]


@pytest.mark.parametrize("seeds", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", HEALTHY)
def test_at_most_one_false_alarm_in_ten_thousand_steps(kind, seeds):
    found = [spikes(HEALTHY[kind](np.random.default_rng(seed))) for seed in range(seeds)]
    assert sum(map(len, found)) <= seeds


def test_recorded_curves_have_no_spike():
    """The curves of the recorded demo; a curve has few points, so it follows itself."""
    recorded = json.loads(RECORDED.read_text())
    curves = [
        recorded[task][model]["loss"]
        for task in ("chains", "sudoku", "text") for model in ("looped", "dense")
    ]  # fmt: skip
    for losses in curves:
        assert len(losses) > 20
        assert spikes(losses, window=32) == []


@pytest.mark.parametrize("kind", ["heavy tails", "autocorrelated", "proportional"])
@pytest.mark.parametrize(("at", "height"), [(60, 3.0), (500, 1.5), (9000, 1.0)])
def test_a_spike_is_found_within_ten_steps(kind, at, height):
    """At 60 the loss still falls by five nats in 300 steps."""
    losses = HEALTHY[kind](np.random.default_rng(7))
    losses[at:] += height
    found = spikes(losses)
    assert at + 3 <= found[0] <= at + 9
    assert len(found) == 1, "the new level is reported once"


def test_a_single_bad_batch_is_none():
    losses = falling(np.random.default_rng(0))
    losses[::50] += 20.0
    assert spikes(losses) == []


def test_a_small_rise_is_none_however_quiet():
    losses = np.full(200, 1.0)
    losses[100:] = 1.09
    assert spikes(losses) == []
    losses[100:] = 1.11
    assert spikes(losses) == [103]


def test_the_verdict_says_what_it_rests_on():
    detector = SpikeDetector(window=16, patience=2)
    for step in range(16):
        assert detector.observe(step, 2.0) is None
    assert detector.observe(16, 5.0) is None
    spike = detector.observe(17, 6.0)
    assert spike is not None
    assert (spike.step, spike.loss, spike.center, spike.limit) == (17, 6.0, 2.0, 2.1)
    assert "6.0000" in str(spike)
    assert detector.state_dict() == {"losses": [], "high": 0}


def test_losses_that_are_not_finite_say_nothing():
    detector = SpikeDetector(window=16, patience=3)
    for step in range(16):
        detector.observe(step, 2.0)
    for loss in (5.0, math.nan, 5.0, math.inf, -math.inf):
        assert detector.observe(20, loss) is None
    assert detector.observe(21, 5.0) is not None


@pytest.mark.parametrize("cut", [0, 10, 40, 299, 301, 303, 350])
def test_resumed_equals_uninterrupted(cut):
    losses = HEALTHY["heavy tails"](np.random.default_rng(3))[:400]
    losses[300:] += 5.0
    whole, first, second = SpikeDetector(), SpikeDetector(), SpikeDetector()
    expected = [whole.observe(i, float(x)) for i, x in enumerate(losses)]
    assert sum(each is not None for each in expected) == 1
    found = [first.observe(i, float(x)) for i, x in enumerate(losses[:cut])]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    found += [second.observe(i, float(x)) for i, x in enumerate(losses[cut:], start=cut)]
    assert found == expected
    assert second.state_dict() == whole.state_dict()
