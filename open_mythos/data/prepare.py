"""Tokenization of text into shards, done once, so that training reads only integers."""

from __future__ import annotations

import errno
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from open_mythos.checks import check_count, checked
from open_mythos.data.documents import check_share, is_held_out, read_documents, with_end
from open_mythos.data.index import DTYPES, INDEX_FILE, Index, Shard, ShardFile, Split, read_index
from open_mythos.data.shards import START_DTYPE
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.files import hash_blocks, locked, remove_abandoned, sync_to_disk
from open_mythos.run_folder import LOCK_FILE, TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# documents per call of the tokenizer: enough for every core, small enough for memory
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 22


@checked
def prepare(
    source: str | Path | Iterable[str],
    out_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    shard_tokens: int = 1 << 27,
    val_fraction: float = 0.01,
    text_field: str = "text",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Tokenize the documents of ``source`` into a prepared folder.

    Every document is ended by the tokenizer's eos; empty ones are dropped. A hash of its text
    assigns a document to a split, so equal documents land in the same split. The folder gets its
    name only when it is complete.

    Args:
        source: As for :func:`~open_mythos.data.read_documents`, or any iterable of strings.
        out_dir: The folder to create.
        tokenizer: Saved in the folder too.
        shard_tokens: A shard ends with the document that reaches this many tokens.
        val_fraction: Expected share of the documents kept for validation, in [0, 1).
        text_field: The JSON key or Parquet column that holds the text.
        overwrite: Replace an existing prepared folder.
        progress: Called after each batch with the documents and tokens so far.

    Returns:
        The content of ``index.json``.

    Raises:
        ConfigError: An argument is out of range, or the folder exists.
        DataError: The source is damaged or holds no training document.
        EnvironmentError_: The disk is full or cannot be written.
    """
    check_count("shard_tokens", shard_tokens)
    check_share("val_fraction", val_fraction)
    out = Path(out_dir).absolute()
    if not _may_write(out, overwrite):
        raise ConfigError(
            "the folder exists", where="out_dir", value=str(out_dir),
            allowed="a new folder; with overwrite, also a prepared one that holds nothing else",
            fix="choose another folder, or pass overwrite",
        )  # fmt: skip
    documents = read_documents(source, text_field) if isinstance(source, str | Path) else source
    filled = _NotEmpty(documents)
    begin, end = f".{out.name}.", ".partial"
    remove_abandoned(out.parent, begin, end, LOCK_FILE)
    partial = out.with_name(f"{begin}{secrets.token_hex(4)}{end}")
    fresh = partial.with_suffix(".new")
    try:
        fresh.mkdir(parents=True)
        with locked(fresh / LOCK_FILE):
            fresh.rename(partial)  # others remove a folder of that name that nobody has locked
            tokenizer.save(partial / TOKENIZER_FOLDER)
            train = _SplitWriter(partial, "train", tokenizer, shard_tokens)
            val = _SplitWriter(partial, "val", tokenizer, shard_tokens)
            _write(filled, tokenizer, train, val, val_fraction, progress)
            index = _index(tokenizer, train, val, val_fraction)
            (partial / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
            sync_to_disk(partial)
            partial.rename(fresh)
            (fresh / LOCK_FILE).unlink()
            _publish(fresh, out)
    except OSError as error:
        raise EnvironmentError_(
            "the shards cannot be written", where=str(out), value=str(error),
            allowed="a folder that can be written",
            fix="free space, or choose a writable folder",
        ) from error  # fmt: skip
    finally:
        for folder in (fresh, partial):
            shutil.rmtree(folder, ignore_errors=True)
    if filled.empty:
        logger.warning("%s documents are left out: they hold no text", f"{filled.empty:,}")
    return index


def _write(
    documents: Iterable[str], tokenizer: Tokenizer, train: _SplitWriter, val: _SplitWriter,
    val_fraction: float, progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    with train, val:
        for texts in _batches(documents):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                (val if is_held_out(text, val_fraction) else train).add(text, ids)
            if progress is not None:
                progress(train.documents + val.documents, train.tokens + val.tokens)


def _may_write(out: Path, overwrite: bool) -> bool:
    """Return whether nothing is there, or with ``overwrite`` a prepared folder."""
    while (found := _inode(out)) is not None:
        may = overwrite and _is_prepared(out)
        if may or _inode(out) == found:  # or another process replaced it while it was looked at
            return may
    return True


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _is_prepared(folder: Path) -> bool:
    """Return whether a folder is a prepared one and holds nothing else."""
    if folder.is_symlink():
        return False
    try:
        splits = read_index(folder).splits.values()
        names = {path.name for path in folder.iterdir()}
    except (DataError, OSError):
        return False
    own = {INDEX_FILE, TOKENIZER_FOLDER}
    own |= {file.file for split in splits for shard in split.shards
            for file in (shard.tokens, shard.starts)}  # fmt: skip
    return names <= own


class _NotEmpty:
    """The documents with text, and how many have none."""

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents, self.empty = documents, 0

    def __iter__(self) -> Iterator[str]:
        for text in self._documents:
            if text:
                yield text
            else:
                self.empty += 1


class _SplitWriter:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._tokenizer = tokenizer
        self.dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._stream: BinaryIO | None = None
        self._starts: list[int] = []
        self._shard_length = 0
        self.shards: list[Shard] = []
        self.tokens = self.documents = self.text_bytes = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_shard()
        elif self._stream is not None:
            self._stream.close()

    def add(self, text: str, ids: list[int]) -> None:
        """Append one document and the end-of-document token."""
        where = f"document {self.documents} of the {self._split} split"
        block = with_end(ids, self._tokenizer, where)
        if self._stream is None:
            self._stream = self._path("tokens").open("wb")
        self._stream.write(block.astype(DTYPES[self.dtype]).tobytes())
        self._starts.append(self._shard_length)
        self._shard_length += len(block)
        self.tokens += len(block)
        self.documents += 1
        self.text_bytes += len(text.encode())
        if self._shard_length >= self._shard_tokens:
            self._finish_shard()

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._split}-{len(self.shards):05d}.{kind}.bin"

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        self._path("starts").write_bytes(np.array(self._starts, START_DTYPE).tobytes())
        files = []
        for kind, items in (("tokens", self._shard_length), ("starts", len(self._starts))):
            path = self._path(kind)
            sync_to_disk(path)
            files.append(ShardFile(path.name, items, tuple(hash_blocks(path))))
        self.shards.append(Shard(*files))
        self._stream, self._starts, self._shard_length = None, [], 0


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _index(
    tokenizer: Tokenizer, train: _SplitWriter, val: _SplitWriter, val_fraction: float
) -> Index:
    if not train.documents:
        raise DataError(
            "the source holds no training document", where="source",
            value=f"{val.documents} documents, all of them for validation" if val.documents
            else "no document with text",
            allowed="at least one document outside the validation split",
            fix="lower val_fraction" if val.documents else "check the source",
        )  # fmt: skip
    if val_fraction and not val.documents:
        logger.warning(
            "no validation split: none of the %d documents was assigned to it (val_fraction=%s)",
            train.documents, val_fraction,
        )  # fmt: skip
    return Index(
        dtype=train.dtype,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits={
            name: Split(writer.tokens, writer.documents, writer.text_bytes, tuple(writer.shards))
            for name, writer in (("train", train), ("val", val))
            if writer.documents
        },
    )


def _publish(made: Path, out: Path) -> None:
    """Rename the finished folder into place; only then remove an existing one."""
    old = made.with_suffix(".old")
    while made.exists():
        with suppress(FileNotFoundError):
            out.rename(old)
        try:
            made.rename(out)
        except OSError as error:  # another process was quicker: replace its folder
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        shutil.rmtree(old, ignore_errors=True)
    sync_to_disk(out.parent)
