"""Reading the documents of a corpus.

A failed read is retried. Damaged input raises a DataError that names the file and the row or byte.
Nothing that is read is executed or unpickled.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import logging
import time
import tokenize
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from open_mythos.checks import checked
from open_mythos.data.corpus import STDLIB, TEXT_PIECE_BYTES, Corpus, Unit, open_corpus, text_pieces
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.tokenizer.interface import Tokenizer, checked_text

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Delays before each retry of a failed read; after the last one it is an error."""
MAX_LINE_BYTES = 1 << 28
PARQUET_ROWS = 256
MAX_EXPANSION = 1000
"""Characters of text, an empty row counted as one, per byte of a Parquet file (prose packs 3 to 10
into a byte); a file may hold FREE_TEXT more. Beyond, it was made to fill memory and disk."""
FREE_TEXT = 1 << 24
_BATCH_BYTES = 1 << 29
_BUFFER_BYTES = 1 << 20
_RESTORE = "restore it, or start a new run on the present corpus"


class Document(NamedTuple):
    """A text and its place in the unit."""

    cursor: int
    """Row of a Parquet unit, byte of a JSONL unit or piece of a text unit; ascending."""
    text: str


class _ReadFailedError(OSError):
    """The file system failed; a retry may succeed."""


@checked
def read_documents(source: str | Path, text_field: str = "text") -> Iterator[str]:
    """Read the documents of ``source``, always in the same order.

    Args:
        source: As for :func:`~open_mythos.data.open_corpus`: ``"stdlib"``, a file, a folder or a
            URL. A ``.txt``, ``.md`` or ``.py`` file is one document, or one per 64 KiB, split at
            line ends; ``.jsonl`` has one per line; ``.parquet`` one per row.
        text_field: The JSON key or Parquet column that holds the text.

    Raises:
        ConfigError: A file of an unknown kind.
        DataError: The source does not exist, or a file is damaged.
        EnvironmentError_: A file cannot be read, or a package is missing.
    """
    yield from documents_of(open_corpus(source, text_field))


def documents_of(corpus: Corpus) -> Iterator[str]:
    """Read the documents of ``corpus``, file by file."""
    for file in range(len(corpus.files)):
        for document in read_unit(corpus, Unit(file, 0, 1)):
            yield document.text


def check_share(where: str, share: float) -> None:
    """Raise a ConfigError unless the held-out ``share`` is in [0, 1)."""
    if not 0 <= share < 1:
        raise ConfigError("not a fraction", where=where, value=share, allowed="[0, 1)")


def is_held_out(text: str, share: float) -> bool:
    """Decide by a hash of ``text`` whether it belongs to the held-out ``share`` of documents."""
    if not share:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=6, person=b"mythos-split").digest()
    return int.from_bytes(digest, "big") / 2**48 < share


def with_end(ids: list[int], tokenizer: Tokenizer, where: str) -> Int64Array:
    """Append the end-of-document token: (length + 1,); raise a DataError for an invalid id."""
    array = np.array([*ids, tokenizer.eos_id], np.int64)
    if array.min() < 0 or array.max() >= tokenizer.vocab_size:
        raise DataError(
            "the tokenizer returned an id outside its vocabulary", where=where,
            value=(int(array.min()), int(array.max())), allowed=f"0..{tokenizer.vocab_size - 1}",
        )  # fmt: skip
    return array


def read_unit(corpus: Corpus, unit: Unit, cursor: int = 0) -> Iterator[Document]:
    """Read the documents of ``unit`` from place ``cursor`` on, empty ones included.

    A failed read is retried after each of :data:`RETRY_DELAYS_S`, from where it failed.

    Raises:
        DataError: A file is missing, has changed or is damaged; names the row or byte.
        EnvironmentError_: It cannot be read, after all retries.
    """
    path, kind = corpus.path(unit.file), corpus.kind(unit.file)
    if kind == STDLIB:
        try:
            with tokenize.open(path) as stream:  # with the encoding that the module declares
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            return
        if cursor == 0:
            yield Document(0, text)
        return
    failures = 0
    while True:
        try:
            with _opened(corpus, unit) as file:
                for document in _READERS[kind](file, corpus, unit, cursor):
                    yield document
                    cursor, failures = document.cursor + 1, 0
            return
        except _ReadFailedError as error:
            where = f"{path}, after place {cursor} of {unit}"
            if failures == len(RETRY_DELAYS_S):
                raise EnvironmentError_(
                    f"the file cannot be read, tried {failures + 1} times", where=where,
                    value=str(error),
                    allowed="a file that can be read",
                    fix="check network and disk, then resume; or copy the corpus "
                    "to this machine and name its folder as the source",
                ) from error  # fmt: skip
            delay = RETRY_DELAYS_S[failures]
            logger.warning("%s: read failed (%s); retrying in %g s", where, error, delay)
            time.sleep(delay)
            failures += 1


def _opened(corpus: Corpus, unit: Unit) -> io.BufferedReader:
    """Open the unit's file and check its length."""
    import fsspec

    path, expected = corpus.path(unit.file), corpus.files[unit.file].size
    try:
        raw = _RetryableFile(fsspec.filesystem(corpus.protocol).open(path, "rb"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(
            "the file is missing",
            where=f"{path}, byte 0",
            value=str(error),
            allowed="the files of the listed corpus",
            fix=_RESTORE,
        ) from error
    except PermissionError as error:
        raise EnvironmentError_(
            "the file cannot be read", where=path, value=str(error), allowed="a readable file"
        ) from error
    except Exception as error:  # every file system has its own errors
        raise _ReadFailedError(f"{type(error).__name__}: {error}") from error
    file: io.BufferedReader = io.BufferedReader(raw, _BUFFER_BYTES)
    size = file.seek(0, io.SEEK_END)
    if size != expected:
        raise DataError(
            "the file has changed since the corpus was listed", where=f"{path}, byte {size}",
            value=size, allowed=f"{expected} bytes", fix=_RESTORE,
        )  # fmt: skip
    return file


class _RetryableFile(io.RawIOBase):
    """A file whose read errors become :class:`_ReadFailedError`, unlike errors of its content."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, into: Any) -> int:
        try:
            data = self._file.read(len(into))
        except Exception as error:  # every file system has its own errors
            raise _ReadFailedError(f"{type(error).__name__}: {error}") from error
        into[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _parquet(
    file: io.BufferedReader, corpus: Corpus, unit: Unit, cursor: int
) -> Iterator[Document]:
    path, column = corpus.path(unit.file), corpus.text_field
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentError_(
            "reading Parquet needs pyarrow",
            where=path,
            value=str(error),
            allowed="an installation with pyarrow",
            fix="pip install open-mythos[data]",
        ) from error
    row = 0
    try:
        # not pre_buffer: it would hold all of a row group, and every lane has one open
        table = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        _check_kind(table.schema_arrow, column, path)
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
        sizes = [_column_size(group, column) for group in groups]
        most = FREE_TEXT + MAX_EXPANSION * corpus.files[unit.file].size
        _check_text(max(sum(sizes), sum(group.num_rows for group in groups)), most, path)
        # first row of each row group, then the number of rows
        starts = list(accumulate((group.num_rows for group in groups), initial=0))
        if len(groups) < unit.parts:
            first, end = unit.share(starts[-1])
        else:
            first, end = (starts[group] for group in unit.share(len(groups)))
        row, read = first + cursor, 0
        for group, start in enumerate(starts[:-1]):
            if starts[group + 1] <= row or start >= end:
                continue
            # a dictionary's entry or a shared beginning is in the file once, and in every row
            rows = min(PARQUET_ROWS, max(1, _BATCH_BYTES // max(1, sizes[group])))
            for batch in table.iter_batches(rows, [group], [column], use_threads=False):
                for cell in batch.column(0)[max(0, row - start) : max(0, end - start)]:
                    value = cell.as_py()  # a null is an empty text
                    where = f"{path}, row {row}"
                    text = "" if value is None else checked_text(value, where)
                    read += len(text) + 1
                    _check_text(read, most, where)
                    yield Document(row - first, text)
                    row += 1
                start += len(batch)
    except _ReadFailedError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the Parquet file is damaged", where=f"{path}, row {row}", value=str(error),
            allowed="a whole Parquet file",
            fix="download it again, or leave it out",
        ) from error  # fmt: skip


def _check_kind(schema: Any, column: str, path: str) -> None:
    """Raise a DataError unless the column holds texts or nothing."""
    if column not in schema.names:
        raise DataError(
            f"the file has no column {column!r}", where=path, value=schema.names,
            allowed="a column that the file has",
            fix="name the column with text_field",
        )  # fmt: skip
    kind = schema.types[schema.names.index(column)]
    kind = getattr(kind, "storage_type", kind)  # of an extension
    kind = str(getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind)
    if kind not in ("string", "large_string", "string_view", "null"):
        raise DataError(
            f"the column {column!r} holds no texts: a value is not a string",
            where=f"{path}, row 0", value=kind, allowed="a column of strings",
            fix="name the column with text_field",
        )  # fmt: skip


def _column_size(group: Any, column: str) -> int:
    """Return the bytes of a column of a row group before compression."""
    chunks = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema == column)


def _check_text(size: int, most: int, where: str) -> None:
    if size > most:
        raise DataError(
            "the Parquet file holds far more text than fits a file of its size", where=where,
            value=f"{size:,} characters or more",
            allowed=f"{most:,} ({MAX_EXPANSION:,} per byte of the file, and {FREE_TEXT:,})",
            fix="leave it out; if its rows repeat, write them compressed less, or as .jsonl",
        )  # fmt: skip


def _jsonl(file: io.BufferedReader, corpus: Corpus, unit: Unit, cursor: int) -> Iterator[Document]:
    """Read the lines that begin inside the unit's bytes."""
    path, name = corpus.path(unit.file), corpus.text_field
    first, end = unit.share(corpus.files[unit.file].size)
    start = _next_line(file, first + cursor, path)
    while start < end and (line := file.readline(MAX_LINE_BYTES)):
        if line.strip():
            where = f"{path}, byte {start}"
            _check_length(line, where)
            try:
                record = json.loads(line.removeprefix(codecs.BOM_UTF8) if start == 0 else line)
            except (ValueError, RecursionError) as error:
                raise DataError(
                    "the line is not JSON",
                    where=where,
                    value=str(error),
                    allowed="one JSON object a line",
                ) from error
            if not isinstance(record, dict) or name not in record:
                raise DataError(
                    f"the line has no field {name!r}", where=where,
                    value=list(record) if isinstance(record, dict) else type(record).__name__,
                    allowed=f"an object with the text under {name!r}",
                    fix="name the field with text_field",
                )  # fmt: skip
            # JSON can escape lone surrogates; a null is an empty text
            text = "" if record[name] is None else checked_text(record[name], where)
            yield Document(start - first, text)
        start += len(line)


def _text(file: io.BufferedReader, corpus: Corpus, unit: Unit, cursor: int) -> Iterator[Document]:
    """Read pieces of 64 KiB, their edges moved to the next line."""
    path = corpus.path(unit.file)
    first, end = unit.share(text_pieces(corpus.files[unit.file].size))
    start = _next_line(file, (first + cursor) * TEXT_PIECE_BYTES, path)
    for piece in range(first + cursor, end):
        stop = _next_line(file, (piece + 1) * TEXT_PIECE_BYTES, path)
        file.seek(start)
        content = file.read(stop - start)
        try:
            text = content.decode()
            text = text.removeprefix("\ufeff") if start == 0 else text
        except UnicodeDecodeError as error:
            raise DataError(
                "the file is not UTF-8 text", where=f"{path}, byte {start + error.start}",
                value=content[error.start : error.end],
                allowed="UTF-8", fix="convert it to UTF-8, or leave it out",
            ) from error  # fmt: skip
        if "\0" in text:
            where = f"{path}, byte {start + content.index(0)}"
            raise DataError(
                "the file is binary: it holds a zero byte",
                where=where,
                value="\0",
                allowed="text without zero bytes",
                fix="leave it out",
            )
        yield Document(piece - first, text)
        start = stop


def _next_line(file: io.BufferedReader, place: int, path: str) -> int:
    """Seek to the first line that begins at byte ``place`` or later; return its position.

    Raises:
        DataError: The line before it is too long.
    """
    if place == 0:
        return file.seek(0)
    size = file.seek(0, io.SEEK_END)
    start = file.seek(min(place - 1, size))
    line = file.readline(MAX_LINE_BYTES)
    _check_length(line, f"{path}, byte {start}")
    return start + len(line)


def _check_length(line: bytes, where: str) -> None:
    if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
        raise DataError(
            "the line is too long", where=where, value=f"{len(line):,} bytes or more",
            allowed=f"lines of fewer than {MAX_LINE_BYTES:,} bytes",
            fix="split it into several lines or files",
        )  # fmt: skip


_READERS: dict[str, Callable[[io.BufferedReader, Corpus, Unit, int], Iterator[Document]]] = {
    ".parquet": _parquet, ".jsonl": _jsonl, ".txt": _text, ".md": _text, ".py": _text,
}  # fmt: skip
