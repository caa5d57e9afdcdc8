"""Reading the documents of a corpus, with retries.

A read that the file system fails is retried; damaged input raises a DataError that names the file
and the row or byte.
"""

from __future__ import annotations

import io
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from open_mythos.data.sources import (
    MAX_LINE_BYTES,
    PARQUET_ROWS,
    STDLIB,
    TEXT_PIECE_BYTES,
    decode_text,
    document_of_line,
    import_pyarrow,
    read_module,
    require_column,
    text_of,
)
from open_mythos.data.stream_corpus import Corpus, Unit, open_corpus, text_pieces
from open_mythos.errors import DataError, EnvironmentError_

logger = logging.getLogger(__name__)

RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Delays before a failed read is retried; after the last one it is an error."""
_BUFFER_BYTES = 1 << 20


class Document(NamedTuple):
    """A text and its place in the unit."""

    cursor: int
    """Its place in the unit: rows for Parquet, bytes for JSONL, pieces for a text; ascending."""
    text: str


class _ReadFailedError(OSError):
    """The file system failed; a retry may succeed."""


def read_documents(source: str | Path, text_field: str = "text") -> Iterator[str]:
    """Read the documents of ``source``, always in the same order.

    Args:
        source: As for :func:`~open_mythos.data.open_corpus`: ``"stdlib"``, a file, a folder or a
            URL. A ``.txt``, ``.md`` or ``.py`` file is one document, or one per 64 KiB, cut at line
            ends; ``.jsonl`` has one per line; ``.parquet`` one per row.
        text_field: The JSON key or Parquet column that holds the text.

    Raises:
        ConfigError: A file of an unknown kind.
        DataError: Nothing there, or a damaged file.
        EnvironmentError_: A file that cannot be read, or a package that is missing.
    """
    yield from documents_of(open_corpus(source, text_field))


def documents_of(corpus: Corpus) -> Iterator[str]:
    """Read the documents of ``corpus``, file by file."""
    for file in range(len(corpus.files)):
        for document in read_unit(corpus, Unit(file, 0, 1)):
            yield document.text


def read_unit(corpus: Corpus, unit: Unit, cursor: int = 0) -> Iterator[Document]:
    """Read the documents of ``unit`` whose place is ``cursor`` or later, empty ones included.

    A read that fails is retried after each of :data:`RETRY_DELAYS_S`, from where it failed.

    Raises:
        DataError: A file is missing, has changed or is damaged; names the row or byte.
        EnvironmentError_: It cannot be read, after several tries.
    """
    if corpus.suffix(unit.file) == STDLIB:
        text = read_module(Path(corpus.path(unit.file)))
        yield from [] if text is None or cursor else [Document(0, text)]
        return
    read = _READERS[corpus.suffix(unit.file).lower()]
    failures = 0
    while True:
        try:
            with _opened(corpus, unit) as file:
                for document in read(file, corpus, unit, cursor):
                    yield document
                    cursor, failures = document.cursor + 1, 0
            return
        except _ReadFailedError as error:
            _wait(failures, f"{corpus.path(unit.file)}, after place {cursor} of {unit}", error)
            failures += 1


def _wait(failures: int, where: str, error: OSError) -> None:
    if failures == len(RETRY_DELAYS_S):
        raise EnvironmentError_(
            f"the file cannot be read, tried {failures + 1} times", where=where, value=str(error),
            fix="check network and disk, then resume; or copy the corpus to this machine and name "
            "its folder as the source",
        ) from error  # fmt: skip
    delay = RETRY_DELAYS_S[failures]
    logger.warning("%s: reading failed (%s); again in %g s", where, error, delay)
    time.sleep(delay)


def _opened(corpus: Corpus, unit: Unit) -> io.BufferedReader:
    """Open the unit's file and check its length."""
    import fsspec

    path, expected = corpus.path(unit.file), corpus.files[unit.file].size
    try:
        raw = _Watched(fsspec.filesystem(corpus.protocol).open(path, "rb"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(
            "the file is missing", where=f"{path}, byte 0", value=str(error),
            fix="restore it, or start a new run on the corpus as it is now",
        ) from error  # fmt: skip
    except PermissionError as error:
        raise EnvironmentError_("the file cannot be read", where=path, value=str(error)) from error
    except Exception as error:  # every file system has errors of its own
        raise _ReadFailedError(f"{type(error).__name__}: {error}") from error
    file: io.BufferedReader = io.BufferedReader(raw, _BUFFER_BYTES)
    size = file.seek(0, io.SEEK_END)
    if size != expected:
        raise DataError(
            "the file has changed since the corpus was listed", where=f"{path}, byte {size}",
            value=size, allowed=f"{expected} bytes",
            fix="restore it, or start a new run on the corpus as it is now",
        )  # fmt: skip
    file.seek(0)
    return file


class _Watched(io.RawIOBase):
    """A file whose I/O errors are distinguishable from errors that a reader raises on its
    content."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, into: Any) -> int:
        try:
            data = self._file.read(len(into))
        except Exception as error:  # every file system has errors of its own
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
    path = corpus.path(unit.file)
    pa, pq = import_pyarrow(path)
    row = 0
    try:
        # not pre_buffer: it would hold all of a row group, and every lane has one open
        table = pq.ParquetFile(
            file, pre_buffer=False, buffer_size=_BUFFER_BYTES, page_checksum_verification=True
        )
        require_column(table.schema_arrow.names, corpus.text_field, path)
        starts = _row_group_starts(table.metadata)
        first, end = _rows_of(unit, starts)
        row = first + cursor
        for group, start in enumerate(starts[:-1]):
            if starts[group + 1] <= row or start >= end:
                continue
            for batch in table.iter_batches(
                PARQUET_ROWS, [group], [corpus.text_field], use_threads=False
            ):
                for cell in batch.column(0)[max(0, row - start) : max(0, end - start)]:
                    yield Document(row - first, text_of(cell.as_py(), f"{path}, row {row}"))
                    row += 1
                start += len(batch)
    except _ReadFailedError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the Parquet file is damaged", where=f"{path}, row {row}", value=str(error),
            fix="fetch it again, or leave it out",
        ) from error  # fmt: skip


def _row_group_starts(metadata: Any) -> list[int]:
    """Return the first row of every row group, and the number of rows."""
    starts = [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


def _rows_of(unit: Unit, starts: list[int]) -> tuple[int, int]:
    """Return the rows of a unit: whole row groups, unless the file has fewer than parts."""
    groups, rows = len(starts) - 1, starts[-1]

    def edge(part: int) -> int:
        if groups >= unit.parts:
            return starts[groups * part // unit.parts]
        return rows * part // unit.parts

    return edge(unit.part), edge(unit.part + 1)


def _jsonl(file: io.BufferedReader, corpus: Corpus, unit: Unit, cursor: int) -> Iterator[Document]:
    """Read the lines that begin inside the unit's bytes."""
    path, size = corpus.path(unit.file), corpus.files[unit.file].size
    first, end = (size * part // unit.parts for part in (unit.part, unit.part + 1))
    start = _next_line(file, first + cursor)
    while start < end and (line := file.readline(MAX_LINE_BYTES)):
        if line.strip():
            text = document_of_line(line, f"{path}, byte {start}", corpus.text_field)
            yield Document(start - first, text)
        start += len(line)


def _text(file: io.BufferedReader, corpus: Corpus, unit: Unit, cursor: int) -> Iterator[Document]:
    """Read pieces of 64 KiB, their edges moved to the next line."""
    path, pieces = corpus.path(unit.file), text_pieces(corpus.files[unit.file].size)
    first, end = (pieces * part // unit.parts for part in (unit.part, unit.part + 1))
    start = _next_line(file, (first + cursor) * TEXT_PIECE_BYTES)
    for piece in range(first + cursor, end):
        stop = _next_line(file, (piece + 1) * TEXT_PIECE_BYTES)
        file.seek(start)
        yield Document(piece - first, decode_text(file.read(stop - start), path, start))
        start = stop


def _next_line(file: io.BufferedReader, place: int) -> int:
    """Seek to the first line that begins at byte ``place`` or later; return its position."""
    if place == 0:
        return file.seek(0)
    size = file.seek(0, io.SEEK_END)
    start = file.seek(min(place - 1, size))
    return start + len(file.readline(MAX_LINE_BYTES))


_READERS: dict[str, Callable[[io.BufferedReader, Corpus, Unit, int], Iterator[Document]]] = {
    ".parquet": _parquet, ".jsonl": _jsonl, ".txt": _text, ".md": _text, ".py": _text,
}  # fmt: skip
