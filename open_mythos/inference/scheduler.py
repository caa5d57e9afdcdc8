"""Decides what runs at each tick: admission, prompt chunks, the edge, pages (loads no torch).

A *tick* is one loop over the sequences in their slots; the *edge* is everything around the loop:
coda, head, choice of the token, and prelude of the next. The engine calls, once a tick::

    work = scheduler.plan(now)      # the runner: ended, swap_out, swap_in, admitted, changed
    if work.chunk: ...              # run it; prefilled(chunk); after the last one entered(...)
    rows = scheduler.looping()      # one loop each; stopped(those whose loops are done)
    rows = scheduler.edge()         # choose a token for each: left(...)

The scheduler has no clock: :meth:`Scheduler.plan` takes the time, in seconds, for deadlines.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from open_mythos.checks import check_count, check_number
from open_mythos.errors import ConfigError, EnvironmentError_, InternalError
from open_mythos.inference.ledger import Ledger
from open_mythos.inference.pages import Layout, unit_keys
from open_mythos.inference.places import Places
from open_mythos.inference.request import Outcome, Request
from open_mythos.inference.sequence import Chunk, Moved, Phase, Sequence, Work

CHUNK_LOOP_TOKENS = 2048
"""Positions times loops of a prompt chunk."""
SHORTEST_CHUNK, LONGEST_CHUNK = 16, 512
MOST_PASSED_BY = 8
"""Later requests that may be admitted before one that does not fit."""


def chunk_positions(max_loops: int, chunk_loop_tokens: int = CHUNK_LOOP_TOKENS) -> int:
    """Return the length of prompt chunks: a power of two, which depends on the depth alone."""
    most = max(chunk_loop_tokens // max(max_loops, 1), 1)
    return min(max(1 << most.bit_length() - 1, SHORTEST_CHUNK), LONGEST_CHUNK)


class Scheduler:
    """Requests in, work out; the only owner of slots, pages and the phases of sequences.

    Args:
        layout: Levels and pages of the model's cache.
        n_slots: Sequences that may run at the same time.
        n_pages: Pages of the pool without the dummy page 0.
        context: Most positions of a request, prompt and new tokens.
        chunk_loop_tokens: Positions times loops of a prompt chunk.
        ticks_per_chunk: Ticks between two chunks while any sequence loops.
        edge_fraction: Part of the running sequences that must wait before an edge runs.
        overcommit: Give pages by need and take sequences out when none is left, instead of
            reserving a request's pages at admission.
        max_queued: Requests that may wait for admission.
        facts: What decides the content of the cache besides a request: weights, dtype, ...

    Raises:
        ConfigError: An argument is out of range.
    """

    def __init__(
        self, layout: Layout, n_slots: int, n_pages: int, context: int, *,
        chunk_loop_tokens: int = CHUNK_LOOP_TOKENS, ticks_per_chunk: int = 4,
        edge_fraction: float = 0.625, overcommit: bool = False, max_queued: int = 256,
        facts: tuple[Any, ...] = (),
    ) -> None:  # fmt: skip
        check_number("edge_fraction", edge_fraction, ge=0, le=1)
        self.layout = layout
        self.context = check_count("context", context)
        self.chunk_loop_tokens = check_count("chunk_loop_tokens", chunk_loop_tokens)
        self.ticks_per_chunk = check_count("ticks_per_chunk", ticks_per_chunk)
        self.edge_fraction = edge_fraction
        self.max_queued = check_count("max_queued", max_queued)
        self.facts = facts
        self.places = Places(layout, n_slots, n_pages, overcommit)
        self.pages = self.places.pages
        self.tick = 0
        self._last_chunk = -ticks_per_chunk
        self._live: dict[str, Sequence] = {}
        self._queue: list[Sequence] = []
        self._swapped: list[Sequence] = []
        self._marks: dict[str, Outcome] = {}
        self._preempted: set[str] = set()
        self._deadlines: list[tuple[float, str]] = []
        self._settled = False
        """Nothing happened since an admission found no more that fits."""
        self.ledger = Ledger()

    def add(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            ConfigError: It is not valid, or could never run: too long, too many pages, or an id
                that lives already.
            EnvironmentError_: The queue is full.
        """
        request.validate()
        self.places.check_fits(request, self.context)
        if request.id in self._live:
            raise ConfigError(
                "a request with this id is running", where="id", value=request.id,
                allowed="an id that no live request has", fix="use a new id",
            )  # fmt: skip
        if len(self._queue) >= self.max_queued:
            raise EnvironmentError_(
                "the queue is full", where="max_queued", value=len(self._queue),
                allowed=f"at most {self.max_queued}", fix="send the request again later",
            )  # fmt: skip
        chunk = chunk_positions(request.max_loops, self.chunk_loop_tokens)
        if self.layout.share_loops:
            # within a call, loop t sees entries of loop t; of earlier calls, those of the last
            chunk = 1 << (self.context - 1).bit_length()
        unit = max(chunk, self.layout.page)
        least = 0 if request.rule == "none" else request.min_loops  # nothing reads it then
        depth = (request.max_loops, request.rule, request.numbers, least)
        sequence = Sequence(
            request, self.ledger.admitted, chunk, unit,
            unit_keys((*self.facts, *depth, request.salt), request.prompt, unit),
            self.layout.levels(request.max_loops),
        )  # fmt: skip
        self.ledger.admitted += 1
        self._live[request.id] = sequence
        self._queue.append(sequence)
        self._settled = False
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        return sequence

    def cancel(self, id: str, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End a request at the next plan; an unknown id is ignored, and so is a second mark."""
        if id in self._live:
            self._marks.setdefault(id, outcome)

    def fail(self, sequence: Sequence, error: str) -> None:
        """End a live sequence at once, with an error."""
        if sequence.outcome is not None:
            raise InternalError(
                "a request has ended already", where=f"request {sequence.request.id}",
                value=sequence.outcome.value, allowed="a request that runs",
            )  # fmt: skip
        sequence.error = error
        self._finish(sequence, Outcome.FAILED)

    def forget_prefixes(self) -> None:
        """Give up all cached prefixes that nobody holds: the weights have changed."""
        self.pages.forget()
        self._settled = False

    def preempt(self, id: str) -> None:
        """Take a running request out at the next plan, as if its pages were needed.

        It comes back at a later plan, and nobody can tell from its tokens: checks use this.
        """
        self._preempted.add(id)

    def plan(self, now: float) -> Work:
        """Begin a tick and return what it has to do."""
        self.tick += 1
        work = Work(ended=self._end_marked(now))
        for sequence in self.places.running():
            if sequence.request.id in self._preempted and not sequence.between:
                self._take_out(sequence, work)
        self._preempted.clear()
        if self.places.overcommit:
            self._grow(work)
        if not work.swap_out:
            self._swap_in(work)
        if not self._swapped:
            self._admit(work)
        work.chunk = self._next_chunk(work)
        return work

    def prefilled(self, chunk: Chunk) -> Outcome | None:
        """Note that a chunk was computed; return LENGTH if the request wanted no tokens.

        After the last chunk the engine chooses the first token and calls :meth:`entered`.
        """
        sequence = chunk.sequence
        self._expect(sequence, Phase.PREFILL)
        sequence.n_prefilled = chunk.stop
        for k in range(chunk.start // sequence.unit, chunk.stop // sequence.unit):
            self.pages.enter(sequence.keys[k], self.places.unit(sequence, k))
            self._settled = False
        if chunk.last and sequence.request.max_tokens == 0:
            self._finish(sequence, Outcome.LENGTH)
        return sequence.outcome

    def entered(self, sequence: Sequence, token: int, loops: int) -> Outcome | None:
        """Take the first token of a sequence whose prompt is done.

        Args:
            sequence: The sequence of the last chunk.
            token: The token chosen from the prompt's last logits.
            loops: Loops of the prompt's last position.

        Returns:
            Why the sequence ended, its slot and pages are then free; None if it goes on.
        """
        self._expect(sequence, Phase.PREFILL)
        return self._take(sequence, token, loops)

    def looping(self) -> list[Sequence]:
        """Return the sequences that run a loop in this tick, in the order of their slots."""
        return [each for each in self.places.running() if each.phase is Phase.LOOPING]

    def stopped(self, sequences: Iterable[Sequence]) -> None:
        """Note that these have run their last loop: they wait for the edge."""
        for sequence in sequences:
            self._expect(sequence, Phase.LOOPING)
            sequence.phase, sequence.waited_since = Phase.WAITING, self.tick

    def edge(self) -> list[Sequence]:
        """Return the sequences that pass through the edge now, those that waited longest first.

        All that wait if they are enough (``edge_fraction`` of the running ones), or if none
        loops; otherwise none.
        """
        phases = Counter(each.phase for each in self.places.running())
        waiting, looping = phases[Phase.WAITING], phases[Phase.LOOPING]
        enough = max(1, math.ceil(self.edge_fraction * (waiting + looping)))
        if waiting < enough:  # never when none loops, because the fraction is at most 1
            return []
        ready = [each for each in self.places.running() if each.phase is Phase.WAITING]
        return sorted(ready, key=lambda each: (each.waited_since, each.serial))

    def left(self, sequence: Sequence, token: int, loops: int) -> Outcome | None:
        """Take the token that the edge chose; arguments and result as of :meth:`entered`."""
        self._expect(sequence, Phase.WAITING)
        return self._take(sequence, token, loops)

    def _take(self, sequence: Sequence, token: int, loops: int) -> Outcome | None:
        sequence.tokens.append(token)
        sequence.loops.append(loops)
        request = sequence.request
        if token in request.ends:
            self._finish(sequence, Outcome.STOP)
        elif len(sequence.tokens) == request.max_tokens:
            self._finish(sequence, Outcome.LENGTH)
        elif request.max_loops:
            sequence.phase = Phase.LOOPING
        else:
            sequence.phase, sequence.waited_since = Phase.WAITING, self.tick
        return sequence.outcome

    def _end_marked(self, now: float) -> list[tuple[Sequence, Outcome]]:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, id = heapq.heappop(self._deadlines)
            # the id may have been used again since
            late = self._live.get(id)
            if late and late.request.deadline is not None and late.request.deadline <= now:
                self._marks.setdefault(id, Outcome.TIMEOUT)
        marked = [(self._live[id], outcome) for id, outcome in self._marks.items()]
        for sequence, outcome in marked:
            self._finish(sequence, outcome)
        return marked

    def _finish(self, sequence: Sequence, outcome: Outcome) -> None:
        """The one place where a sequence ends."""
        if sequence.phase is Phase.QUEUED:
            self._queue.remove(sequence)
        elif sequence.phase is Phase.SWAPPED:
            self._swapped.remove(sequence)
        else:
            self.places.clear(sequence)
        sequence.phase, sequence.outcome = Phase.DONE, outcome
        del self._live[sequence.request.id]
        self._marks.pop(sequence.request.id, None)
        self.ledger.ended[outcome] += 1
        self._settled = False

    def _admit(self, work: Work) -> None:
        """First come, first served; one that does not fit may be passed by a few later ones."""
        if self._settled:
            return
        too_large: list[Sequence] = []
        for sequence in list(self._queue):
            if any(each.passed_by >= MOST_PASSED_BY for each in too_large):
                break
            slot = self.places.free_slot()
            if slot is None:
                break
            hits = self._hits(sequence)
            if not self.places.give(sequence, slot, hits):
                too_large.append(sequence)
                continue
            for each in too_large:
                each.passed_by += 1
            self._queue.remove(sequence)
            sequence.phase = Phase.PREFILL
            sequence.n_cached = sequence.n_prefilled = len(hits) * sequence.unit
            work.admitted.append(sequence)
        self._settled = True

    def _hits(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the cached units that begin a prompt; a token is left to compute."""
        if sequence.request.prompt_logprobs:
            return ()
        most = (len(sequence.request.prompt) - 1) // sequence.unit
        return sequence.keys[: self.pages.prefix(sequence.keys[:most])]

    def _grow(self, work: Work) -> None:
        """Give running sequences the pages of their next positions, the oldest first.

        The youngest are taken out for it, which may be the sequence itself.
        """
        for sequence in sorted(self.places.running(), key=lambda each: each.serial):
            if sequence.phase is Phase.SWAPPED:
                continue
            rows = self.places.rows_needed(sequence) - len(sequence.pages[0])
            while sequence.pages and rows * sequence.levels > self.pages.available:
                self._take_out(self.places.youngest(sequence), work)
            if sequence.pages and rows > 0:
                self.places.extend(sequence, rows)
                work.changed.append(sequence)

    def _take_out(self, sequence: Sequence, work: Work) -> None:
        assert sequence.slot is not None
        work.swap_out.append(Moved(sequence, sequence.slot, sequence.pages))
        self.places.clear(sequence)
        sequence.slot, sequence.resumes = None, sequence.phase
        sequence.phase = Phase.SWAPPED
        sequence.preemptions += 1
        self.ledger.preemptions += 1
        self._swapped.append(sequence)
        self._swapped.sort(key=lambda each: each.serial)
        self._settled = False

    def _swap_in(self, work: Work) -> None:
        """The oldest comes back first, and nobody passes it."""
        while self._swapped:
            slot = self.places.free_slot()
            if slot is None or not self.places.give(self._swapped[0], slot):
                break
            sequence = self._swapped.pop(0)
            sequence.phase = sequence.resumes
            work.swap_in.append(sequence)

    def _next_chunk(self, work: Work) -> Chunk | None:
        """The next piece of the oldest prompt, one that was begun before all others."""
        running = self.places.running()
        busy = any(each.phase in (Phase.LOOPING, Phase.WAITING) for each in running)
        if busy and self.tick - self._last_chunk < self.ticks_per_chunk:
            return None
        prompts = [e for e in running if e.phase is Phase.PREFILL and not e.prompt_done]
        if not prompts:
            return None
        sequence = min(prompts, key=lambda each: (not each.begun, each.serial))
        if not sequence.begun:
            self._begin(sequence, work)
        length, start = len(sequence.request.prompt), sequence.n_prefilled
        stop = min(start + sequence.chunk, length)
        self._last_chunk = self.tick
        return Chunk(sequence, start, stop, stop == length)

    def _begin(self, sequence: Sequence, work: Work) -> None:
        """Look again for cached units: those of prompts computed since its admission."""
        hits = self._hits(sequence)
        if len(hits) * sequence.unit > sequence.n_cached:
            self.places.share(sequence, hits)
            sequence.n_cached = sequence.n_prefilled = len(hits) * sequence.unit
            work.changed.append(sequence)
            self._settled = False
        self.ledger.prefix_hits += sequence.n_cached
        self.ledger.prefix_misses += len(sequence.request.prompt) - sequence.n_cached

    def _expect(self, sequence: Sequence, phase: Phase) -> None:
        if sequence.phase is not phase:
            raise InternalError(
                "a sequence is not where it should be", where=f"request {sequence.request.id}",
                value=sequence.phase.value, allowed=phase.value,
            )  # fmt: skip

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._live)

    def counts(self) -> dict[str, int]:
        """Return the numbers behind the metrics."""
        phases = Counter(each.phase for each in self._live.values())
        return {
            **{phase.value: phases[phase] for phase in Phase if phase is not Phase.DONE},
            **self.ledger.counts(), **self.places.counts(),
            "live": len(self._live), "ticks": self.tick,
        }  # fmt: skip

    def check(self) -> None:
        """Check that no request, slot or page is lost or counted twice.

        Raises:
            LedgerError: One is.
        """
        self.ledger.check(self._live.values(), self._queue, self._swapped, self.places)
