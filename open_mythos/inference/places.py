"""Slots and pages of running sequences (loads no torch)."""

from __future__ import annotations

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError
from open_mythos.inference.pages import Layout, Pages
from open_mythos.inference.request import Request
from open_mythos.inference.sequence import Sequence

MOST_PREEMPTIONS = 3
"""Times that a request is taken out; it then waits until all its pages fit."""


def written(request: Request) -> int:
    """Return how many positions are ever written: the last token is never an input."""
    return len(request.prompt) + max(request.max_tokens, 1) - 1


class Places:
    """Gives sequences a slot and pages, and takes them back.

    Args:
        layout: Levels and pages of the model's cache.
        n_slots: Sequences that may run at the same time.
        n_pages: Pages of the pool without the dummy page 0.
        overcommit: Give pages by need instead of all at the start.
    """

    def __init__(self, layout: Layout, n_slots: int, n_pages: int, overcommit: bool) -> None:
        self.layout, self.overcommit = layout, overcommit
        self.pages = Pages(n_pages)
        self.slots: list[Sequence | None] = [None] * check_count("n_slots", n_slots)

    def check_fits(self, request: Request, context: int) -> None:
        """Check that a request can run when it is alone.

        Raises:
            ConfigError: It is longer than the context, or needs more pages than there are.
        """
        positions = len(request.prompt) + request.max_tokens
        if positions > context:
            raise ConfigError(
                "prompt and new tokens are longer than the context", where="max_tokens",
                value=f"{len(request.prompt)} + {request.max_tokens}",
                allowed=f"at most {context} together", fix="shorten the prompt or lower max_tokens",
            )  # fmt: skip
        needed = self.layout.pages(request.max_loops, written(request))
        if needed > self.pages.total:
            raise ConfigError(
                "the request needs more cache than there is", where="max_tokens",
                value=f"{needed} pages", allowed=f"at most {self.pages.total} pages",
                fix="lower max_tokens or max_loops, or start with more memory for the cache",
            )  # fmt: skip

    def running(self) -> list[Sequence]:
        """Return the sequences that have a slot, in the order of the slots."""
        return [each for each in self.slots if each is not None]

    def free_slot(self) -> int | None:
        """Return the first slot without a sequence."""
        return next((slot for slot, each in enumerate(self.slots) if each is None), None)

    def rows_needed(self, sequence: Sequence) -> int:
        """Return the pages of each level that a sequence must have now.

        With ``overcommit``, those of its positions so far and one ahead; those of all its
        positions otherwise, and for one that has been taken out often.
        """
        whole = self.layout.rows(written(sequence.request))
        if not self.overcommit or sequence.preemptions >= MOST_PREEMPTIONS:
            return whole
        return min(whole, self.layout.rows(sequence.position + 1) + 1)

    def give(self, sequence: Sequence, slot: int, hits: tuple[bytes, ...] = ()) -> bool:
        """Give a slot and pages, of which the first contain the units ``hits``; False: no room."""
        per_unit = sequence.unit // self.layout.page
        fresh = self.rows_needed(sequence) - len(hits) * per_unit
        if fresh * sequence.levels > self.pages.available - self.pages.idle_pages(hits):
            return False
        sequence.pages = [[] for _ in range(sequence.levels)]
        self.share(sequence, hits)
        self.extend(sequence, fresh)
        sequence.slot, self.slots[slot] = slot, sequence
        return True

    def share(self, sequence: Sequence, hits: tuple[bytes, ...]) -> None:
        """Let the first pages be those of the entered units ``hits``.

        A sequence that has pages of its own there gives them back.
        """
        per_unit = sequence.unit // self.layout.page
        for k, key in enumerate(hits):
            own, pages = self.unit(sequence, k), self.pages.hold(key)
            for level, row in enumerate(sequence.pages):
                row[k * per_unit : (k + 1) * per_unit] = pages[
                    level * per_unit : (level + 1) * per_unit
                ]
            self.pages.release(own)

    def extend(self, sequence: Sequence, rows: int) -> None:
        """Give ``rows`` more pages to every level."""
        pages = self.pages.take(rows * sequence.levels)
        for level, row in enumerate(sequence.pages):
            row.extend(pages[level * rows : (level + 1) * rows])

    def clear(self, sequence: Sequence) -> None:
        """Take slot and pages back; the sequence remembers its slot."""
        assert sequence.slot is not None
        self.slots[sequence.slot] = None
        # later positions first: the end of a cached prefix goes before its beginning
        self.pages.release(page for row in sequence.pages for page in reversed(row))
        sequence.pages = []

    def unit(self, sequence: Sequence, k: int) -> list[int]:
        """Return the pages of unit ``k`` of a sequence, level after level."""
        per_unit = sequence.unit // self.layout.page
        return [p for row in sequence.pages for p in row[k * per_unit : (k + 1) * per_unit]]

    def youngest(self, sequence: Sequence) -> Sequence:
        """Return the youngest that may be taken out for ``sequence``, at the worst itself.

        Not one that was taken out often, and not one whose first token is being chosen.
        """
        allowed = (
            each
            for each in self.running()
            if each.preemptions < MOST_PREEMPTIONS and not each.between
        )
        return max(allowed, key=lambda each: each.serial, default=sequence)

    def counts(self) -> dict[str, int]:
        """Return slots and pages by their use."""
        return {
            "slots": len(self.slots), "slots_used": len(self.running()),
            "pages": self.pages.total, "pages_free": self.pages.free,
            "pages_cached": self.pages.cached, "pages_held": self.pages.held,
        }  # fmt: skip
