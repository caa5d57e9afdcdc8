"""``index.json``: the description of a prepared folder."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from open_mythos.errors import DataError
from open_mythos.files import read_object

INDEX_FILE = "index.json"
FORMAT = "open-mythos-tokens"
VERSION = 1
DTYPES = {"uint16": "<u2", "uint32": "<u4"}
# no separators, no leading dot: a name in the index cannot point outside the folder
_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ShardFile:
    """A file of integers, with its length and hashes."""

    file: str
    """Name inside the prepared folder."""
    items: int
    """Number of integers."""
    sha256: tuple[str, ...]
    """SHA-256 of each 16 MiB of the file."""


@dataclass(frozen=True)
class Shard:
    """Consecutive whole documents: their tokens, and the first token of each."""

    tokens: ShardFile
    starts: ShardFile


@dataclass(frozen=True)
class Split:
    """The training or the validation documents."""

    tokens: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the text, for bits per byte; end-of-document tokens count as 0."""
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """The content of ``index.json``."""

    dtype: str
    """Type of the stored tokens: "uint16" or "uint32"."""
    tokenizer: str
    """The tokenizer's name."""
    tokenizer_fingerprint: str
    vocab_size: int
    """Upper bound of the ids."""
    eos_id: int
    splits: dict[str, Split]

    def to_json(self) -> str:
        """Return the text of ``index.json``."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2) + "\n"


def read_index(folder: Path) -> Index:
    """Read and check the ``index.json`` of a prepared folder.

    Raises:
        DataError: It is missing, damaged, or of another format or version.
    """
    path = folder / INDEX_FILE
    where = str(path)
    if not path.exists():
        fix = "prepare the text first: `open-mythos data prepare`"
        raise DataError(
            "not a prepared folder", where=where, value=f"no {INDEX_FILE}",
            allowed=f"a folder with {INDEX_FILE}", fix=fix,
        )  # fmt: skip
    content = read_object(path, "the index cannot be read")
    version = (content.get("format"), content.get("version"))
    if version != (FORMAT, VERSION):
        raise _damaged(f"{where}: version", version, f"{(FORMAT, VERSION)}")
    index: Index = _parsed(Index, content, where)
    if index.dtype not in DTYPES:
        raise _damaged(f"{where}: dtype", index.dtype, ", ".join(DTYPES))
    for name, split in index.splits.items():
        place = f"{where}: splits: {name}"
        for file in (file for shard in split.shards for file in (shard.tokens, shard.starts)):
            if not _FILE_NAME.fullmatch(file.file):
                raise _damaged(f"{place}: file", file.file, "a plain file name")
            if not file.items:
                raise _damaged(f"{place}: items", file.items, "an integer >= 1")
        tokens = sum(shard.tokens.items for shard in split.shards)
        documents = sum(shard.starts.items for shard in split.shards)
        if (tokens, documents) != (split.tokens, split.documents):
            found = (split.tokens, split.documents)
            raise _damaged(f"{place}: tokens, documents", found, f"{(tokens, documents)}")
    return index


def _parsed(kind: Any, value: Any, where: str) -> Any:
    """Read a JSON value as ``kind``: a dataclass, dict, tuple, string or count."""
    inner, is_record = get_args(kind), is_dataclass(kind)
    if is_record or get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _damaged(where, type(value).__name__, "an object")
        hints = get_type_hints(kind) if is_record else dict.fromkeys(value, inner[-1])
        fields = {
            name: _parsed(hint, value.get(name), f"{where}: {name}") for name, hint in hints.items()
        }
        return kind(**fields) if is_record else fields
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not value:
            raise _damaged(where, value, "a non-empty list")
        return tuple(_parsed(inner[0], item, where) for item in value)
    if kind is int and (type(value) is not int or value < 0):
        raise _damaged(where, value, "an integer >= 0")
    if kind is str and not isinstance(value, str):
        raise _damaged(where, value, "a string")
    return value


def _damaged(where: str, value: Any, allowed: str) -> DataError:
    return DataError("the index is damaged", where=where, value=value, allowed=allowed)
