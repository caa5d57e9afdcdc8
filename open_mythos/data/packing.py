"""Fixed-length windows over a stream of tokens.

Window i of length T covers tokens i*T .. i*T + T: its inputs are the first T of them and its
targets the last T. Neighbors share one token, so every token but the first is predicted once.
"""

from __future__ import annotations

import numpy as np
import torch

from open_mythos.checks import check_count
from open_mythos.data.batch import Batch
from open_mythos.data.permutation import Int64Array
from open_mythos.data.shards import TokenShards
from open_mythos.errors import DataError
from open_mythos.tokenizer import Tokenizer


def with_end(ids: list[int], tokenizer: Tokenizer, where: str) -> Int64Array:
    """Append the end-of-document token to the ids of a document: (length + 1,).

    Raises:
        DataError: An id is outside the vocabulary.
    """
    array = np.array([*ids, tokenizer.eos_id], np.int64)
    if array.min() < 0 or array.max() >= tokenizer.vocab_size:
        raise DataError(
            "the tokenizer returned an id outside its vocabulary", where=where,
            value=(int(array.min()), int(array.max())), allowed=f"0..{tokenizer.vocab_size - 1}",
        )  # fmt: skip
    return array


class PackedWindows:
    """The windows of one split.

    Args:
        shards: The tokens.
        seq_len: T, inputs of a window.
        mask_documents: Whether batches carry ``document_ids``.

    Raises:
        ConfigError: ``seq_len`` is not a positive integer.
        DataError: The split is too short for one window.
    """

    def __init__(self, shards: TokenShards, seq_len: int, mask_documents: bool) -> None:
        self.shards, self.mask_documents = shards, mask_documents
        self.seq_len = check_count("seq_len", seq_len)
        if len(self) == 0:
            raise DataError(
                f"the split {shards.split!r} is shorter than one window", where=str(shards.path),
                value=len(shards), allowed=f"at least seq_len + 1 = {seq_len + 1} tokens",
                fix="prepare more text, lower seq_len, or raise val_fraction",
            )  # fmt: skip

    def __len__(self) -> int:
        return max(0, len(self.shards) - 1) // self.seq_len

    def batch(self, windows_B: Int64Array, sample_index_B: Int64Array) -> Batch:
        """Read the windows numbered ``windows_B``.

        Raises:
            DataError: A shard cannot be read or holds an invalid id.
        """
        rows = [self.shards.tokens(int(i) * self.seq_len, self.seq_len + 1) for i in windows_B]
        eos_id = self.shards.eos_id if self.mask_documents else None
        return Batch.from_windows(
            torch.from_numpy(np.stack(rows)), torch.from_numpy(sample_index_B), eos_id
        )
