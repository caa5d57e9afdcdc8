"""Batches of token windows, each a pure function of (data, seed, step, rank).

Sample g of a run is window ``order_e(g mod N)`` of N, where e = g div N counts the epochs and
``order_e`` is the permutation of that epoch. Step s takes samples s*B .. s*B + B - 1, and rank r of
w the r-th part of them. So resuming at any step, at any world size, needs no more than the step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from open_mythos.checks import check_count
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.packing import PackedWindows
from open_mythos.data.permutation import Int64Array, Permutation
from open_mythos.data.shards import TokenShards
from open_mythos.errors import ConfigError, DataError


class Loader:
    """Iterates over shuffled batches of the windows of a split, without end.

    Args:
        shards: The tokens.
        seq_len: T, the length of every sequence.
        global_batch: Sequences per step over all ranks.
        seed: The run's seed; it fixes the order.
        rank: This process.
        world_size: Number of processes; it must divide ``global_batch``.
        mask_documents: Whether batches carry ``document_ids``.

    Raises:
        ConfigError: A number is out of range, or the batch does not divide among the ranks.
        DataError: The split is too short for one window.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
    ) -> None:
        check_ranks(global_batch, "global_batch", rank, world_size)
        self._windows = PackedWindows(shards, seq_len, mask_documents)
        self._fingerprint = shards.fingerprint
        self.global_batch, self.seed = global_batch, seed
        self._local = global_batch // world_size
        self._offset = rank * self._local
        self.step = 0

    @property
    def windows(self) -> int:
        """N, the number of sequences in one epoch."""
        return len(self._windows)

    @property
    def epoch(self) -> int:
        """Epochs completed when the next step begins."""
        return self.step * self.global_batch // self.windows

    def next_batch(self, step: int) -> Batch:
        """Return the batch of this rank at ``step``, without moving the iteration.

        Raises:
            ConfigError: ``step`` is negative.
            DataError: A shard cannot be read; names the file and byte.
        """
        first = check_count("step", step, 0) * self.global_batch + self._offset
        samples = np.arange(first, first + self._local, dtype=np.int64)
        return self._windows.batch(self._order(samples), torch.from_numpy(samples))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.next_batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the identity of the data, ready for JSON."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seed": self.seed,
            "dataset": self._fingerprint,
            "seq_len": self._windows.seq_len,
            "global_batch": self.global_batch,
            "mask_documents": self._windows.mask_documents,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position in ``state``, which any world size may have saved.

        Raises:
            DataError: ``state`` is malformed, or of other data, seed or geometry; names each
                field. The position is then unchanged.
        """
        expected = self.state_dict()
        step = state.get("step") if isinstance(state, dict) else None
        if type(step) is not int or step < 0:
            raise DataError(
                "not a position", where="state['step']", value=step, allowed="an integer >= 0"
            )
        expected |= {"step": step, "epoch": step * self.global_batch // self.windows}
        check_position(state, expected, "the saved position is of other data or another geometry")
        self.step = step

    def _order(self, samples: Int64Array) -> Int64Array:
        """Return the window of each sample; a batch may span epochs."""
        epochs, places = np.divmod(samples, self.windows)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            order = Permutation(self.windows, self.seed, int(epoch))
            places[of_epoch] = order(places[of_epoch])
        return places


class EpochWindows:
    """Iterates once, in order, over the windows of a split, for evaluation.

    All ranks get the same number of batches of the same shape, so that collective operations
    inside a model match up: rows beyond the last window repeat window 0 with all targets -100 and
    ``sample_index`` -1.

    Args:
        shards: The tokens.
        seq_len: T, the length of every sequence.
        global_batch: Sequences per step over all ranks.
        rank: This process.
        world_size: Number of processes; it must divide ``global_batch``.
        mask_documents: Whether batches carry ``document_ids``.
        max_windows: Stop after this many windows; None for all.

    Raises:
        ConfigError: A number is out of range, or the batch does not divide among the ranks.
        DataError: The split is too short for one window.
    """

    def __init__(
        self,
        shards: TokenShards,
        *,
        seq_len: int,
        global_batch: int,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
        max_windows: int | None = None,
    ) -> None:
        check_ranks(global_batch, "global_batch", rank, world_size)
        self._windows = PackedWindows(shards, seq_len, mask_documents)
        self._count = len(self._windows)
        if max_windows is not None:
            self._count = min(self._count, check_count("max_windows", max_windows))
        self._global_batch = global_batch
        self._local = global_batch // world_size
        self._offset = rank * self._local

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self._count // self._global_batch)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            first = step * self._global_batch + self._offset
            index = np.arange(first, first + self._local, dtype=np.int64)
            filler = index >= self._count
            windows, index[filler] = np.where(filler, 0, index), -1
            batch = self._windows.batch(windows, torch.from_numpy(index))
            batch.targets[torch.from_numpy(filler)] = IGNORE_INDEX
            yield batch


def check_ranks(batch: int, where: str, rank: int, world_size: int) -> None:
    """Check that ``batch`` samples divide among ``world_size`` ranks, and that ``rank`` is one.

    Raises:
        ConfigError: It does not.
    """
    check_count(where, batch)
    check_count("world_size", world_size)
    if check_count("rank", rank, 0) >= world_size:
        raise ConfigError("no such rank", where="rank", value=rank, allowed=f"0..{world_size - 1}")
    if batch % world_size:
        raise ConfigError(
            f"{batch} samples do not divide among {world_size} ranks",
            where=where,
            value=batch,
            allowed=f"a multiple of the world size, {world_size}",
        )


def check_position(saved: Mapping[str, Any], present: Mapping[str, Any], what: str) -> None:
    """Check that a saved position is one in the present data.

    Args:
        saved: Its fields.
        present: The fields that it must have.
        what: What is wrong if it has others.

    Raises:
        DataError: ``what``; names each field that differs.
    """
    differing = {
        key: (saved.get(key, "missing"), present.get(key, "unknown"))
        for key in sorted(present.keys() | saved.keys())
        if key not in saved or key not in present or saved[key] != present[key]
    }
    if differing:
        raise DataError(
            what,
            where="load_state_dict: " + ", ".join(differing),
            value="; ".join(f"{key}: saved {a!r}, now {b!r}" for key, (a, b) in differing.items()),
            allowed="equal fields",
            fix="resume with the data and settings of the saved run, or start a new run",
        )
