"""Folders and files with more than plain text: nothing is left out or taken in silently."""

from __future__ import annotations

import gzip
import io

import pytest

from open_mythos.data import documents, open_corpus, prepare, read_documents
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError, DataError, MythosError
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer
from open_mythos.tokenizer.loading import load_or_train


def test_what_is_left_out_is_named(tmp_path, caplog):
    (tmp_path / "part0.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "README.md").write_text("# licence")
    (tmp_path / "a.json").write_text("[]")
    assert list(read_documents(tmp_path)) == ["one"]
    assert all(name in caplog.text for name in ("README.md", ".json", "2 files"))


def test_a_compressed_part_is_refused(tmp_path):
    (tmp_path / "part0.txt").write_text("one")
    (tmp_path / "part1.txt.gz").write_bytes(gzip.compress(b"two"))
    with pytest.raises(DataError, match="compressed"):
        open_corpus(tmp_path)


def test_a_folder_of_a_readme_alone_is_text(tmp_path):
    (tmp_path / "README.md").write_text("about")
    assert list(read_documents(tmp_path)) == ["about"]


def test_a_null_is_an_empty_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": null}\n')
    assert list(read_documents(path)) == ["a", ""]
    assert (
        prepare(path, tmp_path / "out", ByteTokenizer(), val_fraction=0).splits["train"].documents
        == 1
    )


def test_a_null_of_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    raw = io.BytesIO()
    pq.write_table(pa.table({"text": ["a", None, "b"]}), raw)
    (tmp_path / "a.parquet").write_bytes(raw.getvalue())
    assert list(read_documents(tmp_path / "a.parquet")) == ["a", "", "b"]


@pytest.mark.parametrize(
    "options",
    [
        {},  # one entry of a dictionary in every row
        {"use_dictionary": False, "column_encoding": "DELTA_BYTE_ARRAY"},  # one beginning in all
    ],
)
def test_a_small_file_of_endless_text_is_refused(tmp_path, monkeypatch, options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "FREE_TEXT", 1 << 16)
    monkeypatch.setattr(documents, "_BATCH_BYTES", 1 << 20)
    path, text = tmp_path / "a.parquet", "x" * (1 << 18)
    pq.write_table(pa.table({"text": [text] * 64}), path, compression="zstd", **options)
    assert path.stat().st_size < 1024
    before, texts = pa.total_allocated_bytes(), read_documents(path)
    assert next(texts) == text
    assert pa.total_allocated_bytes() - before < 16 * len(text)  # of 64 rows
    with pytest.raises(DataError, match=r"(?s)far more text.*row 1\b"):
        list(texts)
    with pytest.raises(DataError, match="far more text"):
        prepare(path, tmp_path / "out", ByteTokenizer())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["x" * 10_000, None])
def test_a_file_that_says_how_much_it_holds_is_refused_at_once(tmp_path, monkeypatch, text):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(documents, "FREE_TEXT", 1 << 10)
    monkeypatch.setattr(documents, "MAX_EXPANSION", 100)
    table = pa.table({"text": pa.array([text] * (1000 if text else 10**6), pa.string())})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=not text)
    with pytest.raises(DataError, match=r"(?s)far more text.*a\.parquet\n"):
        next(read_documents(tmp_path / "a.parquet"))


def test_an_archive_is_no_source(tmp_path):
    with pytest.raises(ConfigError, match="unpack"):
        open_corpus(f"zip://a.txt::{tmp_path}/a.zip")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    text = "one" if name == "a.txt" else '{"text": "one"}\n'
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert list(read_documents(tmp_path / name)) == ["one"]


def test_an_empty_source_is_called_empty(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="lower val_fraction"):
        prepare(tmp_path / "a.txt", tmp_path / "out", ByteTokenizer(), val_fraction=0.999999)
    with pytest.raises(DataError, match="no document with text"):
        prepare([""], tmp_path / "out", ByteTokenizer())


def test_overwriting_removes_nothing_but_shards(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    (site / "index.json").write_text("{}")
    with pytest.raises(ConfigError, match="exists"):
        prepare(["a"], site, ByteTokenizer(), val_fraction=0, overwrite=True)
    prepare(["a"], tmp_path / "out", ByteTokenizer(), val_fraction=0)
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        prepare(["b"], tmp_path / "out", ByteTokenizer(), val_fraction=0, overwrite=True)
    (tmp_path / "out" / "mine.txt").unlink()
    prepare(["b"], tmp_path / "out", ByteTokenizer(), val_fraction=0, overwrite=True)


@pytest.mark.parametrize("size", ["99999999999", "\u00b2", "x", ""])
def test_a_vocabulary_that_nothing_could_hold(size):
    with pytest.raises(ConfigError, match="vocabulary size"):
        load_or_train(f"bpe:{size}", ["a"])


def test_an_impossible_vocabulary_never_aborts_the_process():
    with pytest.raises(ConfigError, match="so large"):
        BPETokenizer.train(["abc"], 10**10)


@pytest.mark.parametrize("name", ["mps", "xpu", "nonsense"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(MythosError, match="device"):
        resolve_device(name)
