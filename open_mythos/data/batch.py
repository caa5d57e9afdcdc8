"""One batch of token sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from open_mythos.errors import ConfigError

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Batch:
    """Token sequences with their next tokens."""

    input_ids: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T) int64: what to predict at each position; -100 where nothing is."""
    document_ids: torch.Tensor | None
    """(B, T) int64, counting from 0 in each row; None when attention may cross documents."""
    sample_index: torch.Tensor
    """(B,) int64: the number of each sample in the run, by which per-sample randomness is keyed."""

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
                where="Batch.split(n)",
                value=n,
                allowed=f"a divisor of {len(self)}",
            )
        documents = [None] * n if self.document_ids is None else self.document_ids.chunk(n)
        parts = zip(
            self.input_ids.chunk(n),
            self.targets.chunk(n),
            documents,
            self.sample_index.chunk(n),
            strict=True,
        )
        return [Batch(*part) for part in parts]

    def to(self, device: torch.device | str) -> Batch:
        """Copy the batch to ``device``."""
        documents = self.document_ids
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            None if documents is None else documents.to(device, non_blocking=True),
            self.sample_index.to(device, non_blocking=True),
        )
