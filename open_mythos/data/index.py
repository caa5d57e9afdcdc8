"""``index.json``: what a prepared folder says about itself."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from open_mythos.errors import DataError

INDEX_FILE = "index.json"
FORMAT = "open-mythos-tokens"
VERSION = 1
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
# no separators, no leading dot: a name from the index never leaves the folder
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ShardFile:
    """A file of integers and what must be in it."""

    file: str
    """Its name inside the prepared folder."""
    items: int
    """Number of integers."""
    sha256: tuple[str, ...]
    """The hash of each 16 MiB of the file."""


@dataclass(frozen=True)
class Shard:
    """A run of whole documents: their tokens, and where each of them starts."""

    tokens: ShardFile
    starts: ShardFile


@dataclass(frozen=True)
class Split:
    """The training or the validation documents."""

    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text, for bits per byte; end-of-document tokens count none."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``."""

    dtype: str
    """Of the tokens: "uint16" or "uint32"."""
    tokenizer: str
    """The tokenizer's name."""
    tokenizer_fingerprint: str
    vocab_size: int
    """Every id is below it."""
    eos_id: int
    splits: dict[str, Split]

    def to_json(self) -> str:
        """The text of ``index.json``."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=2) + "\n"


def read_index(folder: Path) -> Index:
    """Read and check the ``index.json`` of a prepared folder.

    Raises:
        DataError: It is missing, damaged, or of another format or version.
    """
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            "not a prepared folder",
            where=str(path),
            fix="prepare the text first: `open-mythos data prepare`",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("the index cannot be read", where=str(path), value=str(error)) from error
    root = _Record(content, str(path))
    version = (root.text("format"), root.number("version"))
    if version != (FORMAT, VERSION):
        raise root.error("version", version, f"{(FORMAT, VERSION)}")
    if root.text("dtype") not in DTYPES:
        raise root.error("dtype", root.text("dtype"), ", ".join(DTYPES))
    return Index(
        dtype=root.text("dtype"),
        tokenizer=root.text("tokenizer"),
        tokenizer_fingerprint=root.text("tokenizer_fingerprint"),
        vocab_size=root.number("vocab_size"),
        eos_id=root.number("eos_id"),
        splits={name: _split(record) for name, record in root.record("splits").items()},
    )


class _Record:
    """A JSON object whose fields are checked as they are taken."""

    def __init__(self, content: Any, where: str) -> None:
        self.where = where
        if not isinstance(content, dict):
            raise self.error("", type(content).__name__, "an object")
        self._content = content

    def error(self, key: str, value: Any, allowed: str) -> DataError:
        where = f"{self.where}: {key}" if key else self.where
        return DataError("the index is damaged", where=where, value=value, allowed=allowed)

    def number(self, key: str) -> int:
        value = self._content.get(key)
        if type(value) is not int or value < 0:
            raise self.error(key, value, "an integer >= 0")
        return value

    def text(self, key: str) -> str:
        value = self._content.get(key)
        if not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def array(self, key: str) -> list[Any]:
        value = self._content.get(key)
        if not isinstance(value, list) or not value:
            raise self.error(key, value, "a list that is not empty")
        return value

    def record(self, key: str) -> _Record:
        return _Record(self._content.get(key), f"{self.where}: {key}")

    def records(self, key: str) -> list[_Record]:
        return [_Record(item, f"{self.where}: {key}") for item in self.array(key)]

    def items(self) -> list[tuple[str, _Record]]:
        return [(key, self.record(key)) for key in self._content]


def _split(record: _Record) -> Split:
    shards = tuple(
        Shard(_shard_file(shard.record("tokens")), _shard_file(shard.record("starts")))
        for shard in record.records("shards")
    )
    split = Split(
        record.number("tokens"), record.number("documents"), record.number("text_bytes"), shards
    )
    counted = (sum(s.tokens.items for s in shards), sum(s.starts.items for s in shards))
    if counted != (split.tokens, split.documents):
        raise record.error("tokens, documents", (split.tokens, split.documents), str(counted))
    return split


def _shard_file(record: _Record) -> ShardFile:
    name, items = record.text("file"), record.number("items")
    if not _FILE_NAME.fullmatch(name):
        raise record.error("file", name, "a plain file name")
    if items == 0:
        raise record.error("items", items, "an integer >= 1")
    return ShardFile(name, items, tuple(str(digest) for digest in record.array("sha256")))
