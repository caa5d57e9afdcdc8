"""Token shards: a prepared folder, read as one flat stream of tokens.

The folder holds ``index.json``, the tokenizer in ``tokenizer/``, and two files of raw little-endian
integers for every shard: ``train-00000.tokens.bin`` (uint16 or uint32: whole documents, each ended
by the end-of-document token) and ``train-00000.starts.bin`` (uint64: the first token of each
document, counted from the start of the shard).
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from open_mythos.checks import checked
from open_mythos.data.index import DTYPES, ShardFile, read_index
from open_mythos.data.permutation import Int64Array
from open_mythos.errors import ConfigError, DataError
from open_mythos.files import HASH_BLOCK_BYTES, hash_blocks
from open_mythos.run_folder import TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer, load_tokenizer

START_DTYPE = np.dtype("<u8")


class TokenShards:
    """One split of a prepared folder.

    Opening checks that every file exists and has its size. Files are read, not memory-mapped: a
    mapped file that is truncated under a running job kills it without a message.

    Args:
        path: The prepared folder.
        split: "train" or "val".

    Raises:
        DataError: The folder has no such split, or a file is missing, damaged or of another size.
    """

    @checked
    def __init__(self, path: str | Path, split: str = "train") -> None:
        self.path, self.split = Path(path), split
        self.index = read_index(self.path)
        if split not in self.index.splits:
            raise DataError(
                f"the prepared folder has no split {split!r}", where=str(self.path), value=split,
                allowed=", ".join(self.index.splits),
                fix="prepare it again with more text or another val_fraction",
            )  # fmt: skip
        self.info = self.index.splits[split]
        self._dtype = np.dtype(DTYPES[self.index.dtype])
        self._token_ends = list(accumulate(shard.tokens.items for shard in self.info.shards))
        self._check_sizes()

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self.info.tokens

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return self.index.eos_id

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of text per token: bits per byte = nats per token / (this * ln 2)."""
        return self.info.text_bytes / self.info.tokens

    @property
    def fingerprint(self) -> str:
        """64 hex digits that change with any token of the split."""
        hashes = [shard.tokens.sha256 for shard in self.info.shards]
        content = [self.split, self.index.dtype, self.index.tokenizer_fingerprint, hashes]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def tokens(self, start: int, length: int) -> Int64Array:
        """Read tokens ``start .. start + length - 1`` of the split: (length,) int64.

        Raises:
            ConfigError: The range exceeds the split.
            DataError: A file ends early, or holds an id outside the vocabulary.
        """
        if start < 0 or length < 1 or start + length > len(self):
            raise ConfigError(
                "no such tokens", where="TokenShards.tokens(start, length)", value=(start, length),
                allowed=f"1 or more tokens within 0..{len(self) - 1}",
            )  # fmt: skip
        pieces = []
        number = bisect_right(self._token_ends, start)
        while length:
            file = self.info.shards[number].tokens
            first = start - (self._token_ends[number] - file.items)
            count = min(length, file.items - first)
            pieces.append(self._read(file, first, count))
            start, length, number = start + count, length - count, number + 1
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that prepared the folder.

        Raises:
            DataError: It is missing, damaged, or another one.
        """
        folder = self.path / TOKENIZER_FOLDER
        tokenizer = load_tokenizer(folder)
        if tokenizer.fingerprint != self.index.tokenizer_fingerprint:
            raise DataError(
                "the stored tokenizer is not the one that prepared the tokens", where=str(folder),
                value=tokenizer.fingerprint, allowed=self.index.tokenizer_fingerprint,
                fix="prepare the folder again",
            )  # fmt: skip
        return tokenizer

    def verify(self) -> None:
        """Compare the hash of every file with the index.

        Raises:
            DataError: A file differs from the index; names it and the first 16 MiB that differ.
        """
        self._check_sizes()
        for file, _ in self._files():
            path = self.path / file.file
            for block, digest in enumerate(hash_blocks(path)):
                allowed = ", ".join(file.sha256[block : block + 1])
                if digest != allowed:
                    where = f"{path}, within 16 MiB of byte {block * HASH_BLOCK_BYTES}"
                    raise _damaged(
                        "the file has changed since it was prepared", where, digest, allowed
                    )

    def _files(self) -> list[tuple[ShardFile, np.dtype]]:
        pairs = [((s.tokens, self._dtype), (s.starts, START_DTYPE)) for s in self.info.shards]
        return [pair for both in pairs for pair in both]

    def _check_sizes(self) -> None:
        for file, dtype in self._files():
            path, expected = self.path / file.file, file.items * dtype.itemsize
            try:
                size = path.stat().st_size
            except OSError as error:
                raise _damaged("the file cannot be read", f"{path}, byte 0", str(error)) from error
            if size != expected:
                where = f"{path}, which ends at byte {size}"
                raise _damaged("the file has another size", where, size, f"{expected} bytes")

    def _read(self, file: ShardFile, first: int, count: int) -> Int64Array:
        path, width = self.path / file.file, self._dtype.itemsize
        try:
            block = np.fromfile(path, self._dtype, count, offset=first * width).astype(np.int64)
        except OSError as error:
            raise _damaged("the file cannot be read", f"{path}, byte 0", str(error)) from error
        end = first + len(block)
        if len(block) < count:
            where = f"{path}, byte {end * width}"
            raise _damaged("the file ends early", where, end, f"{file.items} tokens")
        worst = int(block.argmax())
        if block[worst] >= self.index.vocab_size:
            where = f"{path}, byte {(first + worst) * width}"
            allowed = f"0..{self.index.vocab_size - 1}"
            raise _damaged("a token is outside the vocabulary", where, int(block[worst]), allowed)
        return block


def _damaged(what: str, where: str, value: Any, allowed: str = "") -> DataError:
    fix = "prepare the folder again, or restore the file"
    return DataError(what, where=where, value=value, allowed=allowed, fix=fix)
