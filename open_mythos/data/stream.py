"""Batches from a corpus that is read, tokenized and packed while the model trains.

The global batch has B rows, and each is a lane of its own (:mod:`open_mythos.data.stream_lanes`).
Step s takes the next window of every lane, and rank r of w owns lanes r*B/w .. (r+1)*B/w - 1. The
batches are therefore equal at every world size and with any number of workers, no text is read by
two processes, and a position is four integers per lane.

Each epoch assigns every document to exactly one lane, and a lane finishes its share of one epoch
before it starts on the next: every document is read once per epoch. Lanes are not synchronised at
the end of an epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from open_mythos.checks import check_count
from open_mythos.data.batch import Batch
from open_mythos.data.loader import check_position, check_ranks
from open_mythos.data.packing import document_ids
from open_mythos.data.stream_corpus import Corpus
from open_mythos.data.stream_lanes import Position, StreamPlan
from open_mythos.data.stream_workers import LaneWindows, Windows, WorkerGoneError, WorkerPool
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1
Gather = Callable[[list[Position]], list[list[Position]]]
"""From the lanes of this rank to those of every rank, in order; called by all ranks at once."""


class StreamLoader:
    """Iterates over batches from a corpus without end (a ``BatchLoader``).

    ``next_batch(step)`` accepts the next step, or the last one again: a stream has no random
    access. Setting :attr:`step` or calling :meth:`skip` moves forward by reading what lies between;
    :meth:`load_state_dict` moves anywhere.

    Args:
        corpus: The text.
        tokenizer: Turns documents into tokens; its end-of-document token ends each.
        seq_len: T, the length of every sequence.
        global_batch: Sequences per step over all ranks, B.
        seed: The run's seed; it fixes the order.
        rank: This process.
        world_size: Number of processes; it must divide ``global_batch``.
        mask_documents: Whether batches carry ``document_ids``.
        held_out: Share of the documents to leave for :class:`HeldOutWindows`, in [0, 1).
        num_workers: Processes that read and tokenize ahead; 0 reads inside ``next_batch``.
        prefetch: Steps that a worker prefetches.
        gather: Replaces the collective of ``torch.distributed``.

    Raises:
        ConfigError: A number is out of range, or the batch does not divide among the ranks.
    """

    _step: int  # steps done, as the trainer counts them
    _next: int  # of the first batch that was not given yet
    _before: list[Position]  # the last batch given
    _after: list[Position]  # the batch after it
    _last: Batch | None
    _windows: Iterator[Windows] | None

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = False,
        held_out: float = 0.0,
        num_workers: int = 0,
        prefetch: int = 2,
        gather: Gather | None = None,
    ) -> None:
        check_ranks(global_batch, "global_batch", rank, world_size)
        check_count("seq_len", seq_len)
        check_count("num_workers", num_workers, 0)
        check_count("prefetch", prefetch)
        check_share(held_out)
        self.global_batch, self.mask_documents = global_batch, mask_documents
        self._plan = StreamPlan(corpus, global_batch, seq_len, seed, held_out)
        self._tokenizer, self._gather = tokenizer, gather
        local = global_batch // world_size
        self._world_size = world_size
        self._lanes = range(rank * local, (rank + 1) * local)
        self._workers, self._prefetch = min(num_workers, local), prefetch
        self._begin(0, [Position()] * local)

    @property
    def step(self) -> int:
        """Number of the next step."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        """Set the number of the next step; batches that are skipped are read and dropped.

        Raises:
            ConfigError: It lies before the step of the last batch.
        """
        first = self._next - (self._last is not None)
        if value < first:
            raise ConfigError(
                "a stream cannot go back", where="StreamLoader.step", value=value,
                allowed=f">= {first}", fix="load the state of an earlier step: load_state_dict",
            )  # fmt: skip
        self._step = value

    @property
    def epoch(self) -> int:
        """Epochs that every lane of this rank has finished."""
        return min(position.epoch for position in self._at_step())

    def next_batch(self, step: int) -> Batch:
        """Return the batch of this rank at ``step``: (B / world size, T) tokens.

        :attr:`step` becomes ``step``. After an error the position is unchanged and the next call
        retries. A worker that died is replaced, with a warning.

        Raises:
            ConfigError: ``step`` is neither the next one nor the last one.
            DataError: A file is missing or damaged; names the row or byte.
            EnvironmentError_: A file cannot be read, or the new workers died too.
        """
        if self._last is not None and step == self._next - 1 >= self._step:
            return self._last
        due = max(self._step, self._next)
        if step != due:
            raise ConfigError(
                "the stream stands at another step", where="StreamLoader.next_batch(step)",
                value=step, allowed=str(due),
                fix="go forward with skip(n), elsewhere with load_state_dict",
            )  # fmt: skip
        self._read_up_to(due)
        batch = self._read_one()
        self._step = due
        return batch

    def skip(self, count: int) -> None:
        """Skip ``count`` steps; their batches are read and dropped.

        Raises:
            ConfigError: ``count`` is negative.
            DataError, EnvironmentError_: As of :meth:`next_batch`.
        """
        self._step += check_count("count", count, 0)
        self._read_up_to(self._step)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.next_batch(self._step)
        self._step += 1
        return batch

    def close(self) -> None:
        """Stop the workers; the next batch starts new ones."""
        self._windows = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position of all lanes and the identity of the stream, ready for JSON.

        Prefetched batches do not count. With several ranks this is a collective operation: all
        ranks call it at the same step.

        Raises:
            ConfigError: There are several ranks, and nothing joins them.
        """
        self._read_up_to(self._step)
        everyone = (self._gather or self._gather_ranks)(self._at_step())
        lanes = [list(position) for rank in everyone for position in rank]
        return self._identity() | {
            "step": self._step, "epoch": min(lane[0] for lane in lanes), "lanes": lanes,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position in ``state``, which any world size may have saved.

        Raises:
            DataError: ``state`` is malformed, or of another corpus, tokenizer, seed or geometry;
                names each field. The position is then unchanged.
        """
        state = state if isinstance(state, dict) else {}
        lanes: Any = state.get("lanes")
        if not _are_positions(lanes, self.global_batch):
            raise _not_a_position("lanes", lanes, f"{self.global_batch} times four integers >= 0")
        step = state.get("step")
        if type(step) is not int or step < 0:
            raise _not_a_position("step", step, "an integer >= 0")
        place = {"step": step, "lanes": lanes, "epoch": min(lane[0] for lane in lanes)}
        expected = self._identity() | place
        check_position(state, expected, "the saved position is of another stream")
        self._begin(step, [Position(*lanes[lane]) for lane in self._lanes])

    def _begin(self, step: int, positions: list[Position]) -> None:
        self._step = self._next = step
        self._before = self._after = positions
        self._last = self._windows = None

    def _read_up_to(self, step: int) -> None:
        while self._next < step:
            self._read_one()

    def _read_one(self) -> Batch:
        try:
            ids, after = self._pull()
        except BaseException:
            self._windows = None  # lanes may be at different steps now
            raise
        self._before, self._after = self._after, after
        self._last = self._batch(self._next, torch.from_numpy(ids))
        self._next += 1
        return self._last

    def _pull(self) -> Windows:
        try:
            self._windows = self._windows or self._start()
            return next(self._windows)
        except WorkerGoneError as error:
            # a signal to the process group ends the workers, but the trainer may need this batch
            # for an orderly stop
            logger.warning("starting new data workers: %s", error)
            self._windows = self._start()
            return next(self._windows)

    def _start(self) -> Iterator[Windows]:
        what = (self._plan, self._tokenizer, self._lanes, self._after)
        if self._workers:
            return WorkerPool(*what, workers=self._workers, prefetch=self._prefetch)
        return iter(LaneWindows(*what))

    def _at_step(self) -> list[Position]:
        return self._after if self._step >= self._next else self._before

    def _batch(self, step: int, ids: torch.Tensor) -> Batch:
        inputs_BT, targets_BT = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        masks = document_ids(inputs_BT, self._tokenizer.eos_id) if self.mask_documents else None
        index = step * self.global_batch + torch.arange(self._lanes.start, self._lanes.stop)
        return Batch(inputs_BT, targets_BT, masks, index)

    def _identity(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "format": FORMAT, "corpus": plan.corpus.fingerprint,
            "tokenizer": self._tokenizer.fingerprint, "units": len(plan.units), "seed": plan.seed,
            "seq_len": plan.seq_len, "global_batch": self.global_batch, "held_out": plan.held_out,
            "mask_documents": self.mask_documents,
        }  # fmt: skip

    def _gather_ranks(self, mine: list[Position]) -> list[list[Position]]:
        if self._world_size == 1:
            return [mine]
        if not (dist.is_available() and dist.is_initialized()):
            raise ConfigError(
                "the positions of the other ranks cannot be asked for",
                where="StreamLoader.state_dict", value=self._world_size, allowed="one rank",
                fix="initialise torch.distributed, or pass gather",
            )  # fmt: skip
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, mine)
        return everyone


def check_share(held_out: float) -> None:
    """Raise a ConfigError unless ``held_out`` is in [0, 1)."""
    if not 0 <= held_out < 1:
        raise ConfigError("not a share", where="held_out", value=held_out, allowed="[0, 1)")


def _are_positions(lanes: Any, count: int) -> bool:
    return (
        isinstance(lanes, list)
        and len(lanes) == count
        and all(isinstance(lane, list) and len(lane) == 4 for lane in lanes)
        and all(type(number) is int and number >= 0 for lane in lanes for number in lane)
    )


def _not_a_position(field: str, value: Any, allowed: str) -> DataError:
    return DataError("not a position", where=f"state[{field!r}]", value=value, allowed=allowed)
