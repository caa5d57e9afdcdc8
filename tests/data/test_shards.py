"""Reading shards: the flat view, and that damage is found and located."""

import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from open_mythos.data import TokenShards, prepare
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import ByteTokenizer

FIRST = "train-00000.tokens.bin"


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the prepared folder that a test may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@settings(deadline=None)
@given(data=st.data())
def test_any_range_equals_the_files_in_a_row(shards, data) -> None:
    files = [np.fromfile(shards.path / s.tokens.file, "<u2") for s in shards.info.shards]
    flat = np.concatenate(files)
    start = data.draw(st.integers(0, len(flat) - 1))
    length = data.draw(st.integers(1, len(flat) - start))
    tokens = shards.tokens(start, length)
    assert tokens.dtype == np.int64
    assert (tokens == flat[start : start + length]).all()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 0), (0, 1 << 40), (1 << 40, 1)])
def test_tokens_outside_the_split_are_rejected(shards, start: int, length: int) -> None:
    with pytest.raises(ConfigError, match="no such tokens"):
        shards.tokens(start, length)


def test_the_last_token_is_the_last(shards) -> None:
    assert shards.tokens(len(shards) - 1, 1).tolist() == [shards.eos_id]
    with pytest.raises(ConfigError, match="no such tokens"):
        shards.tokens(len(shards) - 1, 2)


def test_an_intact_folder_verifies(shards, folder) -> None:
    shards.verify()
    TokenShards(folder, "val").verify()


@pytest.mark.parametrize("kind", ["tokens", "starts"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "longer"])
def test_opening_finds_files_of_another_size(copy, kind: str, damage: str) -> None:
    file = copy / f"train-00001.{kind}.bin"
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": content[:-1], "longer": content + b"x"}[damage])
    end = {"missing": 0, "empty": 0, "cut": len(content) - 1, "longer": len(content) + 1}[damage]
    with pytest.raises(DataError, match=rf"train-00001\.{kind}\.bin.*byte {end}"):
        TokenShards(copy)


def test_a_file_cut_under_an_open_reader_is_located(copy) -> None:
    shards = TokenShards(copy)
    os.truncate(copy / FIRST, 20)
    assert len(shards.tokens(0, 10)) == 10
    with pytest.raises(DataError, match=rf"{FIRST}, byte 20"):
        shards.tokens(5, 100)
    (copy / FIRST).unlink()
    with pytest.raises(DataError, match=FIRST):
        shards.tokens(0, 1)


def test_an_impossible_id_is_located(copy) -> None:
    content = bytearray((copy / FIRST).read_bytes())
    content[60:62] = (320).to_bytes(2, "little")  # the first id that is none
    (copy / FIRST).write_bytes(content)
    shards = TokenShards(copy)
    assert len(shards.tokens(0, 30)) == 30
    with pytest.raises(DataError, match=rf"{FIRST}, byte 60"):
        shards.tokens(0, 31)


@pytest.mark.parametrize("number", range(12))
def test_hashes_find_a_flipped_bit_in_any_file(copy, number: int) -> None:
    shards = TokenShards(copy)
    files = sorted(copy.glob("train-*.bin"))
    file = files[number % len(files)]
    content = bytearray(file.read_bytes())
    content[len(content) * number // 12] ^= 1 << (number % 8)
    file.write_bytes(content)
    with pytest.raises(DataError, match=file.name):
        shards.verify()


def test_hashes_locate_the_block(tmp_path, monkeypatch) -> None:
    for module in ("open_mythos.files", "open_mythos.data.shards"):
        monkeypatch.setattr(f"{module}.HASH_BLOCK_BYTES", 64)
    prepare(["x" * 200], tmp_path / "a", ByteTokenizer(), val_fraction=0)
    file = tmp_path / "a" / FIRST
    content = bytearray(file.read_bytes())
    content[130] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="byte 128"):
        TokenShards(tmp_path / "a").verify()


def test_the_fingerprint_follows_the_tokens(folder, shards, documents, tmp_path) -> None:
    def fingerprint(texts: list[str], **options: float) -> str:
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        prepare(texts, tmp_path / "a", ByteTokenizer(), shard_tokens=500, **options)
        return TokenShards(tmp_path / "a").fingerprint

    assert fingerprint(documents, val_fraction=0.1) == shards.fingerprint
    assert fingerprint(documents, val_fraction=0.2) != shards.fingerprint
    assert fingerprint([*documents[:-1], "changed"], val_fraction=0.1) != shards.fingerprint
    assert TokenShards(folder, "val").fingerprint != shards.fingerprint


def test_a_folder_without_an_index(tmp_path) -> None:
    with pytest.raises(DataError, match="not a prepared folder"):
        TokenShards(tmp_path)


def change(index: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        index = index[int(key)] if isinstance(index, list) else index[key]
    if value is None:
        del index[last]
    else:
        index[last] = value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "other"),
        ("version", 2),
        ("version", None),
        ("dtype", "object"),
        ("vocab_size", "320"),
        ("eos_id", -1),
        ("eos_id", True),
        ("tokenizer_fingerprint", 3),
        ("splits", []),
        ("splits.train", 7),
        ("splits.train.tokens", 10**9),
        ("splits.train.documents", 1),
        ("splits.train.shards", []),
        ("splits.train.shards", {}),
        ("splits.train.shards.0", "x"),
        ("splits.train.shards.0.tokens.items", 0),
        ("splits.train.shards.0.tokens.items", 2.5),
        ("splits.train.shards.0.tokens.file", "../copy/train-00000.tokens.bin"),
        ("splits.train.shards.0.tokens.file", "/dev/zero"),
        ("splits.train.shards.0.tokens.file", ".."),
        ("splits.train.shards.0.tokens.sha256", "abc"),
        ("splits.train.shards.0.tokens.sha256", []),
    ],
)
def test_a_damaged_index_is_named(copy, field: str, value: object) -> None:
    index = json.loads((copy / "index.json").read_text())
    parents = field.split(".")
    if parents[-1].isdigit():
        index["splits"]["train"]["shards"][int(parents[-1])] = value
    else:
        change(index, field, value)
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json"):
        TokenShards(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a":' * 100_000])
def test_an_unreadable_index_is_named(copy, content: bytes) -> None:
    (copy / "index.json").write_bytes(content)
    with pytest.raises(DataError, match=r"index\.json"):
        TokenShards(copy)
