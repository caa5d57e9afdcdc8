"""Pages of the cache: who holds them, and which prompt prefixes they contain (loads no torch).

A page holds some positions of one level; a *level* is one (layer, loop) of the cache. A *unit* is
a run of prompt positions that is cached and shared as a whole: its pages of all levels.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError, InternalError

PAGE = 64
"""Positions of a page."""


@dataclass(frozen=True)
class Layout:
    """How many pages a request needs.

    Levels are numbered: prelude layers, coda layers, then loop t of recurrent layer r at
    ``prelude + coda + t * recurrent + r``.
    """

    prelude: int
    """Layers before the loop; all layers of a model without loops."""
    recurrent: int = 0
    """Layers of the loop."""
    coda: int = 0
    """Layers after the loop."""
    share_loops: bool = False
    """All loops share one set of levels."""
    page: int = PAGE
    """Positions of a page, a power of two."""

    def __post_init__(self) -> None:
        check_count("page", self.page)
        if self.page & (self.page - 1):
            raise ConfigError(
                "the page is not a power of two", where="page", value=self.page,
                allowed="1, 2, 4, ...", fix=f"use {PAGE}",
            )  # fmt: skip

    def levels(self, max_loops: int) -> int:
        """Return the levels of a request of at most ``max_loops`` loops."""
        loops = min(max_loops, 1) if self.share_loops else max_loops
        return self.prelude + self.coda + loops * self.recurrent

    def rows(self, positions: int) -> int:
        """Return the pages of one level that hold ``positions``."""
        return -(-positions // self.page)

    def pages(self, max_loops: int, positions: int) -> int:
        """Return the pages of a request, all levels together."""
        return self.levels(max_loops) * self.rows(positions)


def unit_keys(facts: Many[Any], prompt: Many[int], unit: int) -> tuple[bytes, ...]:
    """Return the key of every whole unit of a prompt: a SHA-256 chain over its ids.

    Args:
        facts: Everything besides the ids that decides what the pages contain, as JSON types.
        prompt: Token ids below 2^63.
        unit: Positions of a unit.
    """
    key = hashlib.sha256(json.dumps([unit, *facts]).encode()).digest()
    keys = []
    for start in range(0, len(prompt) - unit + 1, unit):
        key = hashlib.sha256(key + array("q", prompt[start : start + unit]).tobytes()).digest()
        keys.append(key)
    return tuple(keys)


class Pages:
    """Allocates pages, counts their holders and finds cached prefixes.

    A page is free, held (by sequences), or cached: it belongs to an entered unit that nobody
    holds. Cached units are given up when pages are needed, those unused longest first. Entered
    pages are never written again, so any number of sequences may hold them.

    Args:
        n_pages: Pages that can be given out: 1 to ``n_pages``. Number 0 is a dummy that takes
            masked writes, so the pool has one page more.
    """

    def __init__(self, n_pages: int) -> None:
        self.total = check_count("n_pages", n_pages)
        self._free = list(range(n_pages, 0, -1))
        self._holders = [0] * (n_pages + 1)
        self._units: dict[bytes, tuple[int, ...]] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[bytes, None] = {}
        """Cached units, unused longest first."""
        self.cached = 0

    @property
    def free(self) -> int:
        """Pages without content that anybody could want."""
        return len(self._free)

    @property
    def available(self) -> int:
        """Pages that :meth:`take` can give."""
        return self.free + self.cached

    @property
    def held(self) -> int:
        """Pages of sequences."""
        return self.total - self.free - self.cached

    def take(self, n: int) -> list[int]:
        """Return ``n`` pages, held once.

        Raises:
            InternalError: There are fewer; the caller has to ask ``available`` first.
        """
        if n > self.available:
            raise InternalError(
                "more pages taken than there are",
                where="Pages.take",
                value=n,
                allowed="the pages that are free",
            )
        while self.free < n:
            self._forget(next(iter(self._idle)))
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back that one sequence held.

        Units become idle in the order of their last pages: pass later positions first, so that
        the end of a prefix is given up before its beginning.
        """
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[self._key_of[page]] = None
                    self.cached += 1
                else:
                    self._free.append(page)

    def prefix(self, keys: Many[bytes]) -> int:
        """Return how many leading units are entered."""
        return next((n for n, key in enumerate(keys) if key not in self._units), len(keys))

    def idle_pages(self, keys: Many[bytes]) -> int:
        """Return the pages of entered units that nobody holds, which :meth:`hold` would claim."""
        return sum(len(self._units[key]) for key in keys if key in self._idle)

    def hold(self, key: bytes) -> tuple[int, ...]:
        """Return the pages of an entered unit, held once more."""
        pages = self._units[key]
        if key in self._idle:
            del self._idle[key]
            self.cached -= len(pages)
        for page in pages:
            self._holders[page] += 1
        return pages

    def enter(self, key: bytes, pages: Iterable[int]) -> None:
        """Enter a computed unit; nothing happens if it is known: those pages stay private."""
        if key not in self._units:
            self._units[key] = tuple(pages)
            self._key_of.update(dict.fromkeys(self._units[key], key))

    def forget(self) -> None:
        """Give up all cached units."""
        while self._idle:
            self._forget(next(iter(self._idle)))

    def _forget(self, key: bytes) -> None:
        pages = self._units.pop(key)
        del self._idle[key]
        for page in pages:
            del self._key_of[page]
        self._free.extend(pages)
        self.cached -= len(pages)

    def check(self, holders: Iterable[Iterable[int]]) -> None:
        """Check every count against the pages that sequences hold.

        Args:
            holders: The pages of each live sequence.

        Raises:
            InternalError: A page is lost, given out twice, or counted wrongly.
        """
        counts = Counter(page for pages in holders for page in pages)
        wrong = [p for p in range(self.total + 1) if counts[p] != self._holders[p]]
        shared = [p for p, n in counts.items() if n > 1 and p not in self._key_of]
        idle = [page for key in self._idle for page in self._units[key]]
        places = Counter([*self._free, *idle, *counts.keys()])
        lost = [p for p in range(1, self.total + 1) if places[p] != 1]
        for what, pages in (
            ("pages are not counted as they are held", wrong),
            ("pages of several sequences are not shared ones", shared),
            ("pages are lost, or both given out and free", lost),
            ("the dummy page was given out", [0] if places[0] else []),
        ):
            if pages:
                raise InternalError(
                    what, where="Pages", value=pages, allowed="pages that are in use once"
                )
        if len(idle) != self.cached or len(counts) != self.held:
            raise InternalError(
                "free + cached + held is not the total", where="Pages",
                value=(self.free, self.cached, self.held), allowed=str(self.total),
            )  # fmt: skip
