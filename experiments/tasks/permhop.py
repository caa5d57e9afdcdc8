"""PERM-HOP(N, R): follow a chain of relations, one hop per relation.

N entities and R relations, each relation a fixed random permutation of the entities. A program is
``<e> <r1> ... <rk>``; the label at each relation is the entity reached so far, r_i(... r_1(e)).
With non-permutations the last relations alone would be informative about the answer.

A tenth of all prefixes of two or more hops, chosen by a hash, is never labeled in training; tests
query those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from open_mythos.checks import check_count, check_number
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.permutation import Int64Array, UInt64Array, mix64
from open_mythos.seeding import derive_seed, seeded_generator

HELD_OUT_ONE_IN = 10
MOST_ENTRIES = 1 << 24
"""Of the tables."""


@dataclass(frozen=True)
class PermHop:
    """The task; entities are tokens 0..N-1 and relations tokens N..N+R-1."""

    entities: int = 16
    relations: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("entities", self.entities, 2)
        check_count("relations", self.relations)
        check_number("entities x relations", self.entities * self.relations, le=MOST_ENTRIES)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens, N + R."""
        return self.entities + self.relations

    @cached_property
    def tables(self) -> Int64Array:
        """Return the entity that relation r maps entity e to, (R, N) int64."""
        generator = seeded_generator(self.seed, "permhop/tables")
        tables = [torch.randperm(self.entities, generator=generator) for _ in range(self.relations)]
        return torch.stack(tables).numpy()

    def batch(
        self,
        step: int,
        *,
        global_batch: int,
        hops: int,
        held_out: bool = False,
        final_only: bool = False,
        chains: int = 1,
    ) -> Batch:
        """Draw the programs (B, hops + 1) of ``step``, a pure function of the arguments.

        Args:
            step: Training step.
            global_batch: B, rows; each depends only on its place in the batch.
            hops: k, relations per program.
            held_out: Draw from the test stream and label only the held-out prefixes.
            final_only: Label the last relation only.
            chains: Consecutive programs per row, which then has ``chains * (hops + 1)`` tokens.

        Returns:
            A batch whose targets are -100 at positions without a label.
        """
        check_count("step", step, 0)
        check_count("hops", hops)
        check_count("chains", chains)
        check_count("global_batch", global_batch)
        # B is rows times chains until the chains of a row are joined
        places_B = np.arange(global_batch * chains, dtype=np.int64)
        entity_B, relations_BK = self._draw(step, places_B, hops, held_out)
        answers_BK = self.answers(entity_B, relations_BK)
        labelled_BK = self.is_held_out(entity_B, relations_BK) == held_out
        if final_only:
            labelled_BK[:, :-1] = False
        targets_BK = np.where(labelled_BK, answers_BK, IGNORE_INDEX)
        unlabelled_B1 = np.full((len(places_B), 1), IGNORE_INDEX, np.int64)
        tokens, targets = (
            torch.from_numpy(array.reshape(global_batch, -1))
            for array in (
                np.c_[entity_B, relations_BK + self.entities], np.c_[unlabelled_B1, targets_BK]
            )
        )  # fmt: skip
        first = step * global_batch
        return Batch(tokens, targets, None, torch.arange(first, first + global_batch))

    def answers(self, entity_B: Int64Array, relations_BK: Int64Array) -> Int64Array:
        """Return the entity reached after each hop, (B, K) int64."""
        reached, path = entity_B, []
        for relation_B in relations_BK.T:
            reached = self.tables[relation_B, reached]
            path.append(reached)
        return np.stack(path, axis=1)

    def questions(self, hops: int, programs: int = 4096) -> tuple[Tensor, Tensor]:
        """Return held-out programs (B, hops + 1), about a tenth of ``programs``, and answers."""
        batch = self.batch(0, global_batch=programs, hops=hops, held_out=True)
        asked_B = batch.targets[:, -1] >= 0
        return batch.input_ids[asked_B], batch.targets[asked_B, -1]

    def is_held_out(self, entity_B: Int64Array, relations_BK: Int64Array) -> np.ndarray:
        """Return whether the prefix ending at each relation is held out, (B, K) bool."""
        key = np.uint64(derive_seed(self.seed, "permhop/held-out"))
        hash_B = mix64(entity_B.astype(np.uint64) ^ key)
        chosen = []
        for relation_B in relations_BK.T:
            hash_B = mix64(hash_B ^ relation_B.astype(np.uint64))
            chosen.append(hash_B % np.uint64(HELD_OUT_ONE_IN) == 0)
        held_out_BK = np.stack(chosen, axis=1)
        held_out_BK[:, 0] = False
        return held_out_BK

    def _draw(
        self, step: int, places_B: Int64Array, hops: int, held_out: bool
    ) -> tuple[Int64Array, Int64Array]:
        """Draw entities (B,) and relations (B, K) by hashing (seed, step, place, position)."""
        stream = "permhop/test" if held_out else "permhop/train"
        key = np.uint64(derive_seed(self.seed, stream, step))
        row_B1 = mix64(places_B.astype(np.uint64) ^ key)[:, None]
        words: UInt64Array = mix64(row_B1 ^ np.arange(hops + 1, dtype=np.uint64))
        entity_B = words[:, 0] % np.uint64(self.entities)
        relations_BK = words[:, 1:] % np.uint64(self.relations)
        return entity_B.astype(np.int64), relations_BK.astype(np.int64)
