"""Preparing: what is written, how it is split, and that failures leave nothing behind."""

import errno
import os

import numpy as np
import pytest

from open_mythos.data import TokenShards, prepare
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer

BYTE = ByteTokenizer()


class WideTokenizer(ByteTokenizer):
    """Needs 32 bits, and can be told to give an impossible id."""

    vocab_size = 1 << 17
    shift = 1 << 16

    def encode(self, text: str) -> list[int]:
        return [i + self.shift for i in super().encode(text)]


def texts_of(folder, split: str) -> list[str]:
    shards = TokenShards(folder, split)
    starts, first = [], 0
    for shard in shards.info.shards:
        starts += [first + int(i) for i in np.fromfile(folder / shard.starts.file, "<u8")]
        first += shard.tokens.items
    documents = np.split(shards.tokens(0, len(shards)), starts[1:])
    assert all(document[-1] == BYTE.eos_id for document in documents)
    return [BYTE.decode(document) for document in documents]


def test_every_document_is_there_once_and_ended(folder, documents) -> None:
    train, val = texts_of(folder, "train"), texts_of(folder, "val")
    assert sorted(train + val) == sorted(documents)
    assert [text for text in documents if text in set(train)] == train
    shards = TokenShards(folder)
    assert len(shards) == sum(len(text.encode()) + 1 for text in train)
    assert shards.info.text_bytes == sum(len(text.encode()) for text in train)
    assert shards.bytes_per_token == shards.info.text_bytes / len(shards)


def test_shards_close_at_the_document_that_fills_them(shards) -> None:
    sizes = [shard.tokens.items for shard in shards.info.shards]
    assert len(sizes) > 5
    assert all(500 <= size < 500 + 120 for size in sizes[:-1])


def test_a_shard_that_is_exactly_full_closes(tmp_path) -> None:
    index = prepare(["123", "456", "7"], tmp_path / "a", BYTE, shard_tokens=4, val_fraction=0)
    assert [shard.tokens.items for shard in index.splits["train"].shards] == [4, 4, 2]


def test_the_split_depends_on_the_document_and_not_on_its_place(tmp_path, documents) -> None:
    prepare(documents[::-1] + documents[:9], tmp_path / "a", BYTE, val_fraction=0.3)
    prepare(documents, tmp_path / "b", BYTE, val_fraction=0.3)
    assert set(texts_of(tmp_path / "a", "val")) == set(texts_of(tmp_path / "b", "val"))
    assert not set(texts_of(tmp_path / "a", "val")) & set(texts_of(tmp_path / "a", "train"))
    assert 15 < len(texts_of(tmp_path / "b", "val")) < 60
    # a larger share contains the smaller one
    prepare(documents, tmp_path / "c", BYTE, val_fraction=0.5)
    assert set(texts_of(tmp_path / "b", "val")) < set(texts_of(tmp_path / "c", "val"))


def test_preparing_twice_gives_the_same_bytes(tmp_path, documents) -> None:
    for name in "ab":
        prepare(documents, tmp_path / name, BYTE, shard_tokens=900, val_fraction=0.1)
    for file in (tmp_path / "a").rglob("*.*"):
        other = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert file.read_bytes() == other.read_bytes()


def test_the_files_are_plain_integers(folder) -> None:
    shards = TokenShards(folder)
    raw = np.fromfile(folder / "train-00000.tokens.bin", "<u2")
    assert (raw == shards.tokens(0, len(raw))).all()
    starts = np.fromfile(folder / "train-00000.starts.bin", "<u8")
    assert starts[0] == 0
    assert (raw[starts[1:] - 1] == BYTE.eos_id).all()


def test_a_large_vocabulary_takes_32_bits(tmp_path) -> None:
    index = prepare(["abc", "d"], tmp_path / "a", WideTokenizer(), val_fraction=0)
    assert index.dtype == "uint32"
    assert TokenShards(tmp_path / "a").tokens(0, 2).tolist() == [65536 + 97, 65536 + 98]


def test_an_id_outside_the_vocabulary_is_rejected(tmp_path) -> None:
    tokenizer = WideTokenizer()
    tokenizer.shift = 1 << 17
    with pytest.raises(DataError, match="outside its vocabulary"):
        prepare(["abc"], tmp_path / "a", tokenizer, val_fraction=0)


def test_a_prepared_folder_describes_itself(tmp_path, documents) -> None:
    bpe = BPETokenizer.train(documents, 300)
    prepare(documents, tmp_path / "a", bpe, val_fraction=0)
    shards = TokenShards(tmp_path / "a")
    end = 1 + shards.tokens(0, len(shards)).tolist().index(bpe.eos_id)
    assert shards.tokenizer().decode(shards.tokens(0, end)) == documents[0]
    assert shards.index.tokenizer == bpe.name
    BYTE.save(tmp_path / "a" / "tokenizer")
    with pytest.raises(DataError, match="not the one"):
        shards.tokenizer()


def test_files_are_a_source_too(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_text('{"body": "x"}\n{"body": ""}\n{"body": "yz"}\n')
    prepare(tmp_path / "in.jsonl", tmp_path / "a", BYTE, val_fraction=0, text_field="body")
    assert texts_of(tmp_path / "a", "train") == ["x", "yz"]


def test_progress_counts_documents_and_tokens(tmp_path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(["ab"] * 300, tmp_path / "a", BYTE, val_fraction=0, progress=lambda *n: seen.append(n))
    assert seen == [(256, 768), (300, 900)]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path) -> None:
    out = tmp_path / "a"
    prepare(["old"], out, BYTE, val_fraction=0)
    with pytest.raises(ConfigError, match="exists"):
        prepare(["new"], out, BYTE, val_fraction=0)
    assert texts_of(out, "train") == ["old"]
    prepare(["new"], out, BYTE, val_fraction=0, overwrite=True)
    assert texts_of(out, "train") == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_was_not_prepared_is_never_replaced(tmp_path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="exists"):
        prepare(["x"], tmp_path / "thesis", BYTE, overwrite=True)
    assert (tmp_path / "thesis" / "thesis.tex").exists()


def failing_source():
    yield "fine"
    raise KeyboardInterrupt


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_run_leaves_what_was_there(tmp_path, overwrite: bool) -> None:
    if overwrite:
        prepare(["old"], tmp_path / "a", BYTE, val_fraction=0)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        prepare(failing_source(), tmp_path / "a", BYTE, overwrite=overwrite)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("call", range(1, 8))
def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path, monkeypatch, call: int) -> None:
    real, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(EnvironmentError_, match="No space left"):
        prepare([f"text {i}" for i in range(9)], tmp_path / "a", BYTE, val_fraction=0.5)
    if call <= 6:  # the tokenizer, two files in each of two splits, then their folder
        assert list(tmp_path.iterdir()) == []
    else:  # it has its name already, so it is complete
        TokenShards(tmp_path / "a").verify()


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentError_, match="file"):
        prepare(["x"], tmp_path / "file" / "a", BYTE)


def test_nothing_to_train_on_is_an_error(tmp_path) -> None:
    for source in ([], ["", ""]):
        with pytest.raises(DataError, match="no training document"):
            prepare(source, tmp_path / "a", BYTE)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_validation_split_warns_and_is_left_out(tmp_path, caplog) -> None:
    prepare(["x"], tmp_path / "a", BYTE, val_fraction=1e-9)
    assert "no validation split" in caplog.text
    with pytest.raises(DataError, match="no split 'val'"):
        TokenShards(tmp_path / "a", "val")


@pytest.mark.parametrize("bad", [{"val_fraction": 1}, {"val_fraction": -0.1}, {"shard_tokens": 0}])
def test_bad_arguments_are_rejected_before_anything_is_read(tmp_path, bad: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        prepare(failing_source(), tmp_path / "a", BYTE, **bad)
