"""What the model would say after each loop is what it says at that depth."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same, random_ids

from open_mythos.dynamics import logit_lens, run_trajectory, set_probability
from open_mythos.errors import ConfigError

IDS, VOCAB = random_ids(2, 5), 61


@pytest.fixture(autouse=True)
def _no_graph():
    with torch.no_grad():
        yield


def test_equal_to_the_model_at_every_depth(model):
    path = run_trajectory(model, IDS, 6)
    read = list(logit_lens(model, path))
    assert len(read) == 6
    for depth, log_p in enumerate(read, start=1):
        assert_same(log_p, model(IDS, n_loops=depth).log_softmax(-1))


def test_sets_for_all_positions(shared_model):
    model = shared_model("gqa")
    path = run_trajectory(model, IDS, 3)
    even = torch.arange(VOCAB) % 2 == 0
    found = set_probability(model, path, torch.stack((even, ~even, even | ~even))[:, None, None])
    assert found.shape == (3, 3, 2, 5)
    assert (found[:, 0] + found[:, 1] - 1).abs().max() < 1e-5
    expected = model(IDS, n_loops=2).softmax(-1)[..., ::2].sum(-1)
    assert_same(found[1, 0], expected)


def test_a_set_for_each_position(shared_model):
    """The probability of every position's own next token."""
    model = shared_model("gqa")
    path = run_trajectory(model, IDS, 2)
    own = torch.nn.functional.one_hot(IDS, VOCAB).bool()
    found = set_probability(model, path, own)
    expected = model(IDS, n_loops=2).softmax(-1).gather(-1, IDS.unsqueeze(-1)).squeeze(-1)
    assert_same(found[1], expected)


@pytest.mark.parametrize("sets", [torch.ones(VOCAB), torch.ones(VOCAB + 1, dtype=torch.bool)])
def test_what_is_no_set(shared_model, sets):
    model = shared_model("gqa")
    with pytest.raises(ConfigError, match="sets of tokens"):
        set_probability(model, run_trajectory(model, IDS, 1), sets)
