"""Probes decode what a state encodes, and nothing else."""

from __future__ import annotations

import pytest
import torch

from open_mythos.dynamics import probe
from open_mythos.errors import ConfigError

N, D, CLASSES = 400, 16, 4
GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.randint(CLASSES, (N,), generator=GENERATOR)
NOISE = torch.randn(N, D, generator=GENERATOR)
CENTRES = torch.randn(CLASSES, D, generator=GENERATOR)
SETS = torch.rand(N, 6, generator=GENERATOR) < 0.3
DIRECTIONS = torch.randn(6, D, generator=GENERATOR)


def test_encoded_labels_are_found():
    found = probe(CENTRES[LABELS] + 0.3 * NOISE, LABELS)
    assert found.score > 0.97
    assert found.exact == found.score
    assert found.control < 0.35  # a quarter by chance
    assert found.selectivity == pytest.approx(found.score - found.control)
    assert found.baseline < 0.35


def test_absent_labels_are_not_found():
    found = probe(NOISE, LABELS)
    assert abs(found.score - 0.25) < 0.1
    assert abs(found.selectivity) < 0.12
    assert found.train_score > found.score  # it overfits its training samples


def test_sets_of_labels():
    """Six superposed labels in one state."""
    found = probe(SETS.float() @ DIRECTIONS + 0.1 * NOISE, SETS)
    assert found.score > 0.97
    assert found.exact > 0.85
    assert found.control < 0.45
    assert 0.3 < found.baseline < 0.55  # everything marked: 2 x 0.3 / 1.3


def test_nonlinear_features_are_not_found():
    """The parity of two readable bits."""
    bits = torch.randint(2, (N, 2), generator=torch.Generator().manual_seed(1))
    states = torch.cat((2.0 * bits - 1, 0.1 * NOISE), dim=1)
    assert probe(states, bits[:, 0]).score > 0.99
    assert probe(states, bits.sum(1) % 2).score < 0.65


def test_a_control_by_type_can_be_memorized():
    """Hewitt and Liang: a state that encodes its token lets a probe learn any label of it."""
    types = torch.randint(8, (N,), generator=torch.Generator().manual_seed(2))
    states = torch.nn.functional.one_hot(types, 8).float() + 0.01 * NOISE[:, :8]
    found = probe(states, types % 4, types=types)
    assert found.score > 0.99
    assert found.control > 0.99
    assert abs(found.selectivity) < 0.01
    assert probe(states, types % 4).selectivity > 0.5  # shuffled labels cannot show it


def test_a_probe_for_every_loop():
    states = torch.stack((NOISE, CENTRES[LABELS] + NOISE, CENTRES[LABELS] + 0.1 * NOISE))
    scores = [each.score for each in (probe(each, LABELS) for each in states)]
    assert scores[0] < 0.4 < scores[1] <= scores[2]


def test_the_result_is_deterministic():
    states = CENTRES[LABELS] + NOISE
    torch.manual_seed(5)
    first = probe(states, LABELS, seed=3)
    torch.manual_seed(6)
    assert probe(states, LABELS, seed=3) == first
    assert probe(states, LABELS, seed=4) != first


def test_scores_do_not_depend_on_scale():
    states = CENTRES[LABELS] + 0.5 * NOISE
    moved = 1e4 * states * torch.linspace(0.1, 10, D) + 77
    constant = torch.cat((moved, torch.ones(N, 1)), dim=1)
    assert abs(probe(constant, LABELS).score - probe(states, LABELS).score) < 0.02


def test_test_samples_are_not_fitted():
    """With more dimensions than samples a probe fits anything and generalizes to nothing."""
    states = torch.randn(60, 200, generator=torch.Generator().manual_seed(3))
    found = probe(states, LABELS[:60], penalty=1e-6)
    assert found.train_score == 1
    assert found.score < 0.7


@pytest.mark.parametrize(
    ("states", "labels"),
    [
        (NOISE, LABELS[:-1]),
        (NOISE, LABELS.float()),
        (NOISE, LABELS - 1),
        (NOISE.unsqueeze(1), LABELS),
        (NOISE[:2], LABELS[:2]),
        (NOISE, SETS.float()),
    ],
)
def test_mismatched_arguments_are_rejected(states, labels):
    with pytest.raises(ConfigError, match="do not match"):
        probe(states, labels)


def test_the_test_fraction_is_checked():
    with pytest.raises(ConfigError, match="fraction"):
        probe(NOISE, LABELS, test_fraction=1.0)
