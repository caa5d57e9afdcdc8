"""An engine without a model: tokens and depths come from a hash of the request."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from open_mythos.inference.pages import Layout
from open_mythos.inference.request import Outcome, Request
from open_mythos.inference.scheduler import Scheduler
from open_mythos.inference.sequence import Phase, Sequence, Work
from open_mythos.seeding import derive_seed

END = 3
LAYOUT = Layout(prelude=1, recurrent=1, coda=1, page=4)
Place = tuple[int, int]
Content = tuple[Any, ...]


def request(
    id: str, prompt: Iterable[int] = (5, 6, 7), max_tokens: int = 4, **more: Any
) -> Request:
    """A request of four loops that ends at token 3."""
    return Request(id, tuple(prompt), max_tokens, **{"max_loops": 4, "ends": (END,)} | more)


def scheduler(n_slots: int = 4, n_pages: int = 400, context: int = 400, **more: Any) -> Scheduler:
    """A scheduler of small pages and chunks: 16 positions at 4 loops."""
    layout = more.pop("layout", LAYOUT)
    return Scheduler(layout, n_slots, n_pages, context, **{"chunk_loop_tokens": 64} | more)


def chosen(sequence: Sequence) -> tuple[int, int]:
    """Next token and loops of a sequence: a function of the request and position alone."""
    ask = sequence.request
    drawn = derive_seed(ask.key, f"{ask.prompt}", len(sequence.tokens))
    return drawn % 23, 1 + drawn % ask.max_loops if ask.max_loops else 0


@dataclass
class Engine:
    """Runs a scheduler's work on pages that hold what was written, and checks every read.

    The content of position i at a level is everything that decides it: ids up to i, depth, salt.
    """

    scheduler: Scheduler
    now: float = 0.0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    texts: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    cached: dict[str, int] = field(default_factory=dict)
    pool: dict[Place, Content] = field(default_factory=dict)
    """(page, offset) -> content."""
    left: dict[int, int] = field(default_factory=dict)
    """Loops that the newest token still has to run, by serial."""
    host: dict[int, list[dict[int, Content]]] = field(default_factory=dict)
    """Saved pages of the swapped sequences, by serial: content by position, of each level."""
    chains: dict[int, list[int]] = field(default_factory=dict)
    """Hash of the ids before each position, by serial."""
    chunk_ticks: list[int] = field(default_factory=list)

    def step(self, failing: Callable[[Sequence], bool] = lambda _: False) -> Work:
        """Run one tick."""
        self.now += 1
        work = self.scheduler.plan(self.now)
        self._move(work)
        if work.chunk:
            self._prefill(work)
        for sequence in self.scheduler.looping():
            self._write(sequence, sequence.position)
            self.left[sequence.serial] -= 1
            if self.left[sequence.serial] == 0:
                self.scheduler.stopped([sequence])
        for sequence in self.scheduler.edge():
            if failing(sequence):
                self.scheduler.fail(sequence, "non-finite logits")
                self._note(sequence)
                continue
            self._check_reads(sequence, sequence.position)
            self._write(sequence, sequence.position)
            self._next(sequence, self.scheduler.left)
        return work

    def run(self, most_ticks: int = 10_000) -> Engine:
        """Run until idle."""
        for _ in range(most_ticks):
            if not self.scheduler.busy:
                return self
            self.step()
            self.scheduler.check()
        raise AssertionError(f"not idle after {most_ticks} ticks: {self.scheduler.counts()}")

    def _move(self, work: Work) -> None:
        for sequence, outcome in work.ended:
            assert sequence.outcome is outcome
            self._note(sequence)
        page = self.scheduler.layout.page
        for moved in work.swap_out:
            self.host[moved.sequence.serial] = [
                {
                    k * page + i: self.pool[number, i]
                    for k, number in enumerate(row)
                    for i in range(page)
                    if (number, i) in self.pool
                }
                for row in moved.pages
            ]
        for sequence in work.swap_in:
            for level, saved in enumerate(self.host.pop(sequence.serial)):
                for i, content in saved.items():
                    if i // page < len(sequence.pages[level]):
                        self.pool[sequence.pages[level][i // page], i % page] = content

    def _prefill(self, work: Work) -> None:
        assert work.chunk
        chunk, sequence = work.chunk, work.chunk.sequence
        if chunk.start == sequence.n_cached:
            self.cached[sequence.request.id] = chunk.start
        self.chunk_ticks.append(self.scheduler.tick)
        self._check_reads(sequence, chunk.start)
        for position in range(chunk.start, chunk.stop):
            self._write(sequence, position)
        if self.scheduler.prefilled(chunk) is not None:
            self._note(sequence)
        elif chunk.last:
            self._next(sequence, self.scheduler.entered)

    def _next(self, sequence: Sequence, take: Callable[..., Outcome | None]) -> None:
        token, loops = chosen(sequence)
        if take(sequence, token, loops) is None:
            self.left[sequence.serial] = chosen(sequence)[1]
        else:
            self._note(sequence)

    def _note(self, sequence: Sequence) -> None:
        assert sequence.phase is Phase.DONE
        assert sequence.request.id not in self.outcomes, "two ends"
        assert sequence.outcome is not None
        self.outcomes[sequence.request.id] = sequence.outcome
        self.texts[sequence.request.id] = (sequence.tokens, sequence.loops)

    def _content(self, sequence: Sequence, level: int, position: int) -> Content:
        known = self.chains.setdefault(sequence.serial, [0])
        ids = (*sequence.request.prompt, *sequence.tokens) if position + 2 > len(known) else ()
        for token in ids[len(known) - 1 : position + 1]:
            known.append(hash((known[-1], token)))
        return (level, sequence.request.max_loops, sequence.request.salt, known[position + 1])

    def _write(self, sequence: Sequence, position: int) -> None:
        page = self.scheduler.layout.page
        for level, row in enumerate(sequence.pages):
            place = row[position // page], position % page
            assert place[0] > 0, "the dummy page"
            assert place[0] not in self.scheduler.pages._key_of, "a shared page is written"
            self.pool[place] = self._content(sequence, level, position)

    def _check_reads(self, sequence: Sequence, stop: int) -> None:
        """Positions below ``stop`` hold what this sequence needs, on all levels."""
        page = self.scheduler.layout.page
        assert len(sequence.pages) == sequence.levels
        for level, row in enumerate(sequence.pages):
            for i in range(stop):
                assert self.pool[row[i // page], i % page] == self._content(sequence, level, i)


def served(*requests, **options) -> Engine:
    """An engine that has run some requests, added together."""
    engine = Engine(scheduler(**options))
    for each in requests:
        engine.scheduler.add(each)
    return engine.run()
