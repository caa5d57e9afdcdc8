"""Many requests at once, and how each of them ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from chaos.serving.client import Connection, Reply, ask
from chaos.serving.mix import any_request


@dataclass
class Tally:
    """Counts of a stretch of time."""

    statuses: Counter[str] = field(default_factory=Counter)
    """Of answers; "dropped" for those that this side gave up, "cut" for those without an end."""
    tokens: int = 0
    accepted_seconds: list[float] = field(default_factory=list)
    """To the head of an answer with status 200."""
    refused_seconds: list[float] = field(default_factory=list)
    without_retry: int = 0
    """Refusals without Retry-After."""

    def add(self, reply: Reply) -> None:
        """Count an answer."""
        is_cut = reply.status == 200 and not reply.has_end
        self.statuses["cut" if is_cut else str(reply.status)] += 1
        self.tokens += reply.n_tokens
        if reply.status == 200:
            self.accepted_seconds.append(reply.head_seconds)
        if reply.status in (429, 503):
            self.refused_seconds.append(reply.head_seconds)
            self.without_retry += "retry-after" not in reply.headers


def quantile(values: Sequence[float], part: float) -> float:
    """Return the value below which ``part`` of ``values`` lies; 0 without values."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


async def drop_after(port: int, path: str, body: dict[str, Any], seconds: float) -> None:
    """Send a request and leave after some seconds, whatever has come."""
    try:
        async with Connection(port) as connection:
            await connection.ask(body, path)
            await asyncio.wait_for(connection.read(), seconds)
    except (TimeoutError, ConnectionError):
        pass


async def closed_loop(port: int, draw: Random, clients: int, seconds: float) -> Tally:
    """Keep ``clients`` requests open all the time."""
    tally, loop = Tally(), asyncio.get_running_loop()
    end = loop.time() + seconds

    async def client() -> None:
        while loop.time() < end:
            path, body = any_request(draw)
            tally.add(await ask(port, body, path))

    await asyncio.gather(*(client() for _ in range(clients)))
    return tally


async def poisson(
    port: int, draw: Random, rate: float, seconds: float, dropped: float = 0.0
) -> Tally:
    """Send ``rate`` requests per second at random times, whether or not answers come.

    Args:
        port: Of the server.
        draw: Random numbers.
        rate: Requests per second.
        seconds: How long.
        dropped: Part of the requests that are given up after 0 to 300 ms.
    """
    tally, loop, running = Tally(), asyncio.get_running_loop(), set[asyncio.Task[None]]()
    begin = due = loop.time()

    async def one(path: str, body: dict[str, Any], patience: float | None) -> None:
        if patience is None:
            tally.add(await ask(port, body, path))
        else:
            await drop_after(port, path, body, patience)
            tally.statuses["dropped"] += 1

    while (due := due + draw.expovariate(rate)) < begin + seconds:
        await asyncio.sleep(due - loop.time())
        patience = draw.uniform(0, 0.3) if draw.random() < dropped else None
        task = asyncio.create_task(one(*any_request(draw), patience))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return tally


async def all_of(port: int, bodies: Iterable[dict[str, Any]]) -> list[Reply]:
    """Send requests at the same time."""
    return await asyncio.gather(*(ask(port, body) for body in bodies))
