"""Where text lies on this machine, and what a piece, a line or a cell of it says.

Nothing that is read is ever executed or unpickled, and a damaged input is a ``DataError`` that
names the file and the row or byte.
"""

from __future__ import annotations

import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from open_mythos.errors import ConfigError, DataError, EnvironmentError_

STDLIB = "stdlib"
# A longer text file is cut at the next line end: memory stays bounded, and a split by whole
# documents can take a part of it.
TEXT_PIECE_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 28
PARQUET_ROWS = 256
KINDS = (".jsonl", ".md", ".parquet", ".py", ".txt")
"""Endings of the files that can be read."""
# Tests of the standard library hold deliberately broken files; the others are not part of it.
STDLIB_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_files(path: Path) -> list[Path]:
    """List ``path`` if it is a file, else every file of a known kind below it, in a fixed order.

    Raises:
        ConfigError: A file of an unknown kind.
        DataError: Nothing there, or no such file in it.
    """
    if path.is_file():
        if path.suffix.lower() not in KINDS:
            raise ConfigError(
                "no reader for this kind of file",
                where=str(path),
                value=path.suffix,
                allowed=", ".join(KINDS),
                fix="decompress or rename it",
            )
        return [path]
    if not path.is_dir():
        raise DataError(
            "no such source",
            where="source",
            value=str(path),
            allowed=f'a file, a folder, or "{STDLIB}"',
        )
    found = [file for file in _walk(path, set()) if file.suffix.lower() in KINDS]
    if not found:
        raise DataError(
            "the folder holds no file that can be read",
            where="source",
            value=str(path),
            allowed=", ".join(KINDS),
        )
    return found


def _walk(root: Path, skipped: set[str]) -> Iterator[Path]:
    """Walk the visible files below ``root``, sorted by name, folder by folder."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skipped and not f.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


def stdlib_modules() -> tuple[Path, list[Path]]:
    """Return the folder of Python's standard library, and its modules in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, [file for file in _walk(root, STDLIB_SKIPPED) if file.suffix == ".py"]


def read_module(file: Path) -> str | None:
    """Read the source of a module; None if it cannot be decoded."""
    try:
        with tokenize.open(file) as stream:  # honours the encoding that the module declares
            return stream.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None


def decode_text(piece: bytes, file: Path | str, offset: int) -> str:
    """Decode ``piece``, which begins at byte ``offset`` of ``file``.

    Raises:
        DataError: It is not UTF-8, or holds a zero byte; names the byte.
    """
    try:
        text = piece.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            "the file is not UTF-8 text",
            where=f"{file}, byte {offset + error.start}",
            value=piece[error.start : error.end],
            fix="convert it to UTF-8, or leave it out",
        ) from error
    if "\0" in text:
        raise DataError(
            "the file is binary: it holds a zero byte",
            where=f"{file}, byte {offset + piece.index(0)}",
            fix="leave it out",
        )
    return text


def document_of_line(line: bytes, where: str, text_field: str) -> str:
    """Read the text under ``text_field`` from a line of JSON.

    Raises:
        DataError: There is none.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("the line is not JSON", where=where, value=str(error)) from error
    if not isinstance(record, dict) or text_field not in record:
        raise DataError(
            f"the line has no field {text_field!r}",
            where=where,
            value=list(record) if isinstance(record, dict) else type(record).__name__,
            allowed=f"an object with the text under {text_field!r}",
            fix="name the field with text_field",
        )
    return text_of(record[text_field], where)


def text_of(value: Any, where: str) -> str:
    """Return ``value`` if it is a string that UTF-8 can encode (JSON can escape lone surrogates).

    Raises:
        DataError: It is not.
    """
    try:
        if isinstance(value, str):
            value.encode()
            return value
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds a lone surrogate", where=where, value=value[error.start]
        ) from error
    raise DataError("the text is not a string", where=where, value=value, allowed="a string")


def import_pyarrow(file: Path | str) -> tuple[Any, Any]:
    """Import ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        EnvironmentError_: They are not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise EnvironmentError_(
            "reading Parquet needs pyarrow", where=str(file), fix="pip install open-mythos[data]"
        ) from error
    return pa, pq


def require_column(columns: list[str], text_field: str, file: Path | str) -> None:
    """Raise a DataError unless the Parquet file has the column ``text_field``."""
    if text_field not in columns:
        raise DataError(
            f"the file has no column {text_field!r}",
            where=str(file),
            value=columns,
            fix="name the column with text_field",
        )
