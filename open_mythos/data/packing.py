"""Fixed-length windows over a stream of tokens.

Window i of length T covers tokens i*T .. i*T + T: its inputs are the first T of them and its
targets the last T, so neighbours share one token and every token but the first is predicted once.
"""

from __future__ import annotations

import torch

from open_mythos.checks import check_count
from open_mythos.data.batch import Batch
from open_mythos.data.permutation import Int64Array
from open_mythos.data.shards import TokenShards
from open_mythos.errors import DataError


def document_ids(input_ids_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Number the documents of each row: (B, T) int64, from 0, in order.

    The end-of-document token belongs to the document that it ends. Attention kept to equal
    numbers stays inside documents.
    """
    ends_BT = (input_ids_BT == eos_id).long()
    return ends_BT.cumsum(dim=1) - ends_BT


class PackedWindows:
    """The windows of one split.

    Args:
        shards: The tokens.
        seq_len: T, the number of inputs of a window.
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
                f"the split {shards.split!r} is shorter than one window",
                where=str(shards.path),
                value=len(shards),
                allowed=f"at least seq_len + 1 = {seq_len + 1} tokens",
                fix="prepare more text, lower seq_len, or raise val_fraction",
            )

    def __len__(self) -> int:
        return max(0, len(self.shards) - 1) // self.seq_len

    def batch(self, windows_B: Int64Array, sample_index_B: torch.Tensor) -> Batch:
        """Read the windows numbered ``windows_B``.

        Raises:
            DataError: A shard cannot be read or holds an impossible id.
        """
        rows = [self.shards.tokens(int(i) * self.seq_len, self.seq_len + 1) for i in windows_B]
        ids = torch.stack([torch.from_numpy(row) for row in rows])
        inputs_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        documents = document_ids(inputs_BT, self.shards.eos_id) if self.mask_documents else None
        return Batch(inputs_BT, targets_BT, documents, sample_index_B)
