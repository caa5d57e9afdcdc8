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
from open_mythos.data.documents import is_held_out, read_unit, with_end
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
    """Assigns the units of each epoch, of ``sizes`` bytes, to lanes.

    The units of an epoch are permuted, and each goes to the lane with the fewest bytes so far. Over
    any number of epochs, lanes therefore differ by about one unit and by the variation of tokens
    per byte.
    """

    def __init__(self, sizes: list[int], lanes: int, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        self._load = [(0, lane) for lane in range(lanes)]  # sorted, hence a heap
        self._shares: list[list[list[int]]] = []  # epoch -> lane -> units

    def share(self, epoch: int, lane: int) -> list[int]:
        """Return the units that ``lane`` reads in ``epoch``, in order; may be empty."""
        units = np.arange(len(self._sizes), dtype=np.int64)
        while len(self._shares) <= epoch:
            shares: list[list[int]] = [[] for _ in self._load]
            for unit in Permutation(len(units), self._seed, len(self._shares))(units).tolist():
                load, least = self._load[0]
                shares[least].append(unit)
                heapq.heapreplace(self._load, (load + self._sizes[unit] + 1, least))
            self._shares.append(shares)
        return self._shares[epoch][lane]


def read_lanes(
    plan: StreamPlan, lanes: Sequence[int], positions: Sequence[Position]
) -> Iterator[Windows]:
    """Read the windows of ``lanes`` step by step, each lane from its position on."""
    readers = [_windows(plan, *where) for where in zip(lanes, positions, strict=True)]
    for windows in zip(*readers, strict=True):
        yield Windows(np.stack([ids for ids, _ in windows]), [after for _, after in windows])


def _windows(plan: StreamPlan, lane: int, start: Position) -> Iterator[tuple[Int64Array, Position]]:
    """Yield windows (T + 1,) of one lane from ``start`` on, each with the start of the next one.

    Window k covers tokens k*T .. k*T + T of the lane: neighbors share one token, so every token but
    the first is predicted once. Each document is followed by the end-of-document token, and
    continues in the next window if it does not fit.
    """
    length, held = plan.seq_len, 0
    documents: deque[tuple[Position, Int64Array]] = deque()  # unused tokens, and the first's place
    for place, ids in _documents(plan, lane, start):
        documents.append((place, ids[place.offset :]))
        held += len(ids) - place.offset
        while held > length:
            window = np.concatenate([rest[: length + 1] for _, rest in documents])[: length + 1]
            used = length
            while used >= len(documents[0][1]):
                used -= len(documents.popleft()[1])
            place, rest = documents[0]
            place = place._replace(offset=place.offset + used)
            documents[0], held = (place, rest[used:]), held - length
            yield window, place


def _documents(
    plan: StreamPlan, lane: int, start: Position
) -> Iterator[tuple[Position, Int64Array]]:
    """Yield the tokens of the documents of a lane with their places, beginning at ``start``."""
    empty_units = 0
    for epoch in count(start.epoch):
        for number, unit in enumerate(plan.deal.share(epoch, lane)):
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
                where = f"lane {lane}, {place}"
                # one text per call: in a worker process the other cores belong to other workers
                ids = with_end(plan.tokenizer.encode(document.text), plan.tokenizer, where)
                if place.offset >= len(ids):
                    raise DataError(
                        "the position is past the end of its document", where=where,
                        value=place.offset, allowed=f"0..{len(ids) - 1}",
                        fix="resume from another checkpoint",
                    )  # fmt: skip
                yield place, ids
            if empty_units > len(plan.units):
                raise DataError(
                    "the corpus holds no text to train on", where=plan.corpus.source,
                    value=f"{empty_units} consecutive units without a document",
                    allowed="documents that are not empty, and not all of them held out",
                )  # fmt: skip
