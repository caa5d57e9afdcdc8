"""The stream: every document once an epoch, one order at every world size, exact resume."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data import Batch, Corpus, StreamLoader, open_corpus, stream_workers
from open_mythos.data.documents import read_unit
from open_mythos.data.stream_lanes import Deal, Position, StreamPlan
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
DOCUMENTS = [f"<{i}> " + "lorem ipsum " * (1 + i % 5) + "é" * (i % 3) for i in range(90)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path: Path, texts: list[str], rows: int) -> None:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path, row_group_size=rows)


def make_corpus(folder: Path, kind: str) -> Corpus:
    """DOCUMENTS in three files, and some that are empty."""
    texts = [*DOCUMENTS[:40], "", *DOCUMENTS[40:42], *DOCUMENTS[42:], ""]
    for number, part in enumerate((texts[:41], texts[41:43], texts[43:])):
        if kind == "jsonl" or (kind == "mixed" and number == 1):
            write_jsonl(folder / f"{number}.jsonl", part)
        else:
            write_parquet(folder / f"{number}.parquet", part, rows=7)
    return open_corpus(folder)


@pytest.fixture(scope="module", params=["jsonl", "parquet", "mixed"])
def corpus(request, tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), request.param)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("corpus"), "mixed")


class Rank(StreamLoader):
    """A rank without a process group, whose state has its own lanes only."""

    def _gather(self, mine: list[Position]) -> list[Position]:
        return mine


def ranks(corpus: Corpus, world_size: int, **options) -> list[StreamLoader]:
    options["world_size"] = world_size
    return [Rank(corpus, TOKENIZER, rank=rank, **options) for rank in range(world_size)]


def joined(parts: list[Batch]) -> list[torch.Tensor]:
    names = ["input_ids", "targets", "sample_index"]
    names += ["document_ids"] if parts[0].document_ids is not None else []
    return [torch.cat([getattr(part, name) for part in parts]) for name in names]


def joined_state(loaders: list[StreamLoader]) -> dict:
    """Join the states of all ranks, through JSON."""
    states = [loader.state_dict() for loader in loaders]
    lanes = [lane for state in states for lane in state["lanes"]]
    epoch = min(state["epoch"] for state in states)
    return json.loads(json.dumps(states[0] | {"lanes": lanes, "epoch": epoch}))


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def read_by_epoch(loader: StreamLoader, epochs: int) -> list[Counter[str]]:
    """Of each of the first epochs: how often the lanes together read each document.

    The position says of which epoch the first token of the next window is; with windows shorter
    than every document there is such a token in each.
    """
    lanes: list[list[int]] = [[] for _ in range(loader.global_batch)]
    epoch_of: list[dict[int, int]] = [{} for _ in lanes]  # document of a lane -> epoch
    state = {"epoch": 0}
    while state["epoch"] < epochs:
        batch = next(loader)
        state = loader.state_dict()
        for number, row in enumerate(batch.input_ids.tolist()):
            lanes[number] += row
            document, epoch = lanes[number].count(TOKENIZER.eos_id), state["lanes"][number][0]
            assert epoch_of[number].setdefault(document, epoch) == epoch
    counts: list[Counter[str]] = [Counter() for _ in range(epochs)]
    for tokens, epoch in zip(lanes, epoch_of, strict=True):
        documents = TOKENIZER.decode([10 if t == TOKENIZER.eos_id else t for t in tokens])
        for number, text in enumerate(documents.split("\n")):
            if epoch.get(number, epochs) < epochs:
                counts[epoch[number]][text] += 1
    return counts


@pytest.mark.parametrize("lanes", [1, 4, 24])
def test_each_epoch_reads_every_document_once(corpus, lanes: int) -> None:
    loader = StreamLoader(corpus, TOKENIZER, seq_len=8, global_batch=lanes)
    assert read_by_epoch(loader, 3) == [Counter(DOCUMENTS)] * 3


def test_eight_ranks_of_four_workers_read_all_of_fourteen_files(tmp_path, monkeypatch) -> None:
    """More lanes and more workers than there are files or row groups."""
    texts = [f"<{i}> some words to fill a document with" for i in range(14 * 9)]
    for file in range(14):
        write_parquet(tmp_path / f"{file:03d}.parquet", texts[file::14], rows=100)
    corpus = open_corpus(tmp_path)
    plan = StreamPlan(corpus, TOKENIZER, 32, 8, seed=0, held_out=0.0)
    read: Counter[str] = Counter()
    for rank in range(8):
        for worker in range(4):
            info = type("Info", (), {"id": worker, "num_workers": 4})
            monkeypatch.setattr(stream_workers, "get_worker_info", lambda info=info: info)
            lanes = list(range(rank * 4, rank * 4 + 4))
            windows = stream_workers.WorkerLanes(plan, lanes, [Position()] * 4)
            tokens, after = [], None
            for step in windows:
                assert len(step.ids) == 1  # each worker has one of the rank's four lanes
                if after is None or after.epoch == 0:
                    tokens += step.ids[0, :-1].tolist()
                after = step.after[0]
                if after.epoch:
                    break
            documents = TOKENIZER.decode([10 if t == TOKENIZER.eos_id else t for t in tokens])
            read.update(text for text in documents.split("\n") if text in texts)
    # the last window of a lane may hold the first documents of its second epoch
    assert set(read) == set(texts)
    assert sum(read.values()) - len(texts) <= 32 * 2


def test_the_deal_is_a_partition_and_stays_even() -> None:
    sizes = [1 + (i * 37) % 100 for i in range(200)]
    deal = Deal(sizes, 6, seed=3)
    loads = [0] * 6
    for epoch in range(20):
        shares = [deal.share(epoch, lane) for lane in range(6)]
        assert sorted(unit for share in shares for unit in share) == list(range(200))
        loads = [
            load + sum(sizes[unit] for unit in share)
            for load, share in zip(loads, shares, strict=True)
        ]
        assert max(loads) - min(loads) <= 2 * max(sizes)
    assert deal.share(0, 0) != Deal(sizes, 6, seed=4).share(0, 0)
    alone = Deal(sizes, 1, seed=3)
    assert alone.share(0, 0) != alone.share(1, 0)  # another order in every epoch


def test_a_lane_reads_its_share_in_order(mixed) -> None:
    plan = StreamPlan(mixed, TOKENIZER, 3, 16, seed=5, held_out=0.0)
    loader = StreamLoader(mixed, TOKENIZER, seq_len=16, global_batch=3, seed=5)
    lanes = torch.cat([next(loader).input_ids for _ in range(150)]).view(150, 3, 16)
    for lane in range(3):
        texts = [
            document.text
            for epoch in (0, 1)
            for unit in plan.deal.share(epoch, lane)
            for document in read_unit(mixed, plan.units[unit])
            if document.text
        ]
        expected = [t for text in texts for t in [*TOKENIZER.encode(text), TOKENIZER.eos_id]]
        got = lanes[:, lane].flatten().tolist()
        length = min(len(got), len(expected))
        assert length > 1500
        assert got[:length] == expected[:length]


def test_windows_follow_on_and_targets_are_the_next_tokens(mixed) -> None:
    loader = StreamLoader(mixed, TOKENIZER, seq_len=32, global_batch=4, mask_documents=True)
    before = next(loader)
    for step in range(1, 20):
        batch = next(loader)
        assert torch.equal(batch.input_ids[:, 1:], batch.targets[:, :-1])
        assert torch.equal(before.targets[:, -1], batch.input_ids[:, 0])
        assert batch.sample_index.tolist() == list(range(step * 4, step * 4 + 4))
        ends = batch.input_ids == TOKENIZER.eos_id
        assert torch.equal(batch.document_ids, ends.cumsum(1) - ends.long())
        before = batch


def phases(workers: st.SearchStrategy[int]) -> st.SearchStrategy[list]:
    """Parts of an interrupted run, each with its processes and the steps that it gets to."""
    world_size, prefetch = st.sampled_from([1, 2, 4]), st.integers(1, 3)
    skipped, steps = st.integers(0, 2), st.integers(0, 9)
    return st.lists(
        st.tuples(world_size, workers, prefetch, skipped, steps), min_size=1, max_size=4
    )


GEOMETRY = {
    "seq_len": st.integers(2, 200),
    "rows": st.integers(1, 3),
    "seed": st.integers(0, 2**40),
    "mask_documents": st.booleans(),
    "held_out": st.sampled_from([0.0, 0.3]),
}


def check_resumed_is_uninterrupted(corpus: Corpus, rows: int, parts: list, **options) -> None:
    options["global_batch"] = 4 * rows
    uninterrupted = StreamLoader(corpus, TOKENIZER, **options)
    state = uninterrupted.state_dict()
    for world_size, workers, prefetch, skipped, steps in parts:
        loaders = ranks(corpus, world_size, num_workers=workers, prefetch=prefetch, **options)
        for loader in loaders:
            loader.load_state_dict(state)
            loader.step += skipped
        for _ in range(skipped):
            next(uninterrupted)
        for _ in range(steps):
            batch = joined([next(loader) for loader in loaders])
            assert equal(batch, joined([next(uninterrupted)]))
        state = joined_state(loaders)
        assert state == uninterrupted.state_dict()


@pytest.mark.parametrize("examples", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_resuming_anywhere_at_any_world_size_is_exact(mixed, examples) -> None:
    @settings(max_examples=examples)
    @given(parts=phases(st.just(0)), **GEOMETRY)
    def check(rows, parts, **options) -> None:
        check_resumed_is_uninterrupted(mixed, rows, parts, **options)

    check()


@pytest.mark.parametrize("examples", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_resuming_with_any_number_of_workers_is_exact(mixed, examples) -> None:
    @settings(max_examples=examples)
    @given(parts=phases(st.integers(0, 2)), **GEOMETRY)
    def check(rows, parts, **options) -> None:
        check_resumed_is_uninterrupted(mixed, rows, parts, **options)

    check()


def test_only_the_last_batch_can_be_requested_again(mixed) -> None:
    loader = StreamLoader(mixed, TOKENIZER, seq_len=16, global_batch=2)
    first = loader.next_batch(0)
    assert equal(joined([first]), joined([loader.next_batch(0)]))
    second = loader.next_batch(1)
    assert not torch.equal(first.input_ids, second.input_ids)
    assert loader.step == 1  # who asks for step 1 has done step 0
    other = StreamLoader(mixed, TOKENIZER, seq_len=16, global_batch=2)
    other.load_state_dict(loader.state_dict())
    assert equal(joined([next(other)]), joined([second]))
    for step in (0, 3, -1):
        with pytest.raises(ConfigError, match="at another step"):
            loader.next_batch(step)
    loader.step += 2
    assert loader.step == 3
    with pytest.raises(ConfigError, match="allowed: 3"):
        loader.next_batch(4)


def test_the_state_is_that_of_the_steps_done(mixed) -> None:
    """A trainer counts a step after it has taken the batch; it may save before or after."""
    loader = StreamLoader(mixed, TOKENIZER, seq_len=16, global_batch=2)
    for step in range(3):
        loader.next_batch(step)
        loader.step = step + 1
    at_three = loader.state_dict()
    third = loader.next_batch(3)
    assert loader.state_dict() == at_three  # step 3 is not done yet
    loader.step = 4
    assert loader.state_dict()["step"] == 4
    loader.load_state_dict(at_three)
    assert equal(joined([loader.next_batch(3)]), joined([third]))
    with pytest.raises(ConfigError, match="cannot move backwards"):
        loader.step = 2


def test_setting_the_step_skips_batches(mixed) -> None:
    """As after a rollback: an old position is loaded, and the steps since are skipped."""
    options = {"seq_len": 16, "global_batch": 2}
    loader, other = (StreamLoader(mixed, TOKENIZER, **options) for _ in range(2))
    saved = loader.state_dict()
    batches = [next(loader) for _ in range(8)]
    later = loader.state_dict()
    loader.load_state_dict(saved)
    loader.step = 5
    assert loader.step == 5
    with pytest.raises(ConfigError, match="allowed: 5"):
        loader.next_batch(0)
    assert equal(joined([loader.next_batch(5)]), joined([batches[5]]))
    loader.step = 6
    loader.step = 8
    with pytest.raises(ConfigError, match="allowed: 8"):
        loader.next_batch(6)
    assert loader.state_dict() == later
    other.load_state_dict(later)
    assert equal(joined([loader.next_batch(8)]), joined([other.next_batch(8)]))
    loader.step += 2  # step 8 was read but not finished: it is skipped too
    other.step = 10
    assert equal(joined([loader.next_batch(10)]), joined([next(other)]))


def test_seeds_and_epochs_give_other_orders(mixed) -> None:
    def order(seed: int, first: int) -> list:
        loader = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=1, seed=seed)
        loader.step += first
        return [next(loader).input_ids.tolist() for _ in range(5)]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 55)  # an epoch is 55 windows and a half


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 1}),
        ("seq_len", {"seq_len": 32}),
        ("global_batch", {"global_batch": 2}),
        ("mask_documents", {"mask_documents": True}),
        ("held_out", {"held_out": 0.5}),
    ],
)
def test_another_geometry_is_rejected_by_name(mixed, field: str, change: dict) -> None:
    saved = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4)
    saved.step += 2
    other = StreamLoader(mixed, TOKENIZER, **({"seq_len": 64, "global_batch": 4} | change))
    with pytest.raises(DataError, match="lanes" if field == "global_batch" else f"{field}: saved"):
        other.load_state_dict(saved.state_dict())
    assert other.step == 0


def test_another_corpus_or_tokenizer_is_rejected_by_name(mixed, tmp_path) -> None:
    make_corpus(tmp_path, "mixed")
    state = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4).state_dict()
    same = StreamLoader(open_corpus(tmp_path), TOKENIZER, seq_len=64, global_batch=4)
    same.load_state_dict(state)  # wherever the files lie
    text = (tmp_path / "1.jsonl").read_text()
    (tmp_path / "1.jsonl").write_text(text.replace("lorem", "LOREM", 1))
    other = StreamLoader(open_corpus(tmp_path), TOKENIZER, seq_len=64, global_batch=4)
    with pytest.raises(DataError, match="corpus: saved"):
        other.load_state_dict(state)
    tokenizer = ByteTokenizer()
    tokenizer.fingerprint = "0" * 64
    other = StreamLoader(mixed, tokenizer, seq_len=64, global_batch=4)
    with pytest.raises(DataError, match="tokenizer: saved"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": True}, {"step": None}, {"epoch": 3}, {"extra": 1}, {"format": 0},
        {"lanes": None}, {"lanes": []}, {"lanes": [[0, 0, 0]] * 4}, {"lanes": [[0, 0, 0, -1]] * 4},
        {"lanes": [[0, 0, 0, 0.0]] * 4},
    ],
)  # fmt: skip
def test_a_malformed_state_is_rejected(mixed, change: dict) -> None:
    loader = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4)
    loader.step += 1
    with pytest.raises(DataError, match=next(iter(change))):
        loader.load_state_dict(loader.state_dict() | change)
    assert loader.step == 1


@pytest.mark.parametrize("state", [{}, None, [], {"step": 0}])
def test_a_state_with_missing_fields_is_rejected(mixed, state: object) -> None:
    with pytest.raises(DataError):
        StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4).load_state_dict(state)


def test_a_position_past_its_document_is_rejected(mixed) -> None:
    loader = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4)
    loader.step += 1
    state = loader.state_dict()
    state["lanes"][2][3] = 10**6
    loader.load_state_dict(state)
    with pytest.raises(DataError, match="lane 2"):
        next(loader)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("global_batch", {"global_batch": 0}),
        ("global_batch", {"global_batch": 3, "world_size": 2}),
        ("rank", {"rank": 2, "world_size": 2}),
        ("world_size", {"world_size": 0}),
        ("seq_len", {"seq_len": 0}),
        ("num_workers", {"num_workers": -1}),
        ("prefetch", {"prefetch": 0}),
        ("held_out", {"held_out": 1.0}),
        ("held_out", {"held_out": -0.1}),
    ],
)
def test_impossible_settings_are_rejected(mixed, field: str, options: dict) -> None:
    with pytest.raises(ConfigError, match=field):
        StreamLoader(mixed, TOKENIZER, **({"seq_len": 64, "global_batch": 4} | options))


def test_several_ranks_need_a_process_group(mixed) -> None:
    loader = StreamLoader(mixed, TOKENIZER, seq_len=64, global_batch=4, world_size=2)
    with pytest.raises(ConfigError, match="not in the process group"):
        loader.state_dict()


def test_a_corpus_without_text_is_an_error_and_no_endless_loop(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", ""])
    loader = StreamLoader(open_corpus(tmp_path), TOKENIZER, seq_len=8, global_batch=3)
    with pytest.raises(DataError, match="holds no text to train on"):
        next(loader)


def test_one_document_is_enough(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["abc"])
    loader = StreamLoader(open_corpus(tmp_path), TOKENIZER, seq_len=10, global_batch=3)
    for _ in range(4):
        for row in next(loader).input_ids.tolist():
            assert sorted(row) == sorted((row * 2)[:10])
            assert set(row) == {97, 98, 99, TOKENIZER.eos_id}


def test_a_tokenizer_that_leaves_its_vocabulary_is_named(mixed) -> None:
    class Wrong(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return [*super().encode(text), self.vocab_size]

    loader = StreamLoader(mixed, Wrong(), seq_len=64, global_batch=2)
    with pytest.raises(DataError, match="outside its vocabulary"):
        next(loader)


def test_an_error_leaves_the_position_where_it_was(tmp_path) -> None:
    corpus = make_corpus(tmp_path, "parquet")
    loader = StreamLoader(corpus, TOKENIZER, seq_len=64, global_batch=2)
    whole = [next(loader) for _ in range(30)]
    loader = StreamLoader(corpus, TOKENIZER, seq_len=64, global_batch=2)
    (tmp_path / "2.parquet").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"2\.parquet"):
        [next(loader) for _ in range(30)]
    position = loader.step
    assert loader.state_dict()["step"] == position < 30
    (tmp_path / "away").rename(tmp_path / "2.parquet")
    for step in range(position, 30):
        assert equal(joined([next(loader)]), joined([whole[step]]))
