"""The order of an epoch: a bijection that is a pure function of its arguments."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data import Permutation
from open_mythos.errors import ConfigError


@settings(deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
def test_it_is_a_bijection(n: int, seed: int, epoch: int) -> None:
    image = Permutation(n, seed, epoch)(np.arange(n))
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(n))


@given(index=st.lists(st.integers(0, 10**12 - 1), min_size=1, max_size=8, unique=True))
def test_it_needs_no_memory_and_each_image_stands_alone(index: list[int]) -> None:
    order = Permutation(10**12, seed=1, epoch=0)
    together = order(np.array(index))
    assert together.tolist() == [int(order(np.array([i]))[0]) for i in index]
    assert len(set(together.tolist())) == len(index)
    assert ((together >= 0) & (together < 10**12)).all()


def test_seeds_and_epochs_give_other_orders() -> None:
    places = np.arange(1000)
    orders = [Permutation(1000, s, e)(places) for s, e in [(0, 0), (0, 1), (1, 0)]]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert (orders[i] == orders[j]).mean() < 0.01
    assert (orders[0] == places).mean() < 0.01


def test_it_is_the_same_on_every_machine() -> None:
    assert Permutation(10, seed=0, epoch=0)(np.arange(10)).tolist() == [
        3,
        6,
        0,
        4,
        5,
        9,
        7,
        8,
        2,
        1,
    ]


def test_images_are_spread_evenly() -> None:
    # each of 4 places of 4 elements is hit about equally over 4,000 keys: chi-squared, 9 degrees
    hits = np.zeros((4, 4))
    for epoch in range(4000):
        hits[np.arange(4), Permutation(4, seed=3, epoch=epoch)(np.arange(4))] += 1
    assert ((hits - 1000) ** 2 / 1000).sum() < 40


def test_neighbours_are_parted() -> None:
    steps = np.abs(np.diff(Permutation(100_000, seed=0, epoch=0)(np.arange(100_000))))
    assert abs(steps.mean() / 100_000 - 1 / 3) < 0.01


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_a_permutation_of_nothing_is_rejected(n: object) -> None:
    with pytest.raises(ConfigError, match="n\n"):
        Permutation(n, 0, 0)
