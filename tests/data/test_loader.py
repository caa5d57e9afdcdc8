"""The loader: one order at every world size, and exact resume at any cut."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data import Batch, EpochWindows, Loader, TokenShards, prepare
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import ByteTokenizer

WORLDS = st.sampled_from([1, 2, 4])


def ranks(shards, world_size: int, **options) -> list[Loader]:
    return [Loader(shards, rank=r, world_size=world_size, **options) for r in range(world_size)]


def joined(parts: list[Batch]) -> list[torch.Tensor]:
    names = ["input_ids", "targets", "sample_index"]
    names += ["document_ids"] if parts[0].document_ids is not None else []
    return [torch.cat([getattr(part, name) for part in parts]) for name in names]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(deadline=None, max_examples=60)
@given(
    seq_len=st.integers(8, 600),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    mask_documents=st.booleans(),
    phases=st.lists(st.tuples(WORLDS, st.integers(0, 4)), min_size=1, max_size=5),
)
def test_resuming_anywhere_at_any_world_size_is_exact(
    shards, seq_len, rows, seed, mask_documents, phases
) -> None:
    options = {
        "seq_len": seq_len,
        "global_batch": 4 * rows,
        "seed": seed,
        "mask_documents": mask_documents,
    }
    uninterrupted = Loader(shards, **options)
    state = uninterrupted.state_dict()
    for world_size, steps in phases:
        loaders = ranks(shards, world_size, **options)
        for loader in loaders:
            loader.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(steps):
            batch = joined([next(loader) for loader in loaders])
            assert equal(batch, joined([next(uninterrupted)]))
        state = loaders[-1].state_dict()
        assert state == uninterrupted.state_dict()


@settings(deadline=None, max_examples=40)
@given(seq_len=st.integers(20, 600), global_batch=st.integers(1, 40), epochs=st.integers(1, 3))
def test_each_epoch_takes_every_window_once(shards, seq_len, global_batch, epochs) -> None:
    loader = Loader(shards, seq_len=seq_len, global_batch=global_batch)
    samples = epochs * loader.windows
    steps = -(-samples // global_batch)
    rows = torch.cat([loader.next_batch(step).input_ids for step in range(steps)])[:samples]
    expected = torch.stack(
        [torch.from_numpy(shards.tokens(i * seq_len, seq_len)) for i in range(loader.windows)]
    )
    for epoch in rows.split(loader.windows):
        assert sorted(epoch.tolist()) == sorted(expected.tolist())


def test_samples_are_numbered_through_the_run(shards) -> None:
    loaders = ranks(shards, 2, seq_len=64, global_batch=4)
    numbers = [loader.next_batch(step).sample_index for step in range(3) for loader in loaders]
    assert torch.cat(numbers).tolist() == list(range(12))


def test_epochs_and_seeds_give_other_orders(shards) -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        loader = Loader(shards, seq_len=32, global_batch=1, seed=seed)
        first = epoch * loader.windows
        return [loader.next_batch(first + i).input_ids[0].tolist() for i in range(loader.windows)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_looking_at_a_step_does_not_move_the_iteration(shards) -> None:
    loader = Loader(shards, seq_len=64, global_batch=2)
    ahead = loader.next_batch(3)
    assert loader.step == 0
    batches = [batch for batch, _ in zip(loader, range(4), strict=False)]
    assert torch.equal(batches[3].input_ids, ahead.input_ids)


def test_the_state_says_which_epoch_comes_next(shards) -> None:
    loader = Loader(shards, seq_len=64, global_batch=2)
    loader.step = loader.windows
    assert loader.epoch == loader.state_dict()["epoch"] == 2


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("seed", {"seed": 1}),
        ("seq_len", {"seq_len": 32}),
        ("global_batch", {"global_batch": 2}),
        ("mask_documents", {"mask_documents": True}),
    ],
)
def test_another_geometry_is_rejected_by_name(shards, field: str, options: dict) -> None:
    saved = Loader(shards, seq_len=64, global_batch=4)
    saved.step = 5
    other = Loader(shards, **({"seq_len": 64, "global_batch": 4} | options))
    with pytest.raises(DataError, match=f"{field}: saved") as caught:
        other.load_state_dict(saved.state_dict())
    assert "dataset" not in str(caught.value)
    assert other.step == 0


def test_changed_data_are_rejected(shards, documents, tmp_path) -> None:
    prepare([*documents, "one more"], tmp_path / "a", ByteTokenizer(), val_fraction=0)
    state = Loader(shards, seq_len=64, global_batch=4).state_dict()
    other = Loader(TokenShards(tmp_path / "a"), seq_len=64, global_batch=4)
    with pytest.raises(DataError, match="dataset: saved"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [{"step": -1}, {"step": 1.0}, {"step": True}, {"step": None}, {"epoch": 3}, {"extra": 1}],
)
def test_a_malformed_state_is_rejected(shards, change: dict) -> None:
    loader = Loader(shards, seq_len=64, global_batch=4)
    with pytest.raises(DataError, match=next(iter(change))):
        loader.load_state_dict(loader.state_dict() | change)
    assert loader.step == 0


@pytest.mark.parametrize("state", [{}, None, [], {"step": 0}])
def test_a_state_with_missing_fields_is_rejected(shards, state: object) -> None:
    with pytest.raises(DataError):
        Loader(shards, seq_len=64, global_batch=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("global_batch", {"global_batch": 0}),
        ("global_batch", {"global_batch": 3, "world_size": 2}),
        ("rank", {"rank": 2, "world_size": 2}),
        ("rank", {"rank": -1}),
        ("world_size", {"world_size": 0}),
        ("seq_len", {"seq_len": 0}),
    ],
)
@pytest.mark.parametrize("kind", [Loader, EpochWindows])
def test_impossible_geometries_are_rejected(shards, kind: type, field: str, options: dict) -> None:
    with pytest.raises(ConfigError, match=field):
        kind(shards, **({"seq_len": 64, "global_batch": 4} | options))


def test_a_negative_step_is_rejected(shards) -> None:
    with pytest.raises(ConfigError, match="step"):
        Loader(shards, seq_len=64, global_batch=4).next_batch(-1)


def test_a_shard_that_fails_is_named_and_the_position_stays(folder, tmp_path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    loader = Loader(TokenShards(copy), seq_len=64, global_batch=64)
    next(loader)
    os.truncate(copy / "train-00002.tokens.bin", 10)
    with pytest.raises(DataError, match=r"train-00002\.tokens\.bin, byte \d+"):
        [next(loader) for _ in range(loader.windows)]
    position = loader.step
    shutil.copy(folder / "train-00002.tokens.bin", copy)
    assert next(loader).sample_index[0] == position * 64


@settings(deadline=None, max_examples=40)
@given(
    seq_len=st.integers(8, 600),
    rows=st.integers(1, 5),
    world_size=WORLDS,
    max_windows=st.none() | st.integers(1, 30),
)
def test_evaluation_takes_every_window_once_in_order(
    shards, seq_len, rows, world_size, max_windows
) -> None:
    options = {"seq_len": seq_len, "global_batch": rows * world_size, "max_windows": max_windows}
    parts = [
        EpochWindows(shards, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    steps = list(zip(*parts, strict=True))  # every rank has the same number of batches
    assert len(steps) == len(parts[0])
    assert all(len(batch) == rows for step in steps for batch in step)
    inputs, targets, index = joined([batch for step in steps for batch in step])
    windows = (len(shards) - 1) // seq_len
    windows = windows if max_windows is None else min(windows, max_windows)
    real = index >= 0
    assert index[real].tolist() == list(range(windows))
    stream = torch.from_numpy(shards.tokens(0, windows * seq_len + 1))
    assert torch.equal(inputs[real].flatten(), stream[:-1])
    assert torch.equal(targets[real].flatten(), stream[1:])
    assert (targets[~real] == -100).all()
    assert (~real).sum() < rows * world_size


def test_evaluation_can_be_repeated(shards) -> None:
    evaluation = EpochWindows(shards, seq_len=64, global_batch=4, mask_documents=True)
    assert equal(joined(list(evaluation)), joined(list(evaluation)))
