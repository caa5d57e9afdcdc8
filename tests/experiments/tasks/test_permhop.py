"""PERM-HOP: the labels follow the tables, and the held-out prefixes stay out."""

import numpy as np
import pytest
import torch

from experiments.tasks import ChainLoader, PermHop
from open_mythos.errors import ConfigError, DataError

TASK = PermHop()


def walk(task: PermHop, tokens: list[int]) -> list[int]:
    """The entity after each relation, the slow way."""
    entity, path = tokens[0], []
    for token in tokens[1:]:
        entity = int(task.tables[token - task.entities][entity])
        path.append(entity)
    return path


def test_relations_are_different_permutations() -> None:
    assert TASK.tables.shape == (8, 16)
    assert (np.sort(TASK.tables, axis=1) == np.arange(16)).all()
    assert len({tuple(row) for row in TASK.tables}) == 8
    assert (PermHop(seed=1).tables != TASK.tables).any()


@pytest.mark.parametrize("held_out", [False, True])
def test_labels_follow_the_tables(held_out: bool) -> None:
    batch = TASK.batch(3, global_batch=64, hops=5, held_out=held_out)
    assert batch.input_ids.shape == batch.targets.shape == (64, 6)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64
    assert (batch.input_ids[:, 0] < 16).all()
    assert ((batch.input_ids[:, 1:] >= 16) & (batch.input_ids[:, 1:] < TASK.vocab_size)).all()
    assert (batch.targets[:, 0] == -100).all()
    for tokens, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
        for label, answer in zip(targets[1:], walk(TASK, tokens), strict=True):
            assert label in (answer, -100)
    assert (batch.targets != -100).any()


def labelled_prefixes(task: PermHop, held_out: bool, steps: int) -> set[tuple[int, ...]]:
    found = set()
    for step in range(steps):
        batch = task.batch(step, global_batch=256, hops=4, held_out=held_out)
        for row, position in (batch.targets != -100).nonzero().tolist():
            found.add(tuple(batch.input_ids[row, : position + 1].tolist()))
    return found


@pytest.mark.parametrize("steps", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_no_prefix_is_both_trained_and_tested(steps: int) -> None:
    trained = labelled_prefixes(TASK, held_out=False, steps=steps)
    tested = labelled_prefixes(TASK, held_out=True, steps=steps)
    assert not trained & tested
    assert {len(prefix) for prefix in trained} == {2, 3, 4, 5}
    assert {len(prefix) for prefix in tested} == {3, 4, 5}  # one hop is never held out


def test_a_tenth_of_the_prefixes_is_held_out() -> None:
    entity = np.repeat(np.arange(16), 64)
    relations = np.stack([np.tile(np.repeat(np.arange(8), 8), 16), np.tile(np.arange(8), 128)], 1)
    held_out = TASK.is_held_out(entity, relations)
    assert not held_out[:, 0].any()
    assert 60 < held_out[:, 1].sum() < 150  # of 1,024
    # the whole prefix decides: its entity, its first and its last relation
    grid = held_out[:, 1].reshape(16, 8, 8)
    for axis in range(3):
        assert (grid.any(axis) & ~grid.all(axis)).any()


def test_only_the_task_decides_what_is_held_out() -> None:
    entity, relations = np.array([3, 5]), np.array([[1, 2, 0], [4, 4, 7]])
    longer = np.c_[relations, [[6], [1]]]
    short = TASK.is_held_out(entity, relations)
    assert (TASK.is_held_out(entity, longer)[:, :3] == short).all()
    assert (TASK.is_held_out(entity[1:], relations[1:]) == short[1:]).all()


def test_final_only_labels_the_last_relation() -> None:
    every = TASK.batch(0, global_batch=64, hops=3)
    final = TASK.batch(0, global_batch=64, hops=3, final_only=True)
    assert torch.equal(final.input_ids, every.input_ids)
    assert torch.equal(final.targets[:, -1], every.targets[:, -1])
    assert (final.targets[:, :-1] == -100).all()


def test_batches_are_pure_functions_of_seed_step_and_place() -> None:
    whole = TASK.batch(7, global_batch=8, hops=5)
    again = PermHop().batch(7, global_batch=8, hops=5)
    assert torch.equal(whole.input_ids, again.input_ids)
    longer = TASK.batch(7, global_batch=16, hops=9)
    assert torch.equal(longer.input_ids[:8, :6], whole.input_ids)
    assert whole.sample_index.tolist() == list(range(56, 64))
    assert len(whole.split(2)) == 2


def test_chains_stand_one_after_the_other() -> None:
    pairs = TASK.batch(7, global_batch=32, hops=4, chains=2)
    assert pairs.input_ids.shape == pairs.targets.shape == (32, 10)
    single = TASK.batch(7, global_batch=64, hops=4)
    assert torch.equal(pairs.input_ids.view(64, 5), single.input_ids)
    assert torch.equal(pairs.targets.view(64, 5), single.targets)
    assert pairs.sample_index.tolist() == list(range(7 * 32, 8 * 32))


def test_the_loader_goes_over_to_pairs() -> None:
    loader = ChainLoader(TASK, global_batch=4, hops=5, pair_from=3)
    assert [loader.next_batch(step).input_ids.shape[1] for step in range(5)] == [6, 6, 6, 12, 12]
    single = ChainLoader(TASK, global_batch=4, hops=5)
    assert single.next_batch(99).input_ids.shape == (4, 6)
    for each in (loader, single):
        rows = [each.next_batch(step).input_ids for step in range(5)]
        assert each.drawn(5) == sum(ids.numel() for ids in rows) // 6


def test_the_loader_takes_up_its_own_position_only() -> None:
    loader, other = (ChainLoader(TASK, global_batch=4, hops=hops) for hops in (5, 4))
    loader.step = 17
    again = ChainLoader(TASK, global_batch=4, hops=5)
    again.load_state_dict(loader.state_dict())
    assert again.step == 17
    with pytest.raises(DataError, match="other rows"):
        other.load_state_dict(loader.state_dict())


def test_steps_seeds_and_purposes_draw_other_programs() -> None:
    drawn = [
        TASK.batch(0, global_batch=64, hops=5),
        TASK.batch(1, global_batch=64, hops=5),
        TASK.batch(0, global_batch=64, hops=5, held_out=True),
        PermHop(seed=1).batch(0, global_batch=64, hops=5),
    ]
    rows = [tuple(row) for batch in drawn for row in batch.input_ids.tolist()]
    assert len(set(rows)) > 250  # of 256; a few may meet by chance


def test_draws_are_uniform() -> None:
    ids = TASK.batch(0, global_batch=16_000, hops=8).input_ids
    entities = torch.bincount(ids[:, 0], minlength=16)
    relations = torch.bincount(ids[:, 1:].flatten() - 16, minlength=8)
    assert ((entities - 1000.0) ** 2 / 1000).sum() < 45  # chi-squared, 15 degrees
    assert ((relations - 16_000.0) ** 2 / 16_000).sum() < 30  # 7 degrees


def test_the_task_is_the_same_on_every_machine() -> None:
    assert TASK.batch(0, global_batch=1, hops=5).input_ids.tolist() == [[13, 16, 18, 21, 22, 16]]


@pytest.mark.parametrize("bad", [{"entities": 1}, {"relations": 0}, {"entities": 2.0}])
def test_an_impossible_task_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        PermHop(**bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"hops": 0},
        {"step": -1},
        {"global_batch": 0},
        {"chains": 0},
    ],
)
def test_an_impossible_batch_is_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TASK.batch(**({"step": 0, "global_batch": 4, "hops": 2} | bad))
