"""Lanes: the rows of the global batch, each an endless stream of tokens of its own.

Every epoch assigns each unit of the corpus to one lane. A lane reads its share, then its share of
the next epoch, independently of other lanes. A lane's tokens are therefore a function of (corpus,
tokenizer, number of lanes, seed), whichever process computes them, and its position is four
integers.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from open_mythos.data.permutation import Int64Array, Permutation
from open_mythos.data.prepare import held_out_place
from open_mythos.data.stream_corpus import Corpus, Unit
from open_mythos.data.stream_read import read_unit
from open_mythos.errors import DataError
from open_mythos.tokenizer import Tokenizer


class Position(NamedTuple):
    """The place of a token in its lane."""

    epoch: int = 0
    """Epochs that the lane has finished."""
    unit: int = 0
    """Units of its present share that it has finished."""
    cursor: int = 0
    """Place of the document in its unit; :class:`~open_mythos.data.stream_read.Document`."""
    offset: int = 0
    """Tokens of the document before this one."""


@dataclass(frozen=True)
class StreamPlan:
    """Everything that determines the tokens of every lane."""

    corpus: Corpus
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
    any number of epochs lanes therefore differ by about one unit, and by how much tokens per byte
    vary.

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
        count = len(self._sizes)
        order = Permutation(count, self._seed, len(self._orders))(np.arange(count, dtype=np.int64))
        owners = np.empty(count, np.int64)
        for place, unit in enumerate(order.tolist()):
            load, lane = self._load[0]
            owners[place] = lane
            heapq.heapreplace(self._load, (load + self._sizes[unit] + 1, lane))
        self._orders.append(order)
        self._owners.append(owners)


class Lane:
    """Reads the windows of one lane, from a position on.

    Window k covers tokens k*T .. k*T + T of the lane: neighbours share one token, so every token
    but the first is predicted once. Documents are each ended by the end-of-document token; one
    that does not fit goes on in the next window.

    Args:
        plan: What to read.
        tokenizer: Its end-of-document token ends each document.
        number: Which lane.
        position: The first token of the first window.
    """

    def __init__(
        self, plan: StreamPlan, tokenizer: Tokenizer, number: int, position: Position
    ) -> None:
        self._plan, self._tokenizer, self._number = plan, tokenizer, number
        self._documents = self._read(position)
        # documents that are not used up: their place, and their tokens
        self._held: deque[tuple[Position, Int64Array]] = deque()
        self._used = 0  # tokens of the first of them that are behind us
        self._count = 0  # tokens of all of them that are before us

    def window(self) -> tuple[Int64Array, Position]:
        """Return the next T + 1 tokens, and the position of the following window.

        Raises:
            DataError: A file is missing or damaged, or there is no text to read.
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
        self._drop(length)
        return np.concatenate(pieces), self._held[0][0]._replace(offset=self._used)

    def _drop(self, count: int) -> None:
        self._count -= count
        self._used += count
        while self._used >= len(self._held[0][1]):
            self._used -= len(self._held.popleft()[1])

    def _read(self, start: Position) -> Iterator[tuple[Position, Int64Array]]:
        """Read documents as tokens with their positions; the first is that of ``start``."""
        plan, epoch, barren = self._plan, start.epoch, 0
        while True:
            for number, unit in enumerate(plan.deal.share(epoch, self._number)):
                if (epoch, number) < (start.epoch, start.unit):
                    continue
                at_start = (epoch, number) == (start.epoch, start.unit)
                cursor = start.cursor if at_start else 0
                barren += 1
                for document in read_unit(plan.corpus, plan.units[unit], cursor):
                    if not self._is_read(document.text):
                        continue
                    barren = 0
                    place = Position(epoch, number, document.cursor)
                    if at_start and document.cursor == start.cursor:
                        place = start
                    yield place, self._encode(document.text, place)
                if barren > len(plan.units):
                    raise DataError(
                        "the corpus holds no text to train on", where=plan.corpus.source,
                        value=f"{barren} units in a row without a document",
                        allowed="documents that are not empty, and not all of them held out",
                    )  # fmt: skip
            epoch += 1

    def _is_read(self, text: str) -> bool:
        if not text:
            return False
        return not self._plan.held_out or held_out_place(text.encode()) >= self._plan.held_out

    def _encode(self, text: str, place: Position) -> Int64Array:
        # one by one: in a worker process the cores belong to other workers
        ids = np.array([*self._tokenizer.encode(text), self._tokenizer.eos_id], np.int64)
        if ids.min() < 0 or ids.max() >= self._tokenizer.vocab_size:
            raise DataError(
                "the tokenizer gave an id outside its vocabulary",
                where=f"lane {self._number}, {place}", value=(int(ids.min()), int(ids.max())),
                allowed=f"0..{self._tokenizer.vocab_size - 1}",
            )  # fmt: skip
        if place.offset >= len(ids):
            raise DataError(
                "the position lies behind the end of its document",
                where=f"lane {self._number}, {place}", value=place.offset,
                allowed=f"0..{len(ids) - 1}", fix="resume from another checkpoint",
            )  # fmt: skip
        return ids
