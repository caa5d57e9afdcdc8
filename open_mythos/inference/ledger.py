"""Checks that no request, slot or page is lost or counted twice (loads no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many
from typing import Any

from open_mythos.errors import InternalError
from open_mythos.inference.places import Places
from open_mythos.inference.sequence import Phase, Sequence


def check_books(
    counts: Mapping[str, int],
    live: Iterable[Sequence],
    queue: Many[Sequence],
    swapped: Many[Sequence],
    places: Places,
) -> None:
    """Check the books of a scheduler against its sequences.

    Args:
        counts: Requests ``admitted``, ``finished``, ``cancelled``, ``failed`` and ``live``.
        live: All sequences that have not ended.
        queue: Those that wait for admission.
        swapped: Those that were taken out.
        places: Slots and pages of the others.

    Raises:
        InternalError: They do not agree.
    """
    live = list(live)
    known = counts["finished"] + counts["cancelled"] + counts["failed"] + counts["live"]
    if counts["admitted"] != known:
        raise InternalError("a request is lost", where="Scheduler", value=dict(counts))
    for sequence in live:
        found: list[Any] = [n for n, each in enumerate(places.slots) if each is sequence]
        found += [Phase.QUEUED] * sum(each is sequence for each in queue)
        found += [Phase.SWAPPED] * sum(each is sequence for each in swapped)
        outside = sequence.phase in (Phase.QUEUED, Phase.SWAPPED)
        if found != [sequence.phase if outside else sequence.slot]:
            raise InternalError(
                "a sequence is in several places, or in none",
                where=f"request {sequence.request.id}", value=found, allowed=sequence.phase.value,
            )  # fmt: skip
    if len(queue) + len(swapped) + len(places.running()) != len(live):
        raise InternalError("a place is kept by nobody", where="Scheduler", value=dict(counts))
    places.pages.check([page for row in each.pages for page in row] for each in live)
