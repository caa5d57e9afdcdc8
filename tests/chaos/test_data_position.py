"""R10: damaged shards are named, other data is refused, the position is exact."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chaos import small_run
from chaos.disk_limits import at_step
from open_mythos.data import Loader, TokenShards
from open_mythos.errors import DataError


@pytest.fixture
def copy(data, tmp_path):
    """The prepared folder, to be damaged."""
    return shutil.copytree(data, tmp_path / "tokens")


def token_files(folder, kind="tokens"):
    return sorted(folder.glob(f"train-*.{kind}.bin"))


def read_everything(folder):
    """Read all tokens of the training split."""
    shards = TokenShards(folder)
    shards.tokens(0, len(shards))


def empty(path):
    path.write_bytes(b"")


def missing(path):
    path.unlink()


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-2])


def grown(path):
    path.write_bytes(path.read_bytes() + b"\0\0")


def with_one_of_no_vocabulary(path):
    tokens = np.fromfile(path, "<u2")
    tokens[5] = 65535
    tokens.tofile(path)


SHARD_DAMAGE = [
    ("tokens", empty, "byte 0"),
    ("starts", empty, "byte 0"),
    ("tokens", missing, "byte 0"),
    ("starts", missing, "byte 0"),
    ("tokens", cut_short, "byte"),
    ("starts", cut_short, "byte"),
    ("tokens", grown, "byte"),
    ("tokens", with_one_of_no_vocabulary, "byte 10"),
]


@pytest.mark.goal("R10", "a shard damaged")
@pytest.mark.parametrize(("kind", "damage", "place"), SHARD_DAMAGE)
def test_a_damaged_shard_is_named(copy, row, kind, damage, place):
    for victim in token_files(copy, kind):
        content = victim.read_bytes()
        damage(victim)
        with pytest.raises(DataError) as caught:
            read_everything(copy)
        assert str(victim) in caught.value.where
        assert place in caught.value.where
        victim.write_bytes(content)
        row.count()
    read_everything(copy)
    row.outcome = f"{kind} {damage.__name__.replace('_', ' ')}: file and byte named"


@pytest.mark.goal("R10", "bits of a shard flipped, each token still in the vocabulary")
def test_flipped_bits_are_found_by_verification(copy, row):
    """Reading cannot detect them; ``verify`` names the file and the 16 MiB."""
    for victim in token_files(copy) + token_files(copy, "starts"):
        content = victim.read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2 & ~1] ^= 1
        victim.write_bytes(bytes(changed))
        read_everything(copy)
        with pytest.raises(DataError, match="has changed since it was prepared") as caught:
            TokenShards(copy).verify()
        assert caught.value.where == f"{victim}, within 16 MiB of byte 0"
        victim.write_bytes(content)
        row.count()
    TokenShards(copy).verify()
    row.outcome = "TokenShards.verify names the file and the block (reading alone cannot)"


@pytest.mark.goal("R10", "a shard that goes in the middle of a run")
@pytest.mark.parametrize("damage", [empty, missing, cut_short, with_one_of_no_vocabulary])
def test_a_run_stops_cleanly_and_goes_on(copy, straight, tmp_path, row, damage):
    out = tmp_path / "run"
    contents = {path: path.read_bytes() for path in token_files(copy)}
    trainer = small_run.new_trainer(small_run.run_config(out, copy))
    at_step(trainer, small_run.SAVE_EVERY + 1, lambda: [damage(path) for path in contents])
    with pytest.raises(DataError) as caught:
        trainer.fit()
    assert "byte" in caught.value.where
    assert caught.value.exit_code == 3
    for path, content in contents.items():
        path.write_bytes(content)
    # the path of the data is free to change; the data is not
    again = small_run.new_trainer(small_run.run_config(out, copy))
    assert again.resume(strict=True).step % small_run.SAVE_EVERY == 0 < again.state.step
    again.fit()
    assert small_run.fingerprint(again) == straight.end
    row.outcome = f"{damage.__name__.replace('_', ' ')}: exit 3; repaired, it goes on bit for bit"


@pytest.mark.goal("R10", "other data at resumption")
@pytest.mark.parametrize("change", ["another text", "another order", "another split of shards"])
def test_other_data_is_rejected(data, straight, tmp_path, row, change):
    out = shutil.copytree(straight.out, tmp_path / "run")
    options = {"another order": {"seed": 1}}.get(change, {})
    other = data
    if change == "another text":
        other = small_run.make_data(tmp_path / "other", seed=1)
    elif change == "another split of shards":
        other = small_run.make_data(tmp_path / "other", shard_tokens=90)
    trainer = small_run.new_trainer(small_run.run_config(out, other))
    if options:
        trainer.loader.seed = options["seed"]
    before = small_run.tensors(trainer)
    with pytest.raises(DataError, match="other data or another geometry"):
        trainer.resume()
    assert small_run.differing(before, small_run.tensors(trainer)) == []
    row.outcome = f"{change}: refused before anything is loaded"


def local_batches(shards, world, state, first, last, mask):
    """Batches of steps ``first .. last - 1`` of all ranks, put together; and the state after."""
    loaders = [
        Loader(shards, seq_len=8, global_batch=4, seed=3, rank=r, world_size=world,
               mask_documents=mask)
        for r in range(world)
    ]  # fmt: skip
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
        assert loader.step == first
    found = []
    for _ in range(first, last):
        parts = [next(loader) for loader in loaders]
        found.append(
            [torch.cat([getattr(p, n) for p in parts]) for n in ("input_ids", "sample_index")]
            + ([torch.cat([p.document_ids for p in parts])] if mask else [])
        )
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    return found, states[0]


@pytest.fixture(scope="module")
def shards(data):
    return TokenShards(data)


STEPS = 60
"""Four epochs and more."""


@pytest.mark.goal("R10", "resumed again and again: cuts, epochs, packing, world sizes at random")
def test_the_position_is_exact(shards, row):
    whole = {mask: local_batches(shards, 1, None, 0, STEPS, mask)[0] for mask in (True, False)}
    windows = Loader(shards, seq_len=8, global_batch=4).windows
    assert 3 * windows < STEPS * 4

    @settings(max_examples=100, deadline=None)
    @given(
        cuts=st.lists(st.tuples(st.integers(1, STEPS - 1), st.sampled_from([1, 2, 4])), max_size=6),
        mask=st.booleans(),
    )
    @example(cuts=[(step, 1 + step % 2) for step in range(1, STEPS)], mask=True)
    def check(cuts, mask):
        found, state, here = [], None, 0
        for step, world in [*sorted(dict(cuts).items()), (STEPS, 1)]:
            some, state = local_batches(shards, world, state, here, step, mask)
            found, here = found + some, step
        assert len(found) == STEPS
        for mine, expected in zip(found, whole[mask], strict=True):
            assert all(torch.equal(*pair) for pair in zip(mine, expected, strict=True))
        row.count()

    check()
    row.outcome = f"every batch of {STEPS} steps equal, over {STEPS * 4 // windows} epochs"


@pytest.mark.goal("control", "a position that is off by one after resuming")
def test_a_position_off_by_one_is_caught(shards, row):
    whole = local_batches(shards, 1, None, 0, 10, True)[0]
    _, state = local_batches(shards, 1, None, 0, 5, True)
    state["step"] += 1
    state["epoch"] = state["step"] * 4 // Loader(shards, seq_len=8, global_batch=4).windows
    rest, _ = local_batches(shards, 1, state, 6, 10, True)
    assert not torch.equal(rest[0][0], whole[5][0])
    row.outcome = "a position off by one: caught"
