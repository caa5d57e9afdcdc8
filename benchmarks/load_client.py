"""A client that puts load on a server of the OpenAI API: arrivals at random, or a fixed number."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

GOOD_FIRST, GOOD_BETWEEN = 2.0, 0.2
"""Longest seconds to the first token and between tokens of a request that is served well."""


@dataclass
class Sample:
    """One request, in seconds of this process."""

    begin: float
    status: int = 0
    """0: the connection failed."""
    end: float = math.nan
    times: list[float] = field(default_factory=list)
    """When each event with text or tokens came."""
    n_tokens: int = 0
    retry_after: str = ""
    complete: bool = False
    """The stream ended as the protocol says."""

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.begin if self.times else math.nan

    @property
    def between(self) -> list[float]:
        """Seconds between events."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    @property
    def good(self) -> bool:
        """Whether it was served completely and in time."""
        return self.complete and self.first <= GOOD_FIRST and max(
            self.between, default=0.0
        ) <= GOOD_BETWEEN  # fmt: skip


@dataclass(frozen=True)
class Load:
    """All requests of a run."""

    samples: Sequence[Sample]

    @property
    def served(self) -> list[Sample]:
        """Requests that were answered completely."""
        return [each for each in self.samples if each.complete]

    def of_status(self, status: int) -> list[Sample]:
        """Requests with this status."""
        return [each for each in self.samples if each.status == status]

    @property
    def seconds(self) -> float:
        """From the first request to the last answer."""
        ends = [each.end for each in self.samples if not math.isnan(each.end)]
        return max(ends) - min(each.begin for each in self.samples)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of complete answers."""
        return sum(each.n_tokens for each in self.served) / self.seconds

    @property
    def goodput(self) -> float:
        """Requests per second that were served in time."""
        return sum(each.good for each in self.samples) / self.seconds

    def numbers(self) -> dict[str, float]:
        """Return percentiles of the times, and rates."""
        between = [x for each in self.served for x in each.between]
        whole = [each.end - each.begin for each in self.served]
        found = {
            "requests": float(len(self.samples)), "served": float(len(self.served)),
            "refused": float(len(self.of_status(429))), "tokens/s": self.tokens_per_second,
            "goodput, requests/s": self.goodput, "longest ITL": max(between, default=math.nan),
        }  # fmt: skip
        for name, values in (
            ("TTFT", [each.first for each in self.served]), ("ITL", between), ("whole", whole),
        ):  # fmt: skip
            found |= {f"{name} p{p}": percentile(values, p) for p in (50, 95, 99)}
        return {key: value for key, value in found.items() if not math.isnan(value)}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the least value that so many percent do not exceed; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def poisson(url: str, bodies: Sequence[dict[str, Any]], rate: float, seed: int) -> Load:
    """Send requests at random times, ``rate`` per second on average, whatever the answers do."""
    draw = random.Random(seed)
    gaps = [draw.expovariate(rate) for _ in bodies]

    async def run(send: _Send) -> list[Sample]:
        tasks = []
        begin, due = time.perf_counter(), 0.0
        for body, gap in zip(bodies, gaps, strict=True):
            due += gap
            await asyncio.sleep(max(0.0, begin + due - time.perf_counter()))
            tasks.append(asyncio.create_task(send(body)))
        return await asyncio.gather(*tasks)

    return _with_client(url, run)


def closed(url: str, bodies: Sequence[dict[str, Any]], streams: int) -> Load:
    """Send requests one after another on each of ``streams`` connections."""

    async def run(send: _Send) -> list[Sample]:
        waiting, found = iter(bodies), list[Sample]()

        async def one_by_one() -> None:
            for body in waiting:
                found.append(await send(body))

        await asyncio.gather(*(one_by_one() for _ in range(streams)))
        return found

    return _with_client(url, run)


_Send = Callable[[dict[str, Any]], Awaitable[Sample]]


def _with_client(url: str, run: Callable[[_Send], Awaitable[list[Sample]]]) -> Load:
    async def main() -> list[Sample]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
            return await run(lambda body: _send(client, body))

    return Load(asyncio.run(main()))


async def _send(client: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    """Send a request for a stream and follow it to its end."""
    sample = Sample(time.perf_counter())
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            sample.status = answer.status_code
            sample.retry_after = answer.headers.get("retry-after", "")
            async for line in answer.aiter_lines():
                _take(sample, line)
    except httpx.HTTPError:
        sample.complete = False
    sample.end = time.perf_counter()
    return sample


def _take(sample: Sample, line: str) -> None:
    if line == "data: [DONE]":
        sample.complete = True
    elif line.startswith("data: "):
        event = json.loads(line.removeprefix("data: "))
        if usage := event.get("usage"):
            sample.n_tokens = usage["completion_tokens"]
        if any(choice.get("token_ids") for choice in event.get("choices", ())):
            sample.times.append(time.perf_counter())
