"""Turn text into token shards, once, so that training reads nothing but integers."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from open_mythos.checks import check_count
from open_mythos.data.index import DTYPES, INDEX_FILE, Index, Shard, ShardFile, Split
from open_mythos.data.shards import START_DTYPE, hash_blocks
from open_mythos.data.stream_read import read_documents
from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.files import sync_to_disk
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer

# what is encoded at once: enough for every core, small enough for memory
BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 22


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

    Every document is ended by the tokenizer's eos; empty ones are left out. A document belongs to
    the validation split by the hash of its text, whatever its place, so equal documents fall on
    the same side. The folder appears under its name only when it is complete.

    Args:
        source: As for :func:`~open_mythos.data.read_documents`, or any iterable of strings.
        out_dir: The folder to make.
        tokenizer: It is saved in the folder too.
        shard_tokens: The document with which a shard reaches this many tokens is its last.
        val_fraction: Expected share of the documents kept for validation, in [0, 1).
        text_field: The JSON key or Parquet column that holds the text.
        overwrite: Replace an existing folder.
        progress: Called now and then with the documents and tokens so far.

    Returns:
        What ``index.json`` holds.

    Raises:
        ConfigError: An argument is out of range, or the folder exists.
        DataError: The source is damaged or holds no training document.
        EnvironmentError_: The disk is full or cannot be written.
    """
    check_count("shard_tokens", shard_tokens)
    if not 0 <= val_fraction < 1:
        raise ConfigError("not a share", where="val_fraction", value=val_fraction, allowed="[0, 1)")
    out = Path(out_dir).absolute()
    if out.exists() and not (overwrite and (out / INDEX_FILE).is_file()):
        raise ConfigError(
            "the folder exists",
            where="out_dir",
            value=str(out_dir),
            allowed="a new folder; with overwrite, also one that was prepared before",
            fix="choose another one, or ask to overwrite it",
        )
    documents = read_documents(source, text_field) if isinstance(source, str | Path) else source
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        tokenizer.save(partial / TOKENIZER_FOLDER)
        train, val = (_SplitWriter(partial, s, tokenizer, shard_tokens) for s in ("train", "val"))
        with train, val:
            _tokenize(documents, tokenizer, train, val, val_fraction, progress)
        index = _index(tokenizer, train, val, val_fraction)
        (partial / INDEX_FILE).write_text(index.to_json(), encoding="utf-8")
        _publish(partial, out)
    except OSError as error:
        raise EnvironmentError_(
            "the shards cannot be written",
            where=str(out),
            value=str(error),
            fix="free space, or choose a folder that can be written",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


class _SplitWriter:
    """Appends documents to the shards of one split."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._vocab_size, self._eos_id = tokenizer.vocab_size, tokenizer.eos_id
        self._dtype = np.dtype(DTYPES[_dtype_name(tokenizer)])
        self._stream: BinaryIO | None = None
        self._starts: list[int] = []
        self._shard_length = 0
        self._shards: list[Shard] = []
        self.tokens = self.documents = self.text_bytes = 0

    def __enter__(self) -> _SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish_shard()
        elif self._stream is not None:
            self._stream.close()

    def add(self, ids: list[int], text_bytes: int) -> None:
        """Append one document and the end-of-document token."""
        block = np.array([*ids, self._eos_id], np.int64)
        if block.min() < 0 or block.max() >= self._vocab_size:
            raise DataError(
                "the tokenizer gave an id outside its vocabulary",
                where=f"document {self.documents} of the {self._split} split",
                value=(int(block.min()), int(block.max())),
                allowed=f"0..{self._vocab_size - 1}",
            )
        if self._stream is None:
            self._stream = (self._folder / self._name("tokens")).open("wb")
        self._stream.write(block.astype(self._dtype).tobytes())
        self._starts.append(self._shard_length)
        self._shard_length += len(block)
        self.tokens += len(block)
        self.documents += 1
        self.text_bytes += text_bytes
        if self._shard_length >= self._shard_tokens:
            self._finish_shard()

    def summary(self) -> Split:
        """Describe what has been written."""
        return Split(self.tokens, self.documents, self.text_bytes, tuple(self._shards))

    def _name(self, kind: str) -> str:
        return f"{self._split}-{len(self._shards):05d}.{kind}.bin"

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        _sync_and_close(self._stream)
        starts = (self._folder / self._name("starts")).open("wb")
        starts.write(np.array(self._starts, START_DTYPE).tobytes())
        _sync_and_close(starts)
        items = {"tokens": self._shard_length, "starts": len(self._starts)}
        files = {
            kind: ShardFile(self._name(kind), count, hash_blocks(self._folder / self._name(kind)))
            for kind, count in items.items()
        }
        self._shards.append(Shard(**files))
        self._stream, self._starts, self._shard_length = None, [], 0


def _tokenize(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    train: _SplitWriter,
    val: _SplitWriter,
    val_fraction: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    for texts in _batches(documents):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            content = text.encode()
            (val if held_out_place(content) < val_fraction else train).add(ids, len(content))
        if progress is not None:
            progress(train.documents + val.documents, train.tokens + val.tokens)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        if not text:
            continue
        batch.append(text)
        characters += len(text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def held_out_place(content: bytes) -> float:
    """Hash a document to a number in [0, 1)."""
    digest = hashlib.blake2b(content, digest_size=6, person=b"mythos-split").digest()
    return int.from_bytes(digest, "big") / 2**48


def _dtype_name(tokenizer: Tokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def _index(
    tokenizer: Tokenizer, train: _SplitWriter, val: _SplitWriter, val_fraction: float
) -> Index:
    if not train.documents:
        raise DataError(
            "the source holds no training document",
            where="source",
            value=f"{val.documents} documents, all of them for validation",
            fix="check the source, or lower val_fraction",
        )
    if val_fraction and not val.documents:
        warnings.warn(
            f"none of the {train.documents} documents fell into the validation split "
            f"(val_fraction={val_fraction}): it is left out",
            stacklevel=3,
        )
    return Index(
        dtype=_dtype_name(tokenizer),
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        splits={
            name: writer.summary()
            for name, writer in {"train": train, "val": val}.items()
            if writer.documents
        },
    )


def _publish(partial: Path, out: Path) -> None:
    """Rename the finished folder into place; only then is an existing folder removed."""
    sync_to_disk(partial)
    old = partial.with_suffix(".old")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_to_disk(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_and_close(stream: BinaryIO) -> None:
    with stream:
        stream.flush()
        os.fsync(stream.fileno())
