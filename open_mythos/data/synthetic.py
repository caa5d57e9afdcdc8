"""PERM-HOP(N, R): follow a chain of relations, one hop per relation.

N entities and R relations, each relation a fixed random permutation of the entities. A program is
the tokens ``<e> <r1> ... <rk>``; at every relation the label is the entity reached so far,
r_i(... r_1(e)). Permutations matter: with any other map the last relations alone say much about
the answer.

A tenth of all prefixes of two hops or more, chosen by a hash, is never a training label: those are
the queries that a test asks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.checks import check_int, check_ranks
from open_mythos.data.permutation import Int64Array, UInt64Array, mix64
from open_mythos.errors import DataError
from open_mythos.seeding import derive_seed, seeded_generator

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class PermHop:
    """The task; entities are tokens 0..N-1 and relations tokens N..N+R-1.

    Args:
        entities: N.
        relations: R.
        seed: Fixes the permutations, the held-out prefixes and the programs that are drawn.

    Raises:
        ConfigError: A number is out of range.
    """

    entities: int = 16
    relations: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_int(self.entities, "entities", 2)
        check_int(self.relations, "relations", 1)

    @property
    def vocab_size(self) -> int:
        """Number of tokens: N + R."""
        return self.entities + self.relations

    @cached_property
    def tables(self) -> Int64Array:
        """``tables[r, e]``: the entity that relation r makes of entity e; (R, N) int64."""
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
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Programs drawn for ``step``: (B, hops + 1) tokens; a pure function of its arguments.

        Args:
            step: Steps of training and of testing draw from different streams.
            global_batch: Programs over all ranks; each depends on its place in it alone.
            hops: k, the relations of every program.
            held_out: Label only the held-out prefixes (testing), instead of only the others.
            final_only: Label the last relation only.
            chains: Programs that stand one after the other in each row, which then has
                ``chains * (hops + 1)`` tokens: the later ones at positions, and with something
                before them, that a single program of this length never has.
            rank: This process.
            world_size: Number of processes; it must divide ``global_batch``.

        Returns:
            Targets are -100 at the entity and at every position without a label.

        Raises:
            ConfigError: A number is out of range, or the batch does not divide among the ranks.
        """
        check_int(step, "step", 0)
        check_int(hops, "hops", 1)
        check_int(chains, "chains", 1)
        check_ranks(global_batch, "global_batch", rank, world_size)
        local = global_batch // world_size
        rows_B = np.arange(rank * local, (rank + 1) * local, dtype=np.int64)
        # a row's chains have places of their own; B is rows times chains until they are joined
        places_B = (rows_B[:, None] * chains + np.arange(chains)).reshape(-1)
        entity_B, relations_BK = self._draw(step, places_B, hops, held_out)
        answers_BK = self.answers(entity_B, relations_BK)
        labelled_BK = self.is_held_out(entity_B, relations_BK) == held_out
        if final_only:
            labelled_BK[:, :-1] = False
        targets_BK = np.where(labelled_BK, answers_BK, IGNORE_INDEX)
        unlabelled_B1 = np.full((len(places_B), 1), IGNORE_INDEX, np.int64)
        return Batch(
            torch.from_numpy(np.c_[entity_B, relations_BK + self.entities].reshape(local, -1)),
            torch.from_numpy(np.c_[unlabelled_B1, targets_BK].reshape(local, -1)),
            None,
            torch.from_numpy(step * global_batch + rows_B),
        )

    def answers(self, entity_B: Int64Array, relations_BK: Int64Array) -> Int64Array:
        """The entity reached after each hop: (B, K) int64."""
        reached, path = entity_B, []
        for relation_B in relations_BK.T:
            reached = self.tables[relation_B, reached]
            path.append(reached)
        return np.stack(path, axis=1)

    def is_held_out(self, entity_B: Int64Array, relations_BK: Int64Array) -> np.ndarray:
        """Whether the prefix that ends at each relation is held out: (B, K) bool."""
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
        """Entities (B,) and relations (B, K); each number hashes (seed, step, place, position)."""
        stream = "permhop/test" if held_out else "permhop/train"
        key = np.uint64(derive_seed(self.seed, stream, step))
        row_B1 = mix64(places_B.astype(np.uint64) ^ key)[:, None]
        words: UInt64Array = mix64(row_B1 ^ np.arange(hops + 1, dtype=np.uint64))
        entity_B = words[:, 0] % np.uint64(self.entities)
        relations_BK = words[:, 1:] % np.uint64(self.relations)
        return entity_B.astype(np.int64), relations_BK.astype(np.int64)


class Task(Protocol):
    """A synthetic task: a dataclass that draws batches."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def batch(self, step: int, *, global_batch: int, hops: int) -> Batch:
        """The rows of ``step``, a pure function of the arguments."""


class TaskLoader:
    """Fresh rows of a task at every step, for a trainer (a ``BatchLoader``).

    Args:
        task: Where they are drawn from.
        global_batch: Rows of a batch.
        hops: Length of what a row asks.
    """

    def __init__(self, task: Task, *, global_batch: int, hops: int) -> None:
        self.step = 0
        self._task, self._global_batch, self._hops = task, global_batch, hops

    def next_batch(self, step: int) -> Batch:
        """The rows of ``step``."""
        return self._task.batch(step, global_batch=self._global_batch, hops=self._hops)

    def state_dict(self) -> dict[str, Any]:
        """Position and identity, JSON-ready."""
        return {"step": self.step, "task": asdict(self._task), "hops": self._hops}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position.

        Raises:
            DataError: It is that of other rows.
        """
        own = self.state_dict()
        if {**state, "step": 0} != {**own, "step": 0}:
            raise DataError(
                "the position belongs to other rows", where=type(self).__name__, value=state,
                allowed=str(own), fix="build the loader with the same task and settings",
            )  # fmt: skip
        self.step = state["step"]


class PermHopLoader(TaskLoader):
    """Fresh programs at every step, singly and then in pairs.

    Args:
        task: Where they are drawn from.
        global_batch: Rows of a batch.
        hops: Relations of every program.
        pair_from: Step from which on every row holds two programs, one after the other; None for
            one throughout. It begins with single ones because they are learnt faster.
    """

    def __init__(
        self, task: PermHop, *, global_batch: int, hops: int, pair_from: int | None = None
    ) -> None:
        super().__init__(task, global_batch=global_batch, hops=hops)
        self._programs, self._pair_from = task, pair_from

    def next_batch(self, step: int) -> Batch:
        """The programs of ``step``."""
        pair = self._pair_from is not None and step >= self._pair_from
        return self._programs.batch(
            step, global_batch=self._global_batch, hops=self._hops, chains=2 if pair else 1
        )

    def state_dict(self) -> dict[str, Any]:
        """Position and identity, JSON-ready."""
        return super().state_dict() | {"pair_from": self._pair_from}
