"""IN-CONTEXT HOPS: a permutation told in the prompt, new in every row, and chains through it.

A row states M facts "a goes to b", one token each, in random order: a cyclic permutation of M of
the N entities. Then it names one of the M and asks on: ``<e> <next> ... <next>``. The label at the
i-th of these k tokens is the entity i facts further. Weights cannot know the facts; they have to be
read, and with what was read one has to read again.

Why cyclic: a chain through short cycles comes back to what it has already answered. Why M of N: if
all entities were in every row, the facts taken together would say nothing, and attention that is
still uniform would have nothing to learn from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from open_mythos.checks import check_count
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.permutation import Int64Array, UInt64Array, mix64
from open_mythos.seeding import derive_seed


@dataclass(frozen=True)
class InContextHop:
    """The task; tokens are the N entities, "next", and the N^2 facts that can be stated.

    Args:
        entities: N.
        stated: M, entities of a row, and its facts.
        seed: Fixes the rows that are drawn.

    Raises:
        ConfigError: A number is out of range.
    """

    entities: int = 16
    stated: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("stated", self.stated, 2)
        check_count("entities", self.entities, self.stated)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: N + 1 + N^2."""
        return self.entities + 1 + self.entities**2

    def batch(self, step: int, *, global_batch: int, hops: int, test: bool = False) -> Batch:
        """Draw the rows of ``step``: (B, M + hops) tokens; a pure function of the arguments.

        Args:
            step: Every step has rows of its own.
            global_batch: B, the rows; each depends on its place in the batch alone.
            hops: k, facts to follow.
            test: From another stream than training rows.

        Returns:
            Targets are -100 at the facts.

        Raises:
            ConfigError: A number is out of range.
        """
        check_count("step", step, 0)
        check_count("hops", hops)
        check_count("global_batch", global_batch)
        m, rows_B = self.stated, np.arange(global_batch, dtype=np.int64)
        words = self._words(step, rows_B, test)
        cycle_BM = words[:, : self.entities].argsort(axis=1)[:, :m]
        facts_BM = self.entities + 1 + cycle_BM * self.entities + np.roll(cycle_BM, -1, axis=1)
        order_BM = words[:, self.entities :].argsort(axis=1)
        # the cycle is in random order already: every chain begins at its first entity
        asked_BK = np.full((global_batch, hops), self.entities, np.int64)
        asked_BK[:, 0] = cycle_BM[:, 0]
        answers_BK = cycle_BM[:, np.arange(1, hops + 1) % m]
        unlabelled_BM = np.full((global_batch, m), IGNORE_INDEX, np.int64)
        return Batch(
            torch.from_numpy(np.c_[np.take_along_axis(facts_BM, order_BM, axis=1), asked_BK]),
            torch.from_numpy(np.c_[unlabelled_BM, answers_BK]),
            None,
            torch.from_numpy(step * global_batch + rows_B),
        )

    def _words(self, step: int, rows_B: Int64Array, test: bool) -> UInt64Array:
        """(B, N + M) hashes of (seed, step, row, place)."""
        stream = "in-context/test" if test else "in-context/train"
        key = np.uint64(derive_seed(self.seed, stream, step))
        row_B1 = mix64(rows_B.astype(np.uint64) ^ key)[:, None]
        return mix64(row_B1 ^ np.arange(self.entities + self.stated, dtype=np.uint64))
