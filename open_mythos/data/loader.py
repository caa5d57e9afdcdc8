"""Batches of token windows, each a pure function of (data, seed, step, rank).

Window i of length T covers tokens i*T .. i*T + T of a split: its inputs are the first T of them and
its targets the last T. Neighbors share one token, so every token but the first is predicted once.

Sample g of a run is window ``order_e(g mod N)`` of N, where e = g div N counts the epochs and
``order_e`` is the permutation of that epoch. Step s takes samples s*B .. s*B + B - 1, and rank r of
w the r-th part of them. Resuming at any step and any world size therefore needs only the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from open_mythos.checks import check_count, checked
from open_mythos.data.batch import IGNORE_INDEX, Batch
from open_mythos.data.permutation import Int64Array, Permutation
from open_mythos.data.shards import TokenShards
from open_mythos.errors import ConfigError, DataError


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

    @checked
    def __init__(self, shards: TokenShards, seq_len: int, mask_documents: bool) -> None:
        self.shards, self.mask_documents = shards, mask_documents
        self.seq_len = check_count("seq_len", seq_len)
        if len(self) == 0:
            raise DataError(
                f"the split {shards.split!r} is shorter than one window", where=str(shards.path),
                value=len(shards), allowed=f"at least seq_len + 1 = {seq_len + 1} tokens",
                fix="prepare more text, lower seq_len, or "
                f"{'lower' if shards.split == 'train' else 'raise'} val_fraction",
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


class Loader:
    """Iterates over shuffled batches of the windows of a split, without end.

    Args:
        shards: The tokens.
        seq_len: T, the length of every sequence.
        global_batch: B, sequences per step over all ranks.
        seed: The run's seed; it determines the order.
        rank: Number of this process.
        world_size: Number of processes; it must divide ``global_batch``.
        mask_documents: Whether batches carry ``document_ids``.

    Raises:
        ConfigError: A number is out of range, or the batch does not divide among the ranks.
        DataError: The split is too short for one window.
    """

    @checked
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
        self._rows = rows_of_rank(global_batch, rank, world_size)
        self._windows = PackedWindows(shards, seq_len, mask_documents)
        self.global_batch, self.seed = global_batch, seed
        self.step = 0

    @property
    def windows(self) -> int:
        """N, the number of sequences in one epoch."""
        return len(self._windows)

    @property
    def epoch(self) -> int:
        """Epochs completed before the next step."""
        return self.step * self.global_batch // self.windows

    def next_batch(self, step: int) -> Batch:
        """Return the batch of this rank at ``step``; the position does not change.

        Raises:
            ConfigError: ``step`` is negative.
            DataError: A shard cannot be read; names the file and byte.
        """
        samples = check_count("step", step, 0) * self.global_batch + self._rows
        return self._windows.batch(self._order(samples), samples)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.next_batch(self.step)
        self.step += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the identity of the data, JSON-ready."""
        return {
            "step": self.step,
            "epoch": self.epoch,
            "seed": self.seed,
            "dataset": self._windows.shards.fingerprint,
            "seq_len": self._windows.seq_len,
            "global_batch": self.global_batch,
            "mask_documents": self._windows.mask_documents,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position in ``state``, saved at any world size.

        Raises:
            DataError: ``state`` is malformed, or of other data, seed or geometry; names each
                field. The position is then unchanged.
        """
        step = saved_step(state)
        position = {"step": step, "epoch": step * self.global_batch // self.windows}
        check_position(state, self.state_dict() | position)
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

    All ranks get the same number of batches of the same shape, so that collectives inside a model
    match: rows past the last window repeat window 0 with all targets -100 and ``sample_index`` -1.

    The arguments and errors are those of :class:`Loader`, and ``max_windows``: stop after this many
    windows; None for all.
    """

    @checked
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
        self._rows, self._global_batch = rows_of_rank(global_batch, rank, world_size), global_batch
        self._windows = PackedWindows(shards, seq_len, mask_documents)
        self._count = len(self._windows)
        if max_windows is not None:
            self._count = min(self._count, check_count("max_windows", max_windows))

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self._count // self._global_batch)

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            index = step * self._global_batch + self._rows
            filler = index >= self._count
            windows, index[filler] = np.where(filler, 0, index), -1
            batch = self._windows.batch(windows, index)
            batch.targets[torch.from_numpy(filler)] = IGNORE_INDEX
            yield batch


def rows_of_rank(global_batch: int, rank: int, world_size: int) -> Int64Array:
    """Return the rows of the global batch that ``rank`` reads: (B / world_size,)."""
    check_count("global_batch", global_batch)
    check_count("world_size", world_size)
    if check_count("rank", rank, 0) >= world_size:
        raise ConfigError("no such rank", where="rank", value=rank, allowed=f"0..{world_size - 1}")
    if global_batch % world_size:
        raise ConfigError(
            f"{global_batch} samples do not divide among {world_size} ranks", where="global_batch",
            value=global_batch, allowed=f"a multiple of the world size, {world_size}",
        )  # fmt: skip
    local = global_batch // world_size
    return np.arange(rank * local, (rank + 1) * local, dtype=np.int64)


def saved_step(state: Any) -> int:
    """Return the step of a saved position; raise a DataError if there is none."""
    step = state.get("step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise malformed("step", step, "an integer >= 0")
    return step


def malformed(field: str, value: Any, allowed: str) -> DataError:
    """Return the error for an invalid field of a saved position."""
    return DataError("not a position", where=f"state[{field!r}]", value=value, allowed=allowed)


def check_position(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise a DataError that names each field in which a saved position is not as ``expected``."""
    keys = sorted(saved.keys() | expected.keys())
    pairs = {key: (saved.get(key, "missing"), expected.get(key, "unknown")) for key in keys}
    if differing := {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}:
        raise DataError(
            "the saved position is of other data or another geometry",
            where="load_state_dict: " + ", ".join(differing),
            value="; ".join(f"{key}: saved {a!r}, now {b!r}" for key, (a, b) in differing.items()),
            allowed="equal fields",
            fix="resume with the data and settings of the saved run, or start a new run",
        )
