"""IN-CONTEXT HOPS: a permutation given in the prompt, new in every row, and chains through it.

A row states M facts "a -> b", one token each, in random order: a cyclic permutation of M of the N
entities. Then follow an entity and hops, ``<e> <next> ... <next>``; the label at the i-th of these
k tokens is the entity i facts later. The facts cannot be stored in weights: each hop is a lookup
in the prompt that depends on the previous one.

The permutation is cyclic because short cycles would revisit earlier answers. Only M of N entities
appear because otherwise the set of facts would be the same in every row and uniform attention
would have no signal to learn from.
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
    """The task with N entities and M stated facts; tokens: N entities, "next", N^2 facts."""

    entities: int = 16
    stated: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("stated", self.stated, 2)
        check_count("entities", self.entities, self.stated)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, N + 1 + N^2."""
        return self.entities + 1 + self.entities**2

    def batch(
        self, step: int, *, global_batch: int, hops: int, chains: int = 1, test: bool = False
    ) -> Batch:
        """Draw the rows (B, M + chains hops) of ``step``, a pure function of the arguments.

        A row asks several ``chains`` one after the other, each from a random fact. Targets are -100
        at the facts. ``test`` rows come from another random stream.
        """
        check_count("step", step, 0)
        check_count("hops", hops)
        check_count("chains", chains)
        check_count("global_batch", global_batch)
        m, rows_B = self.stated, np.arange(global_batch, dtype=np.int64)
        words = self._words(step, rows_B, test, self.entities + m + chains)
        cycle_BM = words[:, : self.entities].argsort(axis=1)[:, :m]
        facts_BM = self.entities + 1 + cycle_BM * self.entities + np.roll(cycle_BM, -1, axis=1)
        order_BM = words[:, self.entities : self.entities + m].argsort(axis=1)
        start_BC = (words[:, self.entities + m :] % np.uint64(m)).astype(np.int64)
        start_BC[:, 0] = 0  # the cycle is in random order already
        asked_BCK = np.full((global_batch, chains, hops), self.entities, np.int64)
        asked_BCK[..., 0] = np.take_along_axis(cycle_BM, start_BC, axis=1)
        places_BCK = (start_BC[..., None] + np.arange(1, hops + 1)) % m
        asked_BK, places_BK = (x.reshape(global_batch, -1) for x in (asked_BCK, places_BCK))
        answers_BK = np.take_along_axis(cycle_BM, places_BK, axis=1)
        unlabelled_BM = np.full((global_batch, m), IGNORE_INDEX, np.int64)
        return Batch(
            torch.from_numpy(np.c_[np.take_along_axis(facts_BM, order_BM, axis=1), asked_BK]),
            torch.from_numpy(np.c_[unlabelled_BM, answers_BK]),
            None,
            torch.from_numpy(step * global_batch + rows_B),
        )

    def _words(self, step: int, rows_B: Int64Array, test: bool, count: int) -> UInt64Array:
        """Return hashes (B, count) of (seed, step, row, position)."""
        stream = "in-context/test" if test else "in-context/train"
        key = np.uint64(derive_seed(self.seed, stream, step))
        row_B1 = mix64(rows_B.astype(np.uint64) ^ key)[:, None]
        return mix64(row_B1 ^ np.arange(count, dtype=np.uint64))
