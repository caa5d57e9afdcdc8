"""Learning rates: shapes, ends, never zero."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.train import OptimConfig, TrainConfig, learning_rate
from open_mythos.train.config import DECAY_SHAPES, SCHEDULE_NAMES


def rates(**fields):
    train = TrainConfig(**fields)
    train.validate()
    return [learning_rate(step, train, OptimConfig(lr=2.0)) for step in range(train.steps)]


def test_warm_up_rises_linearly_to_the_full_rate():
    lr = rates(steps=20, warmup_steps=4, schedule="constant")
    assert lr[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine():
    lr = rates(steps=110, warmup_steps=10, schedule="cosine", min_lr_ratio=0.1)
    assert lr[10] == 2.0
    assert lr[60] == pytest.approx(2.0 * 0.55)  # half-way: the mean of 1 and 0.1
    assert lr[35] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert 0.2 < lr[-1] < 0.2005
    assert lr[10:] == sorted(lr[10:], reverse=True)


def test_wsd_is_stable_then_linear():
    fields = {"steps": 30, "warmup_steps": 5, "schedule": "wsd", "decay_steps": 10}
    lr = rates(**fields, min_lr_ratio=0.0)
    assert lr[5:21] == [2.0] * 16
    assert lr[25] == pytest.approx(1.0)
    assert lr[29] == pytest.approx(0.2)


def test_wsd_square_root():
    lr = rates(
        steps=20, warmup_steps=0, schedule="wsd", decay_steps=16, decay_shape="sqrt",
        min_lr_ratio=0.5,
    )  # fmt: skip
    assert lr[8] == pytest.approx(2.0 * (0.5 + 0.5 * (1 - math.sqrt(4 / 16))))


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(2, 200),
    warm=st.floats(0, 1),
    schedule=st.sampled_from(SCHEDULE_NAMES),
    shape=st.sampled_from(DECAY_SHAPES),
    floor=st.floats(0, 1),
)
def test_every_step_moves_the_weights(steps, warm, schedule, shape, floor):
    warmup = int(warm * (steps - 1))
    lr = rates(
        steps=steps, warmup_steps=warmup, schedule=schedule, decay_steps=steps - warmup,
        decay_shape=shape, min_lr_ratio=floor,
    )  # fmt: skip
    assert all(0 < rate <= 2.0 for rate in lr)
    assert max(lr) == pytest.approx(2.0)


def test_beyond_the_end_the_rate_stays_at_its_floor():
    for schedule in ("cosine", "wsd"):
        train = TrainConfig(steps=300, schedule=schedule, min_lr_ratio=0.25)
        assert learning_rate(10_000, train, OptimConfig(lr=1.0)) == pytest.approx(0.25)
