"""Reading documents: every kind of file, in a fixed order, and damage located."""

import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from open_mythos.data import documents, read_documents
from open_mythos.data.corpus import TEXT_PIECE_BYTES
from open_mythos.errors import ConfigError, DataError, EnvironmentError_


def write_parquet(path, rows, column="text", kind=None) -> None:
    pq.write_table(pa.table({"id": list(range(len(rows))), column: pa.array(rows, kind)}), path)


def test_a_text_file_is_one_document(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\nb".encode())
    assert list(read_documents(tmp_path / "a.txt")) == ["é\r\nb"]


def test_a_long_text_file_is_cut_at_line_ends(tmp_path) -> None:
    text = "".join(f"line {i} é\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(read_documents(str(tmp_path / "a.txt")))
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode()) // (TEXT_PIECE_BYTES) + 1
    assert all(piece.endswith("\n") for piece in pieces)


def test_text_that_is_not_utf8_is_located(tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes(b"line\n" * 20_000 + b"\x80\x04pickle")
    with pytest.raises(DataError, match=r"a\.txt, byte 100000"):
        list(read_documents(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"abc\0")
    with pytest.raises(DataError, match=r"a\.txt, byte 3"):
        list(read_documents(tmp_path))


def test_jsonl_gives_a_document_per_line(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x\\n", "id": 1}\n\n{"text": ""}\n{"text": "é"}')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["x\n", "", "é"]


def test_jsonl_takes_a_named_field(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    assert list(read_documents(tmp_path / "a.jsonl", "body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "no field 'text'"),
        ('{"body": "x"}', "no field 'text'"),
        ('{"text": 3}', "not a string"),
        (r'{"text": "\ud800"}', "surrogate"),
        ('{"a":' * 100_000, "not JSON"),
        ('{"text": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\xfe\xfa", "not JSON"),
        (b"\x80\x04\x95", "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str | bytes, message: str) -> None:
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + content + b'\n{"text": "x"}\n')
    documents = read_documents(tmp_path / "a.jsonl")
    assert next(documents) == "fine"
    with pytest.raises(DataError, match=message) as caught:
        next(documents)
    assert "a.jsonl, byte 18" in str(caught.value)


def test_parquet_gives_a_document_per_row(tmp_path) -> None:
    rows = [f"row {i} é" for i in range(600)]
    write_parquet(tmp_path / "a.parquet", rows)
    assert list(read_documents(tmp_path / "a.parquet")) == rows
    write_parquet(tmp_path / "a.parquet", rows, "body", pa.large_string())
    assert list(read_documents(tmp_path / "a.parquet", "body")) == rows


def test_a_bad_parquet_row_is_named(tmp_path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2])
    with pytest.raises(DataError, match=r"a\.parquet, row 0"):
        list(read_documents(tmp_path))
    write_parquet(tmp_path / "a.parquet", ["x"], "body")
    with pytest.raises(DataError, match="no column 'text'"):
        list(read_documents(tmp_path))


@pytest.mark.parametrize("cut", [0, 3, 100, -1])
def test_a_cut_parquet_file_is_named(tmp_path, cut: int) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, ["some text"] * 100)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(read_documents(path))


def test_a_flipped_byte_under_a_parquet_checksum_is_found(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"number {i}" for i in range(2000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"number 700", b"numbes 700"))
    with pytest.raises(DataError, match=r"a\.parquet, row \d+"):
        list(read_documents(path))


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch) -> None:
    write_parquet(tmp_path / "a.parquet", ["x"])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EnvironmentError_, match=r"open-mythos\[data\]"):
        list(read_documents(tmp_path))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "z.txt").write_text("1")
    (tmp_path / "b" / "x.md").write_text("4")
    (tmp_path / "a" / "y.jsonl").write_text('{"text": "3"}')
    (tmp_path / "a" / "b.txt").write_text("2")
    (tmp_path / "a" / "model.pkl").write_bytes(b"\x80\x04never read")
    (tmp_path / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "a" / ".x.txt").write_text("hidden")
    assert list(read_documents(tmp_path)) == ["1", "2", "3", "4"]


def test_an_unreadable_file_is_an_environment_error(tmp_path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "missing.txt")
    with pytest.raises(EnvironmentError_, match=r"a\.txt"):
        list(read_documents(tmp_path))


def test_invalid_sources(tmp_path) -> None:
    with pytest.raises(DataError, match="no such source"):
        list(read_documents(tmp_path / "missing"))
    with pytest.raises(DataError, match="no file that can be read"):
        list(read_documents(tmp_path))
    (tmp_path / "a.pkl").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"\.jsonl, \.md, \.parquet"):
        list(read_documents(tmp_path / "a.pkl"))


def test_the_standard_library_is_a_corpus() -> None:
    documents = list(read_documents("stdlib"))
    assert documents == list(read_documents("stdlib"))
    assert sum(map(len, documents)) > 5_000_000
    assert any("class JSONEncoder(object)" in text for text in documents)
    assert not any("class TestDump:" in text for text in documents)


def test_a_line_has_a_limit(tmp_path, monkeypatch) -> None:
    """A file without line ends would be read whole."""
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 24)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "0123456789"}\n')  # 22 bytes and the line end
    assert list(read_documents(path)) == ["0123456789"]
    path.write_text('{"text": "x"}\n{"text": "0123456789ab"}\n')
    with pytest.raises(DataError, match=r"too long(.|\n)*a\.jsonl, byte 14(.|\n)*fewer than 24"):
        list(read_documents(path))


def test_a_pipe_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(DataError, match="not a regular file"):
        list(read_documents(tmp_path))
