"""The counter-based generator: a function of its integers, and as random as it must be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from open_mythos.ops.random import counter_dropout, counter_normal, counter_uniform

KEYS = torch.tensor([0, 1, 2, 1 << 40, (1 << 62) - 1, -5])
POSITIONS = torch.arange(64)
DIM = 128


def uniform(salt: int = 0, keys: Tensor = KEYS, positions: Tensor = POSITIONS) -> Tensor:
    return counter_uniform(keys, positions, DIM, salt)


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])


class TestFunctionOfItsIntegers:
    def test_the_same_call_repeats(self):
        assert torch.equal(uniform(7), uniform(7))

    def test_row_alone(self):
        for row in range(len(KEYS)):
            assert torch.equal(uniform(7, KEYS[row : row + 1])[0], uniform(7)[row])

    def test_positions_alone(self):
        assert torch.equal(uniform(7, positions=torch.tensor([5, 60])), uniform(7)[:, [5, 60]])
        each = torch.stack([POSITIONS + row for row in range(len(KEYS))])
        rows = uniform(7, positions=each)
        for row in range(len(KEYS)):
            own = uniform(7, KEYS[row : row + 1], POSITIONS + row)
            assert torch.equal(rows[row], own[0])

    def test_fewer_channels(self):
        assert torch.equal(counter_uniform(KEYS, POSITIONS, 8, 7), uniform(7)[..., :8])

    def test_against_plain_integers(self):
        drawn = uniform(8195)
        for row, key in enumerate(KEYS.tolist()):
            for position, channel in ((0, 0), (1, 0), (0, 1), (63, 127)):
                expected = slow(key, position, channel, 8195)
                assert drawn[row, position, channel].item() == expected

    def test_known_values(self):
        """Exact fractions of 2^24: a change here would change every dropout mask and sample."""
        drawn = counter_uniform(torch.tensor([1, 1 << 40]), torch.tensor([0, 9]), 2, 3) * (1 << 24)
        assert drawn.long().flatten().tolist() == [
            9053011, 8677217, 1024855, 5059215, 4563609, 11435237, 16064843, 2608129,
        ]  # fmt: skip


def slow(key: int, position: int, channel: int, salt: int) -> float:
    """The same number from Python's integers."""
    word = 0xFFFFFFFF

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x7FEB352D & word
        x = (x ^ (x >> 15)) * 0x846CA68B & word
        return x ^ (x >> 16)

    row = mix((key & word) ^ mix((key >> 32) & word) ^ (salt * 0x9E3779B9 & word))
    token = mix((row + position * 0x85EBCA6B) & word)
    return ((mix((token + channel * 0xC2B2AE35) & word) >> 9) + 0.5) / (1 << 23)


class TestUniform:
    def test_is_inside_the_open_interval(self):
        values = uniform()
        assert values.dtype == torch.float32
        assert values.min() > 0
        assert values.max() < 1

    def test_moments(self):
        values = uniform().double()
        error = 4 / math.sqrt(values.numel())
        assert values.mean().item() == pytest.approx(1 / 2, abs=error * 0.29)
        assert values.var().item() == pytest.approx(1 / 12, abs=error * 0.09)

    def test_histogram_is_flat(self):
        """Chi-squared over 256 bins: five standard deviations."""
        counts = torch.histc(uniform(), 256, 0, 1)
        expected = counts.mean()
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("lag", [1, 2])
    def test_neighbours_are_independent(self, axis, lag):
        values = uniform()
        n = values.shape[axis]
        first, second = values.narrow(axis, 0, n - lag), values.narrow(axis, lag, n - lag)
        assert abs(correlation(first, second)) < 5 / math.sqrt(first.numel())

    @pytest.mark.parametrize("salts", [(0, 1), (0, 2), (8192, 8193), (0, 2**32 - 1), (3, 8195)])
    def test_salts_are_independent(self, salts):
        first, second = map(uniform, salts)
        assert abs(correlation(first, second)) < 5 / math.sqrt(first.numel())

    def test_no_two_rows_or_tokens_are_alike(self):
        flat = uniform().flatten(0, 1)
        assert flat.unique(dim=0).shape[0] == flat.shape[0]

    def test_high_bits_of_the_key_count(self):
        low, high = uniform(0, torch.tensor([5])), uniform(0, torch.tensor([5 + (1 << 33)]))
        assert abs(correlation(low, high)) < 5 / math.sqrt(low.numel())


class TestNormal:
    def test_moments_and_truncation(self):
        values = counter_normal(torch.arange(32), torch.arange(64), DIM, 5).double()
        n = values.numel()
        assert values.abs().max() <= 3.0001
        assert values.abs().max() > 2.9
        assert values.mean().item() == pytest.approx(0, abs=5 / math.sqrt(n))
        # variance of a unit normal truncated at 3: 1 - 6 phi(3) / (2 Phi(3) - 1)
        assert values.var().item() == pytest.approx(0.97334, abs=5 * math.sqrt(2 / n))
        share = (values.abs() < 1).double().mean().item()
        assert share == pytest.approx(0.68269 / 0.9973, abs=5 / math.sqrt(n) * 0.47)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_keeps_its_share_and_the_mean(self, p):
        ones = torch.ones(len(KEYS), 64, DIM)
        out = counter_dropout(ones, p, KEYS, POSITIONS, 3)
        error = 5 * math.sqrt(p * (1 - p) / ones.numel())
        assert (out > 0).float().mean().item() == pytest.approx(1 - p, abs=error)
        assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])

    def test_type_and_gradient(self):
        x = torch.randn(len(KEYS), 64, DIM).to(torch.bfloat16).requires_grad_()
        out = counter_dropout(x, 0.25, KEYS, POSITIONS, 3)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        assert torch.equal(x.grad != 0, out != 0)

    def test_a_nan_that_is_dropped_is_gone(self):
        x = torch.full((len(KEYS), 64, DIM), torch.nan)
        out = counter_dropout(x, 0.5, KEYS, POSITIONS, 3)
        assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
