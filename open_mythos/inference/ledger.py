"""The books: every request, slot and page is accounted for once (loads no torch)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any

from open_mythos.errors import InternalError
from open_mythos.inference.places import Places
from open_mythos.inference.request import Outcome
from open_mythos.inference.sequence import Phase, Sequence


class LedgerError(InternalError):
    """The books do not balance: the engine must not go on, and the server counts its death."""


_FINISHED = (Outcome.STOP, Outcome.LENGTH, Outcome.STOP_STRING)
_CANCELLED = (Outcome.CANCELLED, Outcome.TIMEOUT)


@dataclass
class Ledger:
    """Counts since the start."""

    admitted: int = 0
    """Requests that were accepted; the next serial number."""
    ended: Counter[Outcome] = field(default_factory=Counter)
    preemptions: int = 0
    prefix_hits: int = 0
    """Prompt tokens taken over from the prefix cache."""
    prefix_misses: int = 0
    """Prompt tokens computed."""

    def counts(self) -> dict[str, int]:
        """Return all numbers; those of the outcomes in three groups."""
        finished = sum(self.ended[outcome] for outcome in _FINISHED)
        cancelled = sum(self.ended[outcome] for outcome in _CANCELLED)
        return {
            "admitted": self.admitted, "finished": finished, "cancelled": cancelled,
            "failed": self.ended.total() - finished - cancelled, "preemptions": self.preemptions,
            "prefix_hit_tokens": self.prefix_hits, "prefix_miss_tokens": self.prefix_misses,
        }  # fmt: skip

    def check(
        self,
        live: Iterable[Sequence],
        queue: Many[Sequence],
        swapped: Many[Sequence],
        places: Places,
    ) -> None:
        """Check the books of a scheduler.

        Args:
            live: All sequences that have not ended.
            queue: Those that wait for admission.
            swapped: Those that were taken out.
            places: Slots and pages of the others.

        Raises:
            LedgerError: A request, slot or page is lost or counted twice.
        """
        live = list(live)
        if self.admitted != self.ended.total() + len(live):
            raise LedgerError(
                "admitted is not finished + cancelled + failed + live", where="Ledger",
                value={**self.counts(), "live": len(live)},
            )  # fmt: skip
        for sequence in live:
            found: list[Any] = [n for n, each in enumerate(places.slots) if each is sequence]
            found += [Phase.QUEUED] * sum(each is sequence for each in queue)
            found += [Phase.SWAPPED] * sum(each is sequence for each in swapped)
            outside = sequence.phase in (Phase.QUEUED, Phase.SWAPPED)
            if found != [sequence.phase if outside else sequence.slot]:
                raise LedgerError(
                    "a sequence is in several places, or in none",
                    where=f"request {sequence.request.id}", value=found,
                    allowed=sequence.phase.value,
                )  # fmt: skip
        if len(queue) + len(swapped) + len(places.running()) != len(live):
            raise LedgerError("a place is kept by nobody", where="Ledger", value=len(live))
        try:
            places.pages.check([page for row in each.pages for page in row] for each in live)
        except InternalError as error:
            raise LedgerError(str(error)) from error
