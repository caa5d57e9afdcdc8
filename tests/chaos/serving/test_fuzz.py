"""R22: whatever is sent, no error of the server's own, no hang, and no other answer is changed."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from chaos.outcome_table import sizes
from chaos.serving.client import Connection, ask
from chaos.serving.raw_bodies import bodies, streams
from chaos.serving.server import MODEL
from tests.inference.server.test_fuzz import PATHS, schema_of_routes

MOST_SECONDS = 2.0
EXPECTED = {200, 400, 403, 404, 405, 408, 411, 413, 415, 429, 431, 504}
_TOGETHER, _CLOSED_AFTER = 8, 0.3


@pytest.mark.goal("R22", "bodies that are damaged, hostile, or no JSON")
@sizes(120, 2500)
def test_raw_bodies(server, row, times):
    """NaN, 1e999, lone surrogates, deep nesting, huge numbers, NUL, BOM, other encodings, ..."""
    turn, slowest, seen = asyncio.Semaphore(_TOGETHER), 0.0, set()

    async def one(i: int, body: bytes) -> None:
        nonlocal slowest
        async with turn:
            reply = await asyncio.wait_for(ask(server.port, body, PATHS[i % 5 == 4]), 20)
        assert reply.status in EXPECTED, (reply.status, body[:300], reply.body)
        assert reply.has_end
        slowest = max(slowest, reply.seconds)
        seen.add(reply.status)

    async def run() -> None:
        await asyncio.gather(*(one(i, b) for i, b in enumerate(bodies(Random(times), times))))

    asyncio.run(run())
    assert slowest <= MOST_SECONDS
    row.count(times)
    row.outcome = f"statuses {', '.join(map(str, sorted(seen)))}; slowest {1e3 * slowest:.0f} ms"


@pytest.mark.goal("R22", "connections that speak HTTP badly, or not at all")
@sizes(32, 480)
def test_connections(server, row, times):
    """Chunks, pipelines, contradictory lengths, headers of 70 kB or one byte at a time."""

    async def one(data: bytes) -> bytes:
        async with Connection(server.port) as connection:
            loop, got, begin = asyncio.get_running_loop(), b"", time.monotonic()
            try:
                await connection.send(data)
                connection.half_close() if data.startswith(b"\r\n") else None
                while time.monotonic() < begin + _CLOSED_AFTER:
                    part = await asyncio.wait_for(loop.sock_recv(connection._sock, 1 << 16), 0.2)
                    if not part:
                        break
                    got += part
            except (ConnectionError, TimeoutError):
                pass
            return got

    async def run() -> set[int]:
        draw, seen = Random(times), set()
        for _ in range(times // 32):
            for got in await asyncio.gather(*map(one, streams(draw))):
                parts = got.split(b"HTTP/1.1 ")[1:]
                seen |= {int(part[:3]) for part in parts}
        return seen

    seen = asyncio.run(run())
    assert seen <= EXPECTED | {100}
    assert server.is_ready
    row.count(times)
    row.outcome = f"statuses {', '.join(map(str, sorted(seen)))}"


@pytest.mark.chaos
@pytest.mark.goal("R22", "headers that come one byte at a time, on 50 connections")
def test_slow_headers(server, row):
    async def one() -> bool:
        async with Connection(server.port) as connection:
            try:
                for byte in b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100:
                    await connection.send(bytes([byte]))
                    await asyncio.sleep(0.2)
            except ConnectionError:
                return True
            return False

    async def run() -> list[bool]:
        slow = asyncio.gather(*(one() for _ in range(50)))
        for _ in range(5):
            await asyncio.sleep(1)
            begin = time.monotonic()
            assert (await ask(server.port, {"model": MODEL, "prompt": "a"})).status == 200
            assert time.monotonic() - begin < MOST_SECONDS
        return await slow

    assert all(asyncio.run(run()))
    row.count(50)
    row.outcome = "cut after 10 s; others are served meanwhile"


@pytest.mark.chaos
@pytest.mark.goal("R22", "schemathesis, bodies that fit the schema and bodies that do not")
def test_schemathesis(server, row):
    import schemathesis  # takes a second

    schema = schema_of_routes()
    for path in PATHS:
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        few = {"type": "integer", "maximum": 4}
        content["schema"]["properties"] |= {"model": {"const": MODEL}, "max_tokens": few}
        content["schema"]["required"] = [*content["schema"]["required"], "max_tokens"]
    api = schemathesis.openapi.from_dict(schema)
    api.config.update(base_url=server.url)
    seen: set[int] = set()
    for path in PATHS:
        for mode in schemathesis.GenerationMode:
            cases = api[path]["POST"].as_strategy(generation_mode=mode)

            @settings(
                max_examples=500, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            )
            @given(cases)
            def check(case: Any) -> None:
                answer = case.call(session=None, timeout=60)
                assert answer.status_code in EXPECTED, answer.text
                # a body that does not fit may ask for hundreds of tokens, which take their time
                assert answer.status_code == 200 or answer.elapsed <= MOST_SECONDS
                seen.add(answer.status_code)
                row.count()

            check()
    row.outcome = f"statuses {', '.join(map(str, sorted(seen)))}"
