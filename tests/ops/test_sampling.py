"""Filters against plain NumPy, and draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from open_mythos import ConfigError
from open_mythos.ops.sampling import (
    RowSampling,
    SamplingParams,
    Stages,
    log_probabilities,
    sample_tokens,
)


def filter_logits(logits: Tensor, **filters: float) -> Tensor:
    values = {"top_k": 0, **filters}
    return SamplingParams(**values).rows(len(logits)).filter(logits)


def penalize(logits: Tensor, seen: Tensor, n_prompt: int = 0, **penalties: float) -> Tensor:
    return SamplingParams(**penalties).rows(len(logits)).penalize(logits, seen, n_prompt)


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
    given = torch.from_numpy(logits), torch.from_numpy(seen)
    out = penalize(*given, repetition_penalty=penalty)
    expected = logits.copy()
    for row in range(2):
        for token in set(seen[row]) - {-1}:
            logit = logits[row, token]
            expected[row, token] = logit / penalty if logit > 0 else logit * penalty
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-0.5, 0.4)])
def test_presence_and_frequency_count_generated_tokens_only(presence, frequency):
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    seen = np.array([[1, 2, 3, 3, 2, 3], [-1, 8, 1, 1, -1, -1]])  # two columns of prompt
    out = penalize(
        torch.from_numpy(logits), torch.from_numpy(seen), 2,
        presence_penalty=presence, frequency_penalty=frequency,
    )  # fmt: skip
    expected = logits.copy()
    for row, generated in enumerate(([3, 3, 2, 3], [1, 1])):
        for token in set(generated):
            expected[row, token] -= presence + frequency * generated.count(token)
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-6)


def test_every_row_may_have_its_own_prompt():
    logits, seen = torch.zeros(2, 5), torch.tensor([[1, 2, 3], [1, 2, 3]])
    rows = SamplingParams(presence_penalty=1.0).rows(2)
    out = rows.penalize(logits, seen, torch.tensor([1, 2]))
    assert out.tolist() == [[0, 0, -1, -1, 0], [0, 0, 0, -1, 0]]


class TestMixtures:
    """Rows of a batch with values of their own equal each row alone, bit for bit."""

    SETTINGS = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        top_k=st.sampled_from([None, 0, 1, 5, 40, 500]),
        top_p=st.sampled_from([1.0, 0.999999, 0.9, 0.2]),
        min_p=st.sampled_from([0.0, 1e-6, 0.1, 1.0]),
        repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
        presence_penalty=st.sampled_from([0.0, -0.4, 1.1]),
        frequency_penalty=st.sampled_from([0.0, 0.3]),
    )

    @staticmethod
    def case(seed: int, batch: int, vocabulary: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = 3 * torch.randn(batch, vocabulary, generator=generator)
        logits = torch.where(logits > 2, logits.round(), logits)  # with ties
        seen = torch.randint(-1, vocabulary, (batch, 12), generator=generator)
        keys = torch.randint(1 << 62, (batch,), generator=generator)
        n_prompt, draws = torch.randint(0, 12, (2, batch), generator=generator)
        return logits, seen, n_prompt, keys, draws

    @hypothesis_settings(max_examples=150)
    @given(st.lists(SETTINGS, min_size=1, max_size=7), st.integers(0, 2**20))
    def test_rows_equal_the_scalar_form(self, settings, seed):
        vocabulary = (7, 64, 257)[seed % 3]
        logits, seen, n_prompt, keys, draws = self.case(seed, len(settings), vocabulary)
        bias = torch.where(torch.rand(vocabulary) < 0.1, -torch.inf, torch.randn(vocabulary))
        bias = bias.repeat(len(settings), 1)
        mixed = RowSampling.of(settings)
        together = mixed.choose(logits, seen, n_prompt, keys, draws, bias)
        everything = RowSampling(**{**vars(mixed), "stages": Stages(most_k=vocabulary)})
        assert torch.equal(everything.choose(logits, seen, n_prompt, keys, draws, bias), together)
        filtered = mixed.filter(mixed.warm(mixed.penalize(logits, seen, n_prompt)))
        for i, one in enumerate(settings):
            own, alone = slice(i, i + 1), one.rows(1)
            args = logits[own], seen[own], int(n_prompt[i]), keys[own], int(draws[i])
            assert together[i] == alone.choose(*args, bias[own])
            if one.temperature:  # filters of greedy rows are skipped alone
                expected = alone.filter(alone.warm(alone.penalize(*args[:3])))
                assert torch.equal(filtered[i], expected[0])

    def test_rows_that_ask_for_nothing_pass_unchanged(self):
        logits = torch.randn(4, 50)
        rows = RowSampling.of([SamplingParams(top_k=0)] * 3 + [SamplingParams(5, 0.5, 3, 0.5, 0.5)])
        assert torch.equal(rows.filter(logits)[:3], logits[:3])
        assert 1 <= rows.filter(logits)[3].isfinite().sum() <= 3

    def test_nan_in_one_row_changes_no_other(self):
        logits, seen, n_prompt, keys, draws = self.case(0, 4, 64)
        rows = RowSampling.of([SamplingParams(5, 0.9, 20, 0.9, 0.01, presence_penalty=1.0)] * 4)
        before = rows.choose(logits, seen, n_prompt, keys, draws)
        logits[2] = torch.nan
        after = rows.choose(logits, seen, n_prompt, keys, draws)
        assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])

    def test_choosing_never_asks_for_a_value(self):
        """On meta tensors, any host-device sync raises."""
        with FakeTensorMode():
            rows = RowSampling.of([SamplingParams(5, 0.9, 20, 0.9, 0.1, 1.2, frequency_penalty=1)])
            seen, one = torch.zeros(1, 6, dtype=torch.long), torch.zeros(1, dtype=torch.long)
            assert rows.choose(torch.zeros(1, 9), seen, one, one, one).shape == (1,)


def test_logit_bias():
    logits, nothing = torch.zeros(400, 9), torch.zeros(400, 0, dtype=torch.long)
    params = SamplingParams(logit_bias={3: 100.0, 5: 100.0, 6: -100.0})
    assert set(params.choose(logits, nothing, torch.arange(400), 0).tolist()) == {3, 5}
    assert SamplingParams(temperature=0, logit_bias=[(7, 1)]).choose(
        logits, nothing, torch.arange(400), 0
    ).eq(7).all()  # fmt: skip
    assert hash(params) == hash(SamplingParams(logit_bias=((3, 100), (5, 100), (6, -100))))


def test_log_probabilities():
    logits, token = 2 * torch.randn(5, 40), torch.arange(5)
    chosen, ids, values = log_probabilities(logits, token, 3)
    p = softmax(logits[2].double().numpy())
    assert chosen[2].item() == pytest.approx(np.log(p[2]), rel=1e-5)
    assert ids[2].tolist() == np.argsort(-p)[:3].tolist()
    np.testing.assert_allclose(values[2], np.log(np.sort(p)[::-1][:3].copy()), rtol=1e-5)
    for row in range(5):
        own = slice(row, row + 1)
        alone = log_probabilities(logits[own], token[own], 3)
        both = zip(alone, (chosen, ids, values), strict=True)
        assert all(torch.equal(one[0], many[row]) for one, many in both)
    assert log_probabilities(logits, token)[1].shape == (5, 0)


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

    @pytest.mark.parametrize("kind", ["presence", "frequency"])
    def test_penalties_change_the_odds(self, kind):
        """Two equal tokens, one generated twice: odds exp(penalty times 1 or 2)."""
        n, penalty = 20_000, 0.4
        seen = torch.tensor([[1, 0, 0]]).expand(n, 3)
        params = SamplingParams(**{f"{kind}_penalty": penalty})
        chosen = params.choose(torch.zeros(n, 2), seen, torch.arange(n), 0, 1)
        expected = 1 / (1 + np.exp(-penalty * (1 if kind == "presence" else 2)))
        assert chosen.float().mean().item() == pytest.approx(expected, abs=5 * 0.5 / n**0.5)

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
     {"top_p": 1.5}, {"min_p": -1}, {"repetition_penalty": 0}, {"repetition_penalty": True},
     {"presence_penalty": float("nan")}, {"frequency_penalty": "1"}, {"logit_bias": {-1: 1.0}},
     {"logit_bias": {1: float("inf")}}, {"logit_bias": 3}, {"logit_bias": {"a": 1.0}}],
    ids=str,
)  # fmt: skip
def test_out_of_range(bad):
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**bad)
    assert caught.value.where in bad
