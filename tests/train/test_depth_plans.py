"""Depth plans: pure, unbiased, capped."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.errors import ConfigError
from open_mythos.train import DepthConfig, DepthPlan
from open_mythos.train.config import DEPTH_PLAN_NAMES

N = 20_000


def draw(seed=0, step=3, n=N, **fields):
    return DepthPlan(DepthConfig(**fields), seed).depths(step, range(n)).double()


def assert_moments(x, mean, variance):
    """Within four standard errors; the kurtosis of these distributions is below 15."""
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / len(x))
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(14 / len(x))


def test_fixed():
    assert set(draw(plan="fixed", mean=7.0, n=50).tolist()) == {7}


def test_uniform_covers_its_range_evenly():
    x = draw(plan="uniform", low=3, high=7)
    assert sorted(set(x.tolist())) == [3, 4, 5, 6, 7]
    assert_moments(x, 5, 2)


def test_poisson():
    # zero becomes one: the mean grows by P(0), the second moment too
    p0 = math.exp(-4)
    mean = 4 + p0
    assert_moments(draw(plan="poisson", mean=4.0), mean, 4 + 16 + p0 - mean**2)


def test_poisson_is_at_least_one():
    x = draw(plan="poisson", mean=1.0)
    assert x.min() == 1
    assert abs((x == 1).double().mean() - 2 * math.exp(-1)) < 0.02


def test_lognormal_poisson():
    # mean m + 1; variance m + m^2 (exp(sigma^2) - 1)
    x = draw(plan="lognormal_poisson", mean=8.0, sigma=0.5)
    assert x.min() >= 1
    assert_moments(x, 9, 8 + 64 * (math.exp(0.25) - 1))


def test_lognormal_poisson_without_spread_is_poisson_plus_one():
    assert_moments(draw(plan="lognormal_poisson", mean=5.0, sigma=0.0), 6, 5)


def test_mixed():
    # 3 in 4 at 6; 1 in 4 uniform in 1 .. 12, of mean 6.5 and variance 143 / 12
    x = draw(plan="mixed", mean=6.0)
    assert (x.min(), x.max()) == (1, 12)
    assert_moments(x, 6 + 0.125, 0.25 * (143 / 12 + 0.25) - 0.125**2)
    assert abs((x == 6).double().mean() - (0.75 + 0.25 / 12)) < 0.02
    assert DepthConfig(plan="mixed", mean=6.0).expected == 6.125


def test_mixed_without_a_share_is_fixed():
    assert (draw(plan="mixed", mean=6.0, mixed_share=0.0, n=100) == 6).all()


def test_a_curriculum_of_mixed_grows_its_range():
    x = draw(plan="mixed", mean=9.0, mixed_share=1.0, curriculum_steps=8, step=2, n=1000)  # mean 3
    assert (x.min(), x.max()) == (1, 6)


@pytest.mark.parametrize("plan", DEPTH_PLAN_NAMES)
def test_max_loops(plan):
    free, capped = draw(plan=plan, mean=4.0, n=300), draw(plan=plan, mean=4.0, n=300, max_loops=3)
    assert torch.equal(capped, free.clamp(max=3))
    assert free.max() > 3


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(DEPTH_PLAN_NAMES), st.integers(0, 2**40), st.integers(0, 10**6), st.data())
def test_does_not_depend_on_the_batch(plan, seed, step, data):
    samples = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=8))
    depth = DepthPlan(DepthConfig(plan=plan, mean=6.0), seed)
    together = depth.depths(step, torch.tensor(samples))
    assert together.dtype == torch.int64
    assert together.shape == (len(samples),)
    assert (together >= 1).all()
    assert together.tolist() == [depth.depths(step, [sample]).item() for sample in samples]


@pytest.mark.parametrize("plan", ["uniform", "poisson", "lognormal_poisson", "mixed"])
def test_seed_step_and_sample_all_matter(plan):
    base = draw(plan=plan, mean=8.0, n=200)
    assert not torch.equal(base, draw(plan=plan, mean=8.0, n=200, seed=1))
    assert not torch.equal(base, draw(plan=plan, mean=8.0, n=200, step=4))
    assert len(set(base.tolist())) > 3
    assert torch.equal(base, draw(plan=plan, mean=8.0, n=200))


def test_curriculum_grows_linearly_then_stays():
    plan = DepthPlan(DepthConfig(mean=9.0, curriculum_start=1.0, curriculum_steps=4), 0)
    assert [plan.mean_at(step) for step in (0, 1, 2, 3, 4, 5, 100)] == [1, 3, 5, 7, 9, 9, 9]


def test_curriculum_reaches_the_draws():
    fields = {"plan": "poisson", "mean": 12.0, "curriculum_start": 2.0, "curriculum_steps": 10}
    assert abs(draw(step=5, n=4000, **fields).mean() - 7) < 0.25
    assert torch.equal(draw(step=50, n=200, **fields), draw(step=50, n=200, mean=12.0))


def long_steps(share, loops=32, n=4000):
    plan = DepthPlan(DepthConfig(plan="fixed", mean=3.0, long_share=share, long_loops=loops), 0)
    return torch.tensor([plan.further_loops(step) for step in range(n)]).double()


def test_long_steps_come_as_often_as_asked():
    further = long_steps(0.3)
    assert abs((further > 0).double().mean() - 0.3) < 0.03
    assert not long_steps(0.0).any()
    assert long_steps(1.0).all()


def test_further_loops_are_log_uniform():
    further = long_steps(1.0)
    assert further.min() == 1
    assert further.max() == 32
    assert abs(further.log2().mean() - 2.5) < 0.15  # half of log2(32); rounding adds a little
    assert abs((further <= 5.5).double().mean() - math.log(5.5) / math.log(32)) < 0.03


def test_the_mean_of_further_loops_is_the_one_that_is_counted():
    for share, loops in ((0.3, 32), (1.0, 8), (0.5, 1), (0.0, 32)):
        counted = DepthConfig(long_share=share, long_loops=loops).expected_further
        assert abs(long_steps(share, loops, n=20_000).mean() - counted) < 0.1


def test_all_sequences_of_a_long_step_run_further():
    config = DepthConfig(plan="uniform", low=2, high=9, long_share=1.0)
    plan = DepthPlan(config, 0)
    for step in range(5):
        longer = draw(step=step, n=50, plan="uniform", low=2, high=9) + plan.further_loops(step)
        assert torch.equal(plan.depths(step, range(50)).double(), longer)


def test_changing_the_config_later_changes_nothing():
    config = DepthConfig(plan="fixed", mean=3.0)
    plan = DepthPlan(config, 0)
    config.mean = 9.0
    assert plan.depths(0, [0]).item() == 3


def test_invalid_config_is_refused():
    with pytest.raises(ConfigError):
        DepthPlan(DepthConfig(plan="none"), 0)


def test_a_curriculum_of_either_shape_ends_at_the_mean():
    """ "sqrt" is 1 - sqrt(1 - s): below the straight line between the same ends."""
    fields = {"plan": "poisson", "mean": 9.0, "curriculum_steps": 100}
    straight, curved = (
        DepthPlan(DepthConfig(**fields, curriculum_shape=shape), 0) for shape in ("linear", "sqrt")
    )
    for plan in (straight, curved):
        assert (plan.mean_at(0), plan.mean_at(100), plan.mean_at(500)) == (1.0, 9.0, 9.0)
    assert straight.mean_at(75) == 7.0
    assert curved.mean_at(75) == 5.0
