"""Batches of rows, and what is chosen for them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from open_mythos.inference.levels import Groups
from open_mythos.inference.request import MOST_LOGPROBS, Request
from open_mythos.inference.sequence import Sequence
from open_mythos.ops.sampling import Stages

Scored = tuple[float | None, tuple[tuple[int, float], ...]]
"""Log-probability of a token, and the most likely tokens with theirs."""


class Chosen(NamedTuple):
    """The next token of a row."""

    token: int
    loops: int
    """Loops that the row ran to choose it."""
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    """Most likely tokens and their log-probabilities."""
    finite: bool
    """Whether all logits were finite."""


class Saved(NamedTuple):
    """A sequence that was taken out of its slot."""

    state: list[Tensor]
    counts: list[int]
    """Pages of each level."""
    entries: Tensor
    """Content of the pages, level by level."""


@dataclass(frozen=True)
class Needs:
    """What the requests of a batch ask for; the rest is not computed."""

    kinds: tuple[str, ...]
    """Exit rules."""
    stages: Stages
    """Stages of sampling."""
    biased: bool
    """Some request has a logit bias or a schema."""
    n_top: int | None
    """Alternatives to compute; None if no request wants log-probabilities."""

    @classmethod
    def of(cls, requests: Rows[Request]) -> Needs:
        """Return the needs of a batch of these requests."""
        wanted = [each.logprobs for each in requests if each.logprobs is not None]
        # always the most: which of equally likely tokens come first depends on the number
        n_top = MOST_LOGPROBS if any(wanted) else 0
        return cls(
            tuple(sorted({each.rule for each in requests})), Stages.of(requests),
            any(each.logit_bias or each.schema is not None for each in requests),
            n_top if wanted else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Rows that are computed together: on a CPU dummies first, then sequences by number of pages.

    With neither ``sequences`` nor ``groups``, no shape depends on values: rows that do not run are
    computed and discarded.
    """

    slots_R: Tensor
    needs: Needs
    sequences: Rows[Sequence] = ()
    groups: Groups | None = None
    n_blocks: int | None = None
    """Pages of a level to read; all by default."""

    @property
    def n_dummies(self) -> int:
        """Rows before the sequences."""
        return len(self.slots_R) - len(self.sequences)


class Choice(NamedTuple):
    """The next token of every row of a batch, on the device."""

    real_R: Tensor | None
    """False on rows that are not computed; None if they are the dummies."""
    token_R: Tensor
    loops_R: Tensor
    """Loops that the row ran to choose it."""
    finite_R: Tensor
    """Whether all logits were finite."""
    logprob_R: Tensor | None
    """Log-probability of the token, if any request wants it."""
    top_RK: Tensor | None
    """Most likely tokens."""
    value_RK: Tensor | None
    """Their log-probabilities."""


def runs(pages: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, end row, pages) of the runs of equal numbers."""
    start = 0
    for end in range(1, len(pages) + 1):
        if end == len(pages) or pages[end] != pages[start]:
            yield start, end, pages[start]
            start = end


def read_choices(batch: Batch, choice: Choice) -> list[Chosen]:
    """Copy the choices of a batch's sequences to the host."""
    skip = batch.n_dummies
    token, loops, finite = (
        x[skip:].tolist() for x in (choice.token_R, choice.loops_R, choice.finite_R)
    )
    if choice.logprob_R is None or choice.top_RK is None or choice.value_RK is None:
        rows = zip(token, loops, finite, strict=True)
        return [Chosen(*row[:2], None, (), row[2]) for row in rows]
    own, ids, values = (
        x[skip:].tolist() for x in (choice.logprob_R, choice.top_RK, choice.value_RK)
    )
    wanted = [sequence.request.logprobs for sequence in batch.sequences]
    return [
        Chosen(token[i], loops[i], *scored(n, own[i], ids[i], values[i]), finite[i])
        for i, n in enumerate(wanted)
    ]


def scored(n: int | None, own: float, ids: list[int], values: list[float]) -> Scored:
    """Return a row's log-probability and its ``n`` alternatives, or nothing."""
    if n is None:
        return None, ()
    return own, tuple(zip(ids[:n], values[:n], strict=True))


def few_sizes(n: int) -> int:
    """Round up to 1, 2, 3, 4, 6, 8, 12, ...: at most half more, where each size is a capture."""
    octave = 1
    while 2 * octave < n:
        octave *= 2
    return next(size for size in (octave, octave * 3 // 2, octave * 2) if size >= n)
