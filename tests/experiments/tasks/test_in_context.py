"""IN-CONTEXT HOPS: every answer follows from the facts of its row, and from nothing else."""

import pytest
import torch

from experiments.tasks import InContextHop, TaskLoader
from open_mythos.errors import ConfigError, DataError

TASK = InContextHop(entities=9, stated=5)


def read(tokens: list[int]) -> dict[int, int]:
    """The facts of a row."""
    return dict(divmod(token - 10, 9) for token in tokens[:5])


@pytest.mark.parametrize("test", [False, True])
def test_answers_follow_from_the_stated_facts(test):
    batch = TASK.batch(2, global_batch=64, hops=4, test=test)
    assert batch.input_ids.shape == batch.targets.shape == (64, 9)
    assert (batch.targets[:, :5] == -100).all()
    assert (batch.input_ids[:, 6:] == 9).all()
    for tokens, labels in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        facts, entity = read(tokens), tokens[5]
        for label in labels[5:]:
            entity = facts[entity]
            assert label == entity


def test_further_chains_begin_anywhere():
    one, batch = (TASK.batch(2, global_batch=64, hops=3, chains=chains) for chains in (1, 3))
    assert torch.equal(batch.input_ids[:, :8], one.input_ids)
    assert torch.equal(batch.targets[:, :8], one.targets)
    starts = set()
    for tokens, labels in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        facts = read(tokens)
        for at in (8, 11):
            entity = tokens[at]
            starts.add(list(facts).index(entity))
            assert tokens[at + 1 : at + 3] == [9, 9]
            for label in labels[at : at + 3]:
                entity = facts[entity]
                assert label == entity
    assert len(starts) == 5


def test_the_facts_are_one_cycle_of_different_entities():
    for tokens in TASK.batch(0, global_batch=32, hops=1).input_ids.tolist():
        facts, entity = read(tokens), tokens[5]
        assert len(facts) == 5
        path = []
        for _ in range(5):
            entity = facts[entity]
            path.append(entity)
        assert len(set(path)) == 5
        assert entity == tokens[5]


def test_rows_differ_in_facts_and_in_their_order():
    ids = TASK.batch(0, global_batch=256, hops=1).input_ids
    assert len({tuple(sorted(row[:5])) for row in ids.tolist()}) > 230  # of 3,024
    # the fact that is asked first stands at every place about equally often
    source = (ids[:, :5] - 10) // 9
    place = (source == ids[:, 5:6]).int().argmax(1)
    assert (torch.bincount(place, minlength=5) > 30).all()  # 51 expected


def test_batches_are_pure_functions_of_seed_step_and_place():
    whole = TASK.batch(7, global_batch=8, hops=3)
    longer = TASK.batch(7, global_batch=16, hops=3)
    assert torch.equal(longer.input_ids[:8], whole.input_ids)
    others = [
        TASK.batch(8, global_batch=8, hops=3), TASK.batch(7, global_batch=8, hops=3, test=True),
        InContextHop(9, 5, seed=1).batch(7, global_batch=8, hops=3),
    ]  # fmt: skip
    assert all((other.input_ids != whole.input_ids).any() for other in others)


def test_the_loader_draws_by_step_and_takes_up_its_own_position_only():
    loader = TaskLoader(TASK, global_batch=4, hops=2)
    drawn = TASK.batch(3, global_batch=4, hops=2)
    assert torch.equal(loader.next_batch(3).input_ids, drawn.input_ids)
    loader.step = 9
    again = TaskLoader(TASK, global_batch=4, hops=2)
    again.load_state_dict(loader.state_dict())
    assert again.step == 9
    with pytest.raises(DataError, match="other rows"):
        TaskLoader(TASK, global_batch=4, hops=3).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("bad", [{"stated": 1}, {"entities": 4, "stated": 5}])
def test_an_impossible_task_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        InContextHop(**bad)


@pytest.mark.parametrize("bad", [{"hops": 0}, {"step": -1}, {"global_batch": 0}])
def test_an_impossible_batch_is_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TASK.batch(**({"step": 0, "global_batch": 4, "hops": 2} | bad))
