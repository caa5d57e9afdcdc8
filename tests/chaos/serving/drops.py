"""Ways to leave in the middle of a request: one for each point of its life."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

from chaos.serving.client import Connection
from chaos.serving.server import MODEL

Drop = Callable[[Connection, Random], Awaitable[None]]
_LONG = 60


def body(draw: Random, **fields: Any) -> dict[str, Any]:
    """Return a body of a stream, or of a whole answer."""
    start = {"model": MODEL, "prompt": "x" * draw.randint(1, 40), "max_tokens": _LONG}
    return start | {"stream": draw.random() < 0.5} | fields


async def in_the_body(connection: Connection, draw: Random) -> None:
    """The body has not come yet."""
    data = json.dumps(body(draw)).encode()
    head, content = connection.request(data)
    await connection.send(head + content[: draw.randrange(len(content))])
    await asyncio.sleep(draw.uniform(0, 0.02))


async def in_the_queue(connection: Connection, draw: Random) -> None:
    """It waits behind others."""
    await connection.ask(body(draw, n=8))
    await asyncio.sleep(draw.uniform(0, 0.02))


async def in_the_prompt(connection: Connection, draw: Random) -> None:
    """A long prompt is being computed."""
    await connection.ask(body(draw, prompt="y" * draw.randint(150, 190)))
    await asyncio.sleep(draw.uniform(0.01, 0.1))


async def after_the_first_token(connection: Connection, draw: Random) -> None:
    """One piece of the stream has come."""
    await connection.ask(body(draw, stream=True))
    await connection.read(events=1)


async def in_the_stream(connection: Connection, draw: Random) -> None:
    """Some pieces have come."""
    await connection.ask(body(draw, stream=True))
    await connection.read(events=draw.randint(2, 20))


async def in_the_last_tick(connection: Connection, draw: Random) -> None:
    """The last tokens are being computed."""
    tokens = draw.randint(2, 8)
    await connection.ask(body(draw, stream=True, max_tokens=tokens, logit_bias={"257": -100}))
    await connection.read(events=tokens - 1)


async def after_the_end(connection: Connection, draw: Random) -> None:
    """Everything has come."""
    await connection.ask(body(draw, max_tokens=draw.randint(1, 4)))
    await connection.read()


async def never_reading(connection: Connection, draw: Random) -> None:
    """Nothing is read, and the answer is long."""
    await connection.ask(body(draw, logprobs=20, return_loops=True))
    await asyncio.sleep(draw.uniform(0, 0.3))


POINTS: tuple[Drop, ...] = (
    in_the_body, in_the_queue, in_the_prompt, after_the_first_token, in_the_stream,
    in_the_last_tick, after_the_end, never_reading,
)  # fmt: skip


async def drop_one(port: int, point: Drop, draw: Random, drip: bool) -> None:
    """Send a request, perhaps read slowly, and leave at ``point``: close, reset, or half-close."""
    async with Connection(port, 4096 if drip else None) as connection:
        try:
            await point(connection, draw)
            if drip:
                await connection.drip(3)
            match draw.randrange(3):
                case 0:
                    connection.close()
                case 1:
                    connection.reset()
                case _:
                    connection.half_close()
                    await asyncio.wait_for(connection.read(), 20)
        except ConnectionError:
            pass


async def drop_many(port: int, times: int, draw: Random, together: int = 24) -> None:
    """Leave ``times`` requests, at all points in turn, ``together`` at the same time."""
    turn = asyncio.Semaphore(together)

    async def one(i: int) -> None:
        async with turn:
            await drop_one(port, POINTS[i % len(POINTS)], draw, drip=i % 50 == 49)

    await asyncio.gather(*(one(i) for i in range(times)))
