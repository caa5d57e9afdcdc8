"""Filters against plain NumPy, and draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from open_mythos import ConfigError
from open_mythos.ops.sampling import (
    SamplingParams,
    filter_logits,
    penalize_repetition,
    sample_tokens,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max())
    return e / e.sum()


def slow_filter(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """One row; assumes distinct logits."""
    logits = logits.astype(np.float64).copy()
    order = np.argsort(-logits)
    if top_k:
        logits[order[top_k:]] = -np.inf
    p, total = softmax(logits), 0.0
    for token in order:
        if total >= top_p and top_p < 1:
            logits[token] = -np.inf
        total += p[token]
    p = softmax(logits)
    logits[p < min_p * p.max()] = -np.inf
    return logits


@hypothesis_settings(max_examples=200)
@given(
    seed=st.integers(0, 2**20),
    vocabulary=st.integers(2, 40),
    top_k=st.sampled_from([0, 1, 2, 5, 39, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.3, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
)
def test_filters(seed, vocabulary, top_k, top_p, min_p):
    logits = np.random.default_rng(seed).normal(size=(3, vocabulary)).astype(np.float32) * 2
    out = filter_logits(torch.from_numpy(logits), top_k=top_k, top_p=top_p, min_p=min_p)
    for row in range(3):
        expected = slow_filter(logits[row], top_k, top_p, min_p)
        np.testing.assert_array_equal(np.isfinite(out[row].numpy()), np.isfinite(expected))
        kept = np.isfinite(expected)
        np.testing.assert_array_equal(out[row].numpy()[kept], logits[row][kept])
        assert kept[logits[row].argmax()]


@pytest.mark.parametrize("strict", [{"min_p": 1.0}, {"top_p": 1e-9}, {"top_k": 1}], ids=str)
def test_the_most_likely_token_is_never_dropped(strict):
    logits = torch.randn(20, 9)
    kept = filter_logits(logits, **strict).isfinite()
    assert torch.equal(kept.long().argmax(-1), logits.argmax(-1))
    assert (kept.sum(-1) == 1).all()


def test_no_filter_changes_nothing():
    logits = torch.randn(3, 9)
    assert torch.equal(filter_logits(logits), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3, 10.0])
def test_repetition_penalty(penalty):
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    seen = np.array([[0, 3, 3, -1], [8, -1, -1, -1]])
    out = penalize_repetition(torch.from_numpy(logits), torch.from_numpy(seen), penalty)
    expected = logits.copy()
    for row in range(2):
        for token in set(seen[row]) - {-1}:
            logit = logits[row, token]
            expected[row, token] = logit / penalty if logit > 0 else logit * penalty
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


class TestDraws:
    def test_distribution(self):
        """Chi-squared of 40,000 draws over 8 tokens: five standard deviations."""
        logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -2.0, 0.0, 1.5])
        n = 40_000
        drawn = sample_tokens(logits.expand(n, 8), torch.arange(n), 0)
        expected = n * logits.softmax(0)
        counts = drawn.bincount(minlength=8)
        chi2 = ((counts - expected) ** 2 / expected).sum().item()
        assert abs(chi2 - 7) < 5 * (2 * 7) ** 0.5

    def test_positions_are_independent_draws(self):
        n, logits = 20_000, torch.zeros(20_000, 4)
        first, second = (sample_tokens(logits, torch.arange(n), i) for i in (0, 1))
        together = (first * 4 + second).bincount(minlength=16)
        assert ((together - n / 16) ** 2 / (n / 16)).sum().item() < 15 + 5 * (2 * 15) ** 0.5

    def test_belongs_to_its_row(self):
        logits, keys = torch.randn(5, 30), torch.arange(5) * 1000
        together = sample_tokens(logits, keys, 3)
        for row in range(5):
            own = slice(row, row + 1)
            assert sample_tokens(logits[own], keys[own], 3) == together[row]

    def test_excluded_tokens_never_come(self):
        logits = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
        drawn = sample_tokens(logits.expand(5000, 4), torch.arange(5000), 0)
        assert set(drawn.tolist()) == {0, 2}

    @pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
    def test_temperature(self, temperature):
        logits, n = torch.tensor([0.0, 1.0]), 20_000
        chosen = SamplingParams(temperature=temperature, top_k=None).choose(
            logits.expand(n, 2), torch.zeros(n, 0, dtype=torch.long), torch.arange(n), 0
        )
        expected = 1 / (1 + np.exp(-1 / temperature))
        assert chosen.float().mean().item() == pytest.approx(expected, abs=5 * 0.5 / n**0.5)

    def test_zero_temperature_is_greedy_and_cold_is_close_to_it(self):
        logits, keys = torch.randn(50, 30), torch.arange(50)
        nothing = torch.zeros(50, 0, dtype=torch.long)
        for temperature in (0, 0.0, 1e-4):
            chosen = SamplingParams(temperature=temperature).choose(logits, nothing, keys, 0)
            assert torch.equal(chosen, logits.argmax(-1))

    def test_half_precision_logits(self):
        logits, nothing = torch.randn(4, 9), torch.zeros(4, 0, dtype=torch.long)
        chosen = SamplingParams().choose(logits.bfloat16(), nothing, torch.arange(4), 0)
        rounded = SamplingParams().choose(logits.bfloat16().float(), nothing, torch.arange(4), 0)
        assert torch.equal(chosen, rounded)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": 1e-9}, {"top_k": -1}, {"top_k": 1.5}, {"top_p": 0},
     {"top_p": 1.5}, {"min_p": -1}, {"repetition_penalty": 0}, {"repetition_penalty": True}],
    ids=str,
)  # fmt: skip
def test_out_of_range(bad):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**bad)
    assert caught.value.where in bad
