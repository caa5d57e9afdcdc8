"""R21: ten times more requests than the server can answer."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from chaos.outcome_table import sizes
from chaos.serving.load import closed_loop, poisson, quantile

OVERLOAD, CLIENTS = 10.0, 24
MOST_GROWTH = 0.10


@pytest.mark.goal("R21", "ten times the load that the server can take, in seconds")
@sizes(1, 40)
def test_overload(server, row, times):
    draw, seconds = Random(times), min(times, 15.0)
    measured = asyncio.run(closed_loop(server.port, draw, CLIENTS, seconds))
    capacity = measured.statuses["200"] / seconds
    idle_bytes = server.held().bytes
    tally = asyncio.run(poisson(server.port, draw, OVERLOAD * capacity, float(times)))
    grown = server.held().bytes / idle_bytes - 1
    assert set(tally.statuses) <= {"200", "429"}, server.text()
    assert tally.statuses["429"]
    assert tally.without_retry == 0
    assert grown <= MOST_GROWTH
    pause = 2.0 if times > 1 else 0.5
    asyncio.run(asyncio.sleep(pause))
    server.check_books()
    after = asyncio.run(closed_loop(server.port, draw, CLIENTS, seconds / 2))
    assert set(after.statuses) == {"200"}
    row.count(times)
    refused = [1e3 * quantile(tally.refused_seconds, q) for q in (0.5, 0.99)]
    row.outcome = (
        f"{tally.statuses['200']:,} answered, {tally.statuses['429']:,} refused "
        f"(429, p50 {refused[0]:.0f} ms, p99 {refused[1]:.0f} ms, all with Retry-After); "
        f"memory {100 * grown:+.0f} %; {tally.tokens / times:.0f} tokens/s, before "
        f"{measured.tokens / seconds:.0f}, {pause:g} s after {2 * after.tokens / seconds:.0f}"
    )
