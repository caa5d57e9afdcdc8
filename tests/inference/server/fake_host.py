"""A host without an engine: a toy model whose delays and failures a test controls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from open_mythos.errors import EnvironmentError_
from open_mythos.inference.request import (
    Event,
    Finished,
    Outcome,
    PromptScored,
    Request,
    Started,
    Token,
)  # fmt: skip

FACTS: dict[str, Any] = {
    "vocab_size": 320, "context": 256, "trained_depth": 8, "validated_depth": (2, 12),
    "rules": ["none", "gate", "change", "acceleration"], "gate_threshold": 0.8, "slots": 8,
    "pages": 64, "max_loops": 16, "loop_tokens_per_s": 1000.0, "fingerprint": "ab" * 32,
    "exact": True, "dense": False,
}  # fmt: skip


def toy_token(request: Request, i: int) -> int:
    """Token i: repeats the prompt when greedy, else jumps about in it by the random key."""
    jump = request.key // 7**i if request.temperature else 0
    return request.prompt[(i + jump) % len(request.prompt)]


def toy_loops(request: Request, i: int) -> int:
    """Loops of token i."""
    if request.rule == "none":
        return request.max_loops
    return request.min_loops + i % (request.max_loops - request.min_loops + 1)


def toy_top(token: int, n: int | None) -> tuple[tuple[int, float], ...]:
    """The n most likely tokens, the chosen one first."""
    return tuple(((token + i) % 320, -0.5 - i) for i in range(n or 0))


@dataclass
class FakeTicket:
    """Events of one request."""

    queue: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    @property
    def events(self) -> AsyncIterator[Event]:
        return self._read()

    async def _read(self) -> AsyncIterator[Event]:
        while True:
            event = await self.queue.get()
            yield event
            if isinstance(event, Finished):
                return


class FakeHost:
    """Implements the host's interface.

    Attributes:
        delay: Seconds before each token.
        held: While true, nothing is admitted.
        stalled: While true, no tokens come.
        fail_after: Number of tokens after which a request fails with ``failure``.
        refusal: Why every request is refused; "" to refuse none.
        cancelled: Ids with the reasons of their cancellation.
        requests: All that were submitted.
        live: Those without an end.
    """

    def __init__(self, **facts: Any) -> None:
        self.facts: dict[str, Any] = {}
        self.ledger_violations = 0
        self._facts = {**FACTS, **facts}
        self.state = "starting"
        self.beat: dict[str, Any] = {}
        self.delay, self.held, self.stalled = 0.0, False, False
        self.fail_after: int | None = None
        self.failure = "nonfinite_logits"
        self.refusal = ""
        self.cancelled: dict[str, Outcome] = {}
        self.requests: list[Request] = []
        self.live: dict[str, tuple[FakeTicket, asyncio.Task[None]]] = {}

    async def start(self) -> None:
        self.facts, self.state = self._facts, "ready"

    def submit(self, request: Request) -> FakeTicket:
        if self.state != "ready":
            raise EnvironmentError_("the engine takes no requests now", value=self.state)
        request.validate()
        self.requests.append(request)
        ticket = FakeTicket()
        self.live[request.id] = ticket, asyncio.create_task(self._run(request, ticket))
        return ticket

    def cancel(self, id: str, outcome: Outcome) -> None:
        if id in self.live:
            self.cancelled[id] = outcome
            self._end(id, outcome)

    async def drain(self, seconds: float) -> None:
        self.state = "draining"
        steps = 0
        while self.live and steps < seconds / 0.01:
            await asyncio.sleep(0.01)
            steps += 1
        for id in list(self.live):
            self._end(id, Outcome.FAILED, "the server is shutting down")

    async def stop(self) -> None:
        self.die()

    def die(self) -> None:
        """End as an engine whose process is killed for the second time."""
        self.state = "dead"
        for id in list(self.live):
            self._end(id, Outcome.FAILED, "engine died")

    def _end(self, id: str, outcome: Outcome, error: str = "") -> None:
        ticket, task = self.live.pop(id)
        ticket.queue.put_nowait(Finished(id, outcome, error))
        if task is not asyncio.current_task():
            task.cancel()

    async def _run(self, request: Request, ticket: FakeTicket) -> None:
        put, id = ticket.queue.put_nowait, request.id
        if self.refusal:
            self._end(id, Outcome.REFUSED, self.refusal)
            return
        while self.held:
            await asyncio.sleep(0.005)
        put(Started(id, cached_tokens=len(request.prompt) // 2))
        if request.prompt_logprobs:
            scores = (None, *(-1.0 - i for i in range(len(request.prompt) - 1)))
            tops = tuple(toy_top(token, request.logprobs) for token in request.prompt)
            put(PromptScored(id, scores, tops))
        for i in range(request.max_tokens):
            await asyncio.sleep(self.delay)
            while self.stalled:
                await asyncio.sleep(0.005)
            if i == self.fail_after:
                self._end(id, Outcome.FAILED, self.failure)
                return
            token = toy_token(request, i)
            logprob = None if request.logprobs is None else -0.5
            put(Token(id, token, toy_loops(request, i), logprob, toy_top(token, request.logprobs)))
            if token in request.ends:
                self._end(id, Outcome.STOP)
                return
        self._end(id, Outcome.LENGTH)
