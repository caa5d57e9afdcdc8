"""COMPOSED FACTS: lone facts are never composed in training, and kinds are what they say."""

import numpy as np
import pytest
import torch

from experiments.tasks import PermHop, TaskLoader
from experiments.tasks.facts import KINDS, ComposedFacts
from open_mythos.errors import ConfigError, DataError

TASK = ComposedFacts(PermHop(entities=12, relations=4), lone_share=0.3)


def lone_facts(tokens: list[int]) -> list[bool]:
    """Whether each fact of a chain is lone, the slow way."""
    entity, found = tokens[0], []
    for token in tokens[1:]:
        relation = token - TASK.graph.entities
        found.append(bool(TASK.lone[relation, entity]))
        entity = int(TASK.graph.tables[relation, entity])
    return found


def trained_chains(hops: int) -> set[tuple[int, ...]]:
    """Every prefix that twenty steps of training label."""
    found = set()
    for step in range(20):
        batch = TASK.batch(step, global_batch=128, hops=hops)
        for row, place in (batch.targets != -100).nonzero().tolist():
            found.add(tuple(batch.input_ids[row, : place + 1].tolist()))
    return found


def test_the_share_of_lone_facts():
    lone = ComposedFacts(PermHop(64, 8), lone_share=0.2).lone
    assert lone.shape == (8, 64)
    assert 70 < lone.sum() < 135  # of 512


def test_training_shows_every_fact_and_composes_no_lone_one():
    chains = trained_chains(3)
    facts = {chain for chain in chains if len(chain) == 2}
    assert len(facts) == 48
    longer = chains - facts
    assert {len(chain) for chain in longer} == {3, 4}
    assert not any(any(lone_facts(list(chain))) for chain in longer)


@pytest.mark.parametrize("hops", [2, 3])
def test_kinds_are_what_they_say(hops):
    chains = trained_chains(3)
    seen: set[tuple[int, ...]] = set()
    for kind in KINDS:
        ids_BT, answers_B = TASK.questions(kind, hops)
        rows = [tuple(row) for row in ids_BT.tolist()]
        assert rows
        assert not seen & set(rows)
        seen |= set(rows)
        assert (kind == "trained") or not chains & set(rows)
        for row, answer in zip(rows, answers_B.tolist(), strict=True):
            lone, entity = lone_facts(list(row)), row[0]
            for token in row[1:]:
                entity = int(TASK.graph.tables[token - 12, entity])
            assert answer == entity
            expected = {
                "trained": not any(lone), "known": not any(lone), "lone": all(lone),
                "lone-first": lone[0] and sum(lone) == 1, "lone-last": lone[-1] and sum(lone) == 1,
            }  # fmt: skip
            assert expected[kind]
    assert chains & {chain for chain in seen if len(chain) == hops + 1}


def test_labels_are_the_answers():
    batch = TASK.batch(5, global_batch=64, hops=2)
    tokens = batch.input_ids.numpy()
    answers = TASK.graph.answers(tokens[:, 0], tokens[:, 1:] - 12)
    assert (batch.targets[:, 0] == -100).all()
    assert (batch.targets[:, 1].numpy() == answers[:, 0]).all()
    labelled = batch.targets[:, 2].numpy() != -100
    assert 0 < labelled.sum() < 64
    assert (batch.targets[:, 2].numpy() == answers[:, 1])[labelled].all()


@pytest.mark.parametrize("lone", [False, True])
def test_another_first_hop_reaches_the_same_entity(lone):
    ids_BT, answers_B = TASK.questions("lone", 2)
    others_BT, there_B = TASK.first_hops(ids_BT, lone=lone)
    assert 0 < there_B.sum() <= len(ids_BT)
    assert torch.equal(others_BT[~there_B], ids_BT[~there_B])
    assert torch.equal(others_BT[:, 2], ids_BT[:, 2])
    for row, other, answer in zip(
        ids_BT[there_B].tolist(), others_BT[there_B].tolist(), answers_B[there_B], strict=True
    ):
        assert other[1] != row[1]
        assert lone_facts(other) == [lone, True]
        assert (
            TASK.graph.tables[other[2] - 12, TASK.graph.tables[other[1] - 12, other[0]]] == answer
        )


def test_chains_stand_one_after_the_other():
    pairs, single = (TASK.batch(5, global_batch=64 // n, hops=2, chains=n) for n in (2, 1))
    assert pairs.input_ids.shape == pairs.targets.shape == (32, 6)
    assert torch.equal(pairs.input_ids.view(64, 3), single.input_ids)
    assert torch.equal(pairs.targets.view(64, 3), single.targets)


def test_one_hop_is_always_trained():
    ids_BT, _ = TASK.questions("trained", 1)
    assert len(ids_BT) == 48
    assert all(not len(TASK.questions(kind, 1)[0]) for kind in KINDS[1:])


def test_the_loader_draws_by_step_and_takes_up_its_own_position_only():
    loader = TaskLoader(TASK, global_batch=8, hops=2)
    assert torch.equal(loader.next_batch(3).targets, TASK.batch(3, global_batch=8, hops=2).targets)
    loader.step = 9
    again = TaskLoader(TASK, global_batch=8, hops=2)
    again.load_state_dict(loader.state_dict())
    assert again.step == 9
    with pytest.raises(DataError, match="other rows"):
        TaskLoader(TASK, global_batch=8, hops=3).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("share", [0.0, 1.0, -1, float("nan")])
def test_an_impossible_share_is_refused(share):
    with pytest.raises(ConfigError, match="share"):
        ComposedFacts(lone_share=share)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="lone-last"):
        TASK.questions("alone", 2)


def test_the_split_is_the_same_on_every_machine():
    assert np.flatnonzero(ComposedFacts().lone[0])[:4].tolist() == [2, 7, 13, 18]
