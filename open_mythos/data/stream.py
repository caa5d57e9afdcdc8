"""Batches from a corpus that is read, tokenized and packed during training.

Each of the B rows of the global batch is a lane (:mod:`open_mythos.data.stream_lanes`). Step s
takes the next window of every lane, and rank r of w reads lanes r*B/w .. (r+1)*B/w - 1. The batches
are therefore equal at every world size and with any number of workers, no text is read by two
processes, every document is read once per epoch, and a position is four integers per lane.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from open_mythos.checks import check_count, checked
from open_mythos.data.batch import Batch
from open_mythos.data.corpus import Corpus
from open_mythos.data.documents import check_share
from open_mythos.data.loader import check_position, malformed, rows_of_rank, saved_step
from open_mythos.data.stream_lanes import Position, StreamPlan, Windows, read_lanes
from open_mythos.data.stream_workers import WorkerDiedError, prefetched
from open_mythos.distributed import world_size as group_size
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

FORMAT = 1


class StreamLoader:
    """Iterates over batches from a corpus without end (a ``BatchLoader``).

    ``next_batch(step)`` accepts the next step, or the last one again: a stream has no random
    access. Setting :attr:`step` moves forward by reading the batches between;
    :meth:`load_state_dict` moves anywhere.

    Args:
        corpus: The text.
        tokenizer: Encodes documents; each is followed by its end-of-document token.
        seq_len: T, the length of every sequence.
        global_batch: B, sequences per step over all ranks.
        seed: The run's seed; it determines the order.
        rank: Number of this process.
        world_size: Number of processes; it must divide ``global_batch``.
        mask_documents: Whether batches carry ``document_ids``.
        held_out: Share of the documents that is left to :class:`HeldOutWindows`, in [0, 1).
        num_workers: Processes that read and tokenize ahead; 0 reads inside ``next_batch``.
        prefetch: Steps that a worker prefetches.

    Raises:
        ConfigError: A number is out of range, or the batch does not divide among the ranks.
    """

    _last: Batch | None  # the last batch read
    _windows: Iterator[Windows] | None

    @checked
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
    ) -> None:
        self._lanes: list[int] = rows_of_rank(global_batch, rank, world_size).tolist()
        check_count("seq_len", seq_len)
        check_share("held_out", held_out)
        self.global_batch, self.mask_documents = global_batch, mask_documents
        self._world_size = world_size
        self._plan = StreamPlan(corpus, tokenizer, global_batch, seq_len, seed, held_out)
        self._workers = min(check_count("num_workers", num_workers, 0), len(self._lanes))
        self._prefetch = check_count("prefetch", prefetch)
        self._begin(0, [Position()] * len(self._lanes))

    @property
    def step(self) -> int:
        """Number of the next step."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        """Set the number of the next step; skipped batches are read and dropped.

        Raises:
            ConfigError: It is less than the step of the last batch.
        """
        first = self._next - (self._last is not None)
        if value < first:
            raise ConfigError(
                "a stream cannot move backwards", where="StreamLoader.step", value=value,
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
                "the stream is at another step", where="StreamLoader.next_batch(step)", value=step,
                allowed=str(due), fix="move forward by setting step, elsewhere by load_state_dict",
            )  # fmt: skip
        self._read_up_to(due)
        batch = self._read_one()
        self._step = due
        return batch

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
        """Return the position of all lanes and the identity of the stream, JSON-ready.

        Prefetched batches do not count. With several ranks this is a collective: all ranks call it
        at the same step.

        Raises:
            ConfigError: The process group does not have ``world_size`` ranks.
        """
        self._read_up_to(self._step)
        return self._state(self._step, [list(place) for place in self._gather(self._at_step())])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position in ``state``, saved at any world size.

        Raises:
            DataError: ``state`` is malformed, or of another corpus, tokenizer, seed or geometry;
                names each field. The position is then unchanged.
        """
        step, lanes = saved_step(state), state.get("lanes")
        if (
            not isinstance(lanes, list)
            or len(lanes) != self.global_batch
            or not all(isinstance(lane, list) and len(lane) == 4 for lane in lanes)
            or not all(type(number) is int and number >= 0 for lane in lanes for number in lane)
        ):
            raise malformed("lanes", lanes, f"{self.global_batch} times four integers >= 0")
        check_position(state, self._state(step, lanes))
        self._begin(step, [Position(*lanes[lane]) for lane in self._lanes])

    def _begin(self, step: int, positions: list[Position]) -> None:
        self._step = self._next = step  # the caller's next step; step of the next batch to read
        self._before = self._after = positions  # start of the last batch read, and of the next one
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
        index = torch.tensor(self._lanes) + self._next * self.global_batch
        eos_id = self._plan.tokenizer.eos_id if self.mask_documents else None
        self._last = Batch.from_windows(torch.from_numpy(ids), index, eos_id)
        self._next += 1
        return self._last

    def _pull(self) -> Windows:
        try:
            self._windows = self._windows or self._start()
            return next(self._windows)
        except WorkerDiedError as error:
            # a signal to the process group ends the workers; an orderly stop may need this batch
            logger.warning("restarting the data workers: %s", error)
            self._windows = self._start()
            return next(self._windows)

    def _start(self) -> Iterator[Windows]:
        if not self._workers:
            return read_lanes(self._plan, self._lanes, self._after)
        return prefetched(
            self._plan, self._lanes, self._after, workers=self._workers, prefetch=self._prefetch
        )

    def _at_step(self) -> list[Position]:
        return self._after if self._step >= self._next else self._before

    def _state(self, step: int, lanes: list[list[int]]) -> dict[str, Any]:
        plan = self._plan
        return {
            "format": FORMAT, "corpus": plan.corpus.fingerprint,
            "tokenizer": plan.tokenizer.fingerprint, "units": len(plan.units), "seed": plan.seed,
            "seq_len": plan.seq_len, "global_batch": self.global_batch, "held_out": plan.held_out,
            "mask_documents": self.mask_documents, "step": step,
            "epoch": min(lane[0] for lane in lanes), "lanes": lanes,
        }  # fmt: skip

    def _gather(self, mine: list[Position]) -> list[Position]:
        """Gather the positions of the lanes of all ranks."""
        if self._world_size == 1:
            return mine
        if group_size() != self._world_size:
            raise ConfigError(
                "the other ranks are not in the process group", where="StreamLoader.state_dict",
                value=group_size(), allowed=f"{self._world_size} ranks",
                fix="initialize torch.distributed with all ranks",
            )  # fmt: skip
        everyone: list[Any] = [None] * self._world_size
        dist.all_gather_object(everyone, mine)
        return [position for positions in everyone for position in positions]
