"""Lanes: the rows of the global batch, each an endless stream of tokens.

Every epoch assigns each unit of the corpus to one lane. A lane reads its share, then its share of
the next epoch, independently of other lanes. A lane's tokens are therefore a function of (corpus,
tokenizer, number of lanes, seed), whichever process computes them, and its position is four
integers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np

from open_mythos.data.corpus import Corpus, Unit
from open_mythos.data.documents import is_held_out, read_unit
from open_mythos.data.packing import with_end
from open_mythos.data.permutation import Int64Array, Permutation
from open_mythos.errors import DataError
from open_mythos.tokenizer import Tokenizer


class Position(NamedTuple):
    """The place of a token in its lane."""

    epoch: int = 0
    """Epochs that the lane has finished."""
    unit: int = 0
    """Units of its current share that it has finished."""
    cursor: int = 0
    """Place of the document in its unit; :class:`~open_mythos.data.documents.Document`."""
    offset: int = 0
    """Tokens of the document before this one."""


class Windows(NamedTuple):
    """One window of each of several lanes."""

    ids: Int64Array
    """(lanes, T + 1)."""
    after: list[Position]
    """Start of each lane's next window."""


@dataclass(frozen=True)
class StreamPlan:
    """Everything that determines the tokens of every lane."""

    corpus: Corpus
    tokenizer: Tokenizer
    lanes: int
    """B, the sequences of a global batch."""
    seq_len: int
    """T."""
    seed: int
    held_out: float
    """Share of the documents, chosen by a hash of their text, that no lane reads."""

    @cached_property
    def units(self) -> list[Unit]:
        """Units that are assigned to lanes."""
        return self.corpus.units(self.lanes)

    @cached_property
    def deal(self) -> Deal:
        """Assignment of units to lanes."""
        sizes = [self.corpus.unit_size(unit) for unit in self.units]
        return Deal(sizes, self.lanes, self.seed)


class Deal:
    """Assigns the units of each epoch to lanes.

    The units of an epoch are permuted, and each goes to the lane with the fewest bytes so far. Over
    any number of epochs, lanes therefore differ by about one unit and by the variation of tokens
    per byte.

    Args:
        sizes: Bytes of each unit.
        lanes: Number of lanes.
        seed: The run's seed.
    """

    def __init__(self, sizes: list[int], lanes: int, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._load = [(0, lane) for lane in range(lanes)]  # sorted, hence a heap
        self._orders: list[Int64Array] = []
        self._owners: list[Int64Array] = []

    def share(self, epoch: int, lane: int) -> list[int]:
        """Return the units that ``lane`` reads in ``epoch``, in order; may be empty."""
        while len(self._orders) <= epoch:
            self._deal_next()
        return self._orders[epoch][self._owners[epoch] == lane].tolist()

    def _deal_next(self) -> None:
        units = np.arange(len(self._sizes), dtype=np.int64)
        order = Permutation(len(units), self._seed, len(self._orders))(units)
        owners = np.empty_like(order)
        for place, unit in enumerate(order.tolist()):
            load, lane = self._load[0]
            owners[place] = lane
            heapq.heapreplace(self._load, (load + self._sizes[unit] + 1, lane))
        self._orders.append(order)
        self._owners.append(owners)


def read_lanes(
    plan: StreamPlan, lanes: Sequence[int], positions: Sequence[Position]
) -> Iterator[Windows]:
    """Read the windows of ``lanes`` step by step, each lane from its position on."""
    readers = [Lane(plan, *where) for where in zip(lanes, positions, strict=True)]
    while True:
        windows = [reader.window() for reader in readers]
        yield Windows(np.stack([ids for ids, _ in windows]), [after for _, after in windows])


class Lane:
    """Reads the windows of one lane, from a position on.

    Window k covers tokens k*T .. k*T + T of the lane: neighbors share one token, so every token but
    the first is predicted once. Each document is followed by the end-of-document token, and
    continues in the next window if it does not fit.

    Args:
        plan: The stream.
        number: Index of the lane.
        position: The first token of the first window.
    """

    def __init__(self, plan: StreamPlan, number: int, position: Position) -> None:
        self._plan, self._number = plan, number
        self._documents = self._read(position)
        self._held: deque[tuple[Position, Int64Array]] = deque()  # documents in use, their tokens
        self._used = 0  # consumed tokens of the first of them
        self._count = 0  # remaining tokens of all of them

    def window(self) -> tuple[Int64Array, Position]:
        """Return the next T + 1 tokens, and the position of the following window.

        Raises:
            DataError: A file is missing or damaged, or the corpus has no text.
            EnvironmentError_: A file cannot be read.
        """
        length = self._plan.seq_len
        while self._count <= length:
            place, ids = next(self._documents)
            if not self._held:
                self._used = place.offset
            self._held.append((place, ids))
            self._count += len(ids) - place.offset
        pieces, wanted, used = [], length + 1, self._used
        for _, ids in self._held:
            pieces.append(ids[used : used + wanted])
            wanted, used = wanted - len(pieces[-1]), 0
            if not wanted:
                break
        self._count -= length
        self._used += length
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])
        return np.concatenate(pieces), self._held[0][0]._replace(offset=self._used)

    def _read(self, start: Position) -> Iterator[tuple[Position, Int64Array]]:
        """Read documents as tokens with their positions; the first is that of ``start``."""
        plan, empty_units = self._plan, 0
        for epoch in count(start.epoch):
            for number, unit in enumerate(plan.deal.share(epoch, self._number)):
                if (epoch, number) < start[:2]:
                    continue
                cursor = start.cursor if (epoch, number) == start[:2] else 0
                empty_units += 1
                for document in read_unit(plan.corpus, plan.units[unit], cursor):
                    if not document.text or is_held_out(document.text, plan.held_out):
                        continue
                    empty_units = 0
                    place = Position(epoch, number, document.cursor)
                    if place == start._replace(offset=0):
                        place = start
                    yield place, self._encode(document.text, place)
                if empty_units > len(plan.units):
                    raise DataError(
                        "the corpus holds no text to train on", where=plan.corpus.source,
                        value=f"{empty_units} consecutive units without a document",
                        allowed="documents that are not empty, and not all of them held out",
                    )  # fmt: skip

    def _encode(self, text: str, place: Position) -> Int64Array:
        tokenizer, where = self._plan.tokenizer, f"lane {self._number}, {place}"
        # one text per call: in a worker process the other cores belong to other workers
        ids = with_end(tokenizer.encode(text), tokenizer, where)
        if place.offset >= len(ids):
            raise DataError(
                "the position is past the end of its document", where=where, value=place.offset,
                allowed=f"0..{len(ids) - 1}", fix="resume from another checkpoint",
            )  # fmt: skip
        return ids
