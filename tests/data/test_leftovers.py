"""Preparing: leftovers of killed processes, texts without text, sources that are no files."""

from __future__ import annotations

import json
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from open_mythos.data import documents, prepare, read_documents
from open_mythos.data.index import Index, read_index
from open_mythos.data.loader import PackedWindows
from open_mythos.data.shards import TokenShards
from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import locked
from open_mythos.run_folder import LOCK_FILE, read_config, write_config
from open_mythos.tokenizer import ByteTokenizer

TOK = ByteTokenizer()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    names = (".out.0123abcd.partial", ".out.ffffffff.partial", ".out.mine.partial", "out.b.partial")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "train-00000.tokens.bin").write_bytes(b"1" * 100)
    with locked(tmp_path / names[1] / LOCK_FILE):  # of a process that works
        prepare(["abc"], tmp_path / "out", TOK, val_fraction=0.0)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*names[1:], "out"}
    assert not (tmp_path / "out" / LOCK_FILE).exists()
    prepare(["abc"], tmp_path / "out", TOK, val_fraction=0.0, overwrite=True)
    assert names[1] not in {path.name for path in tmp_path.iterdir()}


def test_two_that_prepare_into_one_folder(tmp_path: Path) -> None:
    """The last one's shards are whole, and nothing is left beside them."""
    texts = [f"document {i}" for i in range(40)]

    def once(_: int) -> None:
        prepare(texts, tmp_path / "out", TOK, val_fraction=0.5, overwrite=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(once, range(4)))
    TokenShards(tmp_path / "out").verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_another_process_replaces_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """It is looked at again, and what the other one has put there is replaced."""
    out, other = tmp_path / "out", tmp_path / "other"
    for folder in (out, other):
        prepare(["theirs"], folder, TOK, val_fraction=0.0)

    def replaced(folder: Path) -> Index:
        monkeypatch.undo()
        folder.rename(tmp_path / "gone")
        other.rename(folder)
        return read_index(tmp_path / "nothing")

    monkeypatch.setattr(sys.modules["open_mythos.data.prepare"], "read_index", replaced)
    prepare(["mine"], out, TOK, val_fraction=0.0, overwrite=True)
    assert TokenShards(out).info.text_bytes == len("mine")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentError_, match="shards cannot be written"):
        prepare(["abc"], tmp_path / "file" / "out", TOK)


def test_texts_without_text_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"text": text}) for text in ("ab", None, "", "cd")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        index = prepare(tmp_path / "a.jsonl", tmp_path / "out", TOK, val_fraction=0.0)
    assert index.splits["train"].documents == 2
    assert "2 documents are left out: they hold no text" in caplog.text
    caplog.clear()
    prepare(["ab"], tmp_path / "full", TOK, val_fraction=0.0)
    assert not caplog.text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_the_limit_of_a_line_is_named(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 1 << 17)
    text = "東" * 70_000  # 210,000 bytes in one line
    line = json.dumps({"text": text}, ensure_ascii=False) if name == "a.jsonl" else text
    (tmp_path / name).write_text(line, encoding="utf-8")
    with pytest.raises(DataError, match="line is too long") as caught:
        list(read_documents(tmp_path / name))
    assert "131,072" in str(caught.value)


def test_a_pipe_is_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="pipe") as caught:
        list(read_documents(tmp_path / "pipe.txt"))
    assert "to a file first" in str(caught.value)


@pytest.mark.parametrize(("split", "way"), [("train", "lower val"), ("val", "raise val")])
def test_a_short_split_says_which_way_to_turn(tmp_path: Path, split: str, way: str) -> None:
    texts = [f"document {i}" for i in range(40)]
    prepare(texts, tmp_path / "out", TOK, val_fraction=0.5)
    with pytest.raises(DataError, match="shorter than one window") as caught:
        PackedWindows(TokenShards(tmp_path / "out", split), 10_000, False)
    assert way in str(caught.value)


def test_a_configuration_of_the_user_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    write_config(tmp_path, {"train": {"steps": 1}})
    write_config(tmp_path, {"train": {"steps": 2}})  # our own is replaced
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    for text in ("# mine\ntrain: {steps: 2}\n", "train: [\n"):
        file.write_text(text)
        write_config(tmp_path, {"train": {"steps": 3}})
        assert read_config(file) == {"train": {"steps": 3}}
    assert (tmp_path / "run.before.yaml").read_text().startswith("# mine")
    assert (tmp_path / "run.before-2.yaml").read_text() == "train: [\n"
    file.write_text("# mine\ntrain: {steps: 4}\n")
    write_config(tmp_path, {"train": {"steps": 4}})
    assert file.read_text().startswith("# mine"), "it says the same"
