"""R20: requests whose clients leave cost nothing that stays."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from chaos.outcome_table import sizes
from chaos.serving.drops import POINTS, drop_many

MOST_GROWTH = 5e6
"""Bytes per thousand requests."""
_WARM = 80


@pytest.mark.goal("R20", "clients that leave at 8 points of a request's life")
@sizes(40, 2000)
def test_clients_that_leave(server, row, times):
    draw = Random(times)
    asyncio.run(drop_many(server.port, min(_WARM, times), draw))
    server.check_books()
    before, counted = server.held(), outcomes(server)
    asyncio.run(drop_many(server.port, times, draw))
    server.check_books()
    server.wait_for(lambda: server.held().files <= before.files, 20)
    after = server.held()
    assert after.tasks <= before.tasks
    assert after.threads <= before.threads + 4, "threads of the pool that encodes long texts"
    growth = (after.bytes - before.bytes) / times * 1000
    if times >= 1000:
        assert growth <= MOST_GROWTH
    ends = {name: n - counted.get(name, 0) for name, n in outcomes(server).items()}
    ends = {name: n for name, n in ends.items() if n}
    assert sum(ends.values()) == times, "one outcome each"
    assert set(ends) <= {"ok", "disconnected", "queue_full", "queued_requests", "queued_seconds"}
    row.count(times)
    row.outcome = (
        f"{len(POINTS)} points, one outcome each; slots, pages, files and tasks as before; "
        f"{growth / 1e6:.1f} MB per 1,000"
    )


def outcomes(server) -> dict[str, float]:
    """How many completions ended in which way."""
    return {
        name.split('outcome="')[1].split('"')[0]: count
        for name, count in server.metrics().items()
        if name.startswith("requests_total{") and 'route="/v1/completions"' in name
    }
