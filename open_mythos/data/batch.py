"""A batch of token sequences, and the document numbers that masks are built from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from open_mythos.errors import ConfigError

IGNORE_INDEX = -100
"""Target of a position without a loss."""


def document_ids(input_ids_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """Number the documents of each row from 0: (B, T) int64.

    The end-of-document token belongs to the document that it ends. Attention between equal numbers
    stays within documents.
    """
    ends_BT = (input_ids_BT == eos_id).long()
    return ends_BT.cumsum(dim=1) - ends_BT


@dataclass(frozen=True)
class Batch:
    """Token sequences with their next tokens."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: the next token of each position; -100 where no loss is computed."""
    document_ids: torch.Tensor | None
    """(B, T) int64, from 0 in each row; None if attention may cross documents."""
    sample_index: torch.Tensor
    """(B,) int64: the number of each sample in the run; keys per-sample randomness."""

    @classmethod
    def from_windows(
        cls, ids: torch.Tensor, sample_index: torch.Tensor, eos_id: int | None
    ) -> Batch:
        """Split windows (B, T + 1) into inputs and targets; ``eos_id`` numbers the documents."""
        inputs_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        documents = None if eos_id is None else document_ids(inputs_BT, eos_id)
        return cls(inputs_BT, targets_BT, documents, sample_index)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def split(self, n: int) -> list[Batch]:
        """Split into ``n`` micro-batches of equal size, in order.

        Raises:
            ConfigError: The batch does not divide into ``n``.
        """
        if n < 1 or len(self) % n:
            raise ConfigError(
                f"a batch of {len(self)} does not split into {n} equal parts",
                where="Batch.split(n)", value=n, allowed=f"a divisor of {len(self)}",
            )  # fmt: skip
        rows = len(self) // n
        return [self.map(itemgetter(slice(i * rows, (i + 1) * rows))) for i in range(n)]

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to ``device``."""
        return self.map(lambda x_B: x_B.to(device, non_blocking=True))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """Apply ``change`` to every tensor."""
        return replace(self, **{k: change(x_B) for k, x_B in vars(self).items() if x_B is not None})
