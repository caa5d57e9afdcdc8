"""The sequences of one HTTP request, followed from submission to the last piece of text."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from open_mythos.inference.guided import NO_TOKEN_FITS
from open_mythos.inference.request import (
    Finished,
    Outcome,
    PromptScored,
    Request,
    Started,
    Token,
)  # fmt: skip
from open_mythos.inference.server.errors import ApiError, log_bug, shorten
from open_mythos.inference.server.limits import Limits, Place
from open_mythos.inference.server.metrics import Metrics
from open_mythos.inference.text import Piece, TextStream
from open_mythos.tokenizer import Tokenizer

Clock = Callable[[], float]


class Ticket(Protocol):
    """A submitted request; its events end with a ``Finished``."""

    @property
    def events(self) -> AsyncIterator[Any]:
        """What happens, in order."""


class Host(Protocol):
    """The engine as the HTTP process sees it."""

    facts: dict[str, Any]
    beat: dict[str, Any]
    ledger_violations: int
    """Engines that died because their books did not balance."""

    @property
    def state(self) -> str:
        """One of starting, ready, draining, stalled and dead; dead is for good."""

    async def start(self) -> None:
        """Start the engine; return when it is ready."""

    def submit(self, request: Request) -> Ticket:
        """Queue a request."""

    def cancel(self, id: str, outcome: Outcome) -> None:
        """End a request at the next tick."""

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; wait for the others, then cancel them."""

    async def stop(self) -> None:
        """End the engine."""


@dataclass
class Delta:
    """What is new of one choice."""

    index: int
    piece: Piece = field(default_factory=Piece)
    echo: bool = False
    """The prompt precedes the text."""
    scored: PromptScored | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def join(self, later: Delta) -> None:
        """Append the delta that follows."""
        self.piece.join(later.piece)
        self.echo, self.scored = self.echo or later.echo, self.scored or later.scored
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason


class Pace:
    """Measures the events per second of all streams together."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits, self._clock = limits, clock
        self._times: deque[float] = deque(maxlen=limits.joined_above)

    def count(self) -> None:
        """Note an event."""
        self._times.append(self._clock())

    @property
    def pause(self) -> float:
        """Seconds for which a stream waits so that tokens join; 0 at a normal pace."""
        is_full = len(self._times) == self._limits.joined_above
        is_fast = is_full and self._clock() - self._times[0] < 1
        return self._limits.joined_seconds if is_fast else 0.0


@dataclass
class Choice:
    """One sequence of the request."""

    request: Request
    stream: TextStream
    echo: bool
    started: bool = False
    finished: bool = False
    cached_tokens: int = 0
    n_tokens: int = 0
    n_loops: int = 0
    last_token: int | None = None
    last_time: float | None = None


class Answer:
    """Runs the sequences of one request; closed, it leaves nothing running.

    Args:
        host: The engine.
        requests: One per choice, in order.
        tokenizer: Decodes tokens.
        stops: Stop strings.
        echo: The prompt precedes the text.
        place: Of the request in the queue.
        seconds: After which the request is cancelled.
    """

    def __init__(
        self, host: Host, requests: Sequence[Request], tokenizer: Tokenizer, stops: Sequence[str],
        *, echo: bool, place: Place, seconds: float, limits: Limits, metrics: Metrics, pace: Pace,
        clock: Clock,
    ) -> None:  # fmt: skip
        self.choices = [Choice(each, TextStream(tokenizer, stops), echo) for each in requests]
        self._host, self._place, self._seconds = host, place, seconds
        self._limits, self._metrics, self._pace, self._clock = limits, metrics, pace, clock
        self._begin = clock()
        self._waiting: list[Delta] = []
        self._newest: dict[int, Delta] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._timer: asyncio.TimerHandle | None = None
        self.failure: ApiError | None = None

    async def start(self) -> None:
        """Submit all sequences and wait until one of them has been admitted.

        Raises:
            ApiError: The engine refuses, fails, or does not start in time.
        """
        for index, choice in enumerate(self.choices):
            events = self._host.submit(choice.request).events
            self._tasks.append(asyncio.create_task(self._follow(index, choice, events)))
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._seconds, self._expire)
        await self._wake.wait()
        if self.failure is not None:
            raise self.failure

    async def deltas(self) -> AsyncIterator[list[Delta]]:
        """Yield what is new until all choices have ended.

        Raises:
            ApiError: After what came before the failure.
        """
        while True:
            await self._wake.wait()
            if pause := self._pace.pause:
                await asyncio.sleep(pause)
            self._wake.clear()
            batch, self._waiting, self._newest = self._waiting, [], {}
            if batch:
                yield batch
            if self.failure is not None:
                raise self.failure
            if all(choice.finished for choice in self.choices):
                return

    def close(self) -> None:
        """Cancel what still runs, and give the place back."""
        if self._timer is not None:
            self._timer.cancel()
        self._cancel_all(Outcome.CANCELLED)
        for task in self._tasks:
            task.cancel()
        self._place.release()

    def usage(self, n: int) -> dict[str, Any]:
        """Return the usage so far; a prompt with ``n`` choices counts once."""
        firsts = self.choices[::n]
        prompt = sum(len(choice.request.prompt) for choice in firsts)
        new = sum(choice.n_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(c.cached_tokens for c in firsts)},
            "completion_tokens_details": {"loops": sum(c.n_loops for c in self.choices)},
        }

    async def _follow(self, index: int, choice: Choice, events: AsyncIterator[Any]) -> None:
        """Take the events of one choice until its end."""
        try:
            async for event in events:
                if isinstance(event, Token):
                    self._take_token(index, choice, event)
                elif isinstance(event, Started):
                    self._take_start(index, choice, event)
                elif isinstance(event, PromptScored):
                    self._add(Delta(index, echo=choice.echo, scored=event))
                elif isinstance(event, Finished):
                    self._take_end(index, choice, event)
                if choice.finished or self.failure is not None:
                    return
            self._fail(ApiError(500, "the engine ended the request without a reason"))
        except Exception as error:  # the client must not wait forever
            log_bug(error)
            self._fail(ApiError(500, "internal error"))

    def _take_start(self, index: int, choice: Choice, event: Started) -> None:
        choice.started, choice.cached_tokens = True, event.cached_tokens
        if all(each.started for each in self.choices):
            self._place.leave()
        self._metrics.queue_seconds.observe(self._clock() - self._begin)
        self._metrics.prompt_tokens.inc(len(choice.request.prompt))
        if choice.echo and not choice.request.prompt_logprobs:
            self._add(Delta(index, echo=True))
        self._wake.set()

    def _take_token(self, index: int, choice: Choice, token: Token) -> None:
        now = self._clock()
        if choice.last_time is None:
            self._metrics.first_token_seconds.observe(now - self._begin)
        else:
            self._metrics.inter_token_seconds.observe(now - choice.last_time)
        self._metrics.generated_tokens.inc()
        self._metrics.loops_per_token.observe(token.loops)
        choice.last_time, choice.last_token = now, token.token
        choice.n_tokens, choice.n_loops = choice.n_tokens + 1, choice.n_loops + token.loops
        delta = Delta(index, choice.stream.push(token))
        if choice.stream.stopped_by is not None:
            choice.finished = True
            delta.finish_reason, delta.stop_reason = "stop", choice.stream.stopped_by
            self._host.cancel(choice.request.id, Outcome.STOP_STRING)
        if delta.piece or delta.finish_reason:
            self._add(delta)

    def _take_end(self, index: int, choice: Choice, event: Finished) -> None:
        if event.outcome not in (Outcome.STOP, Outcome.LENGTH):
            self._fail(failure_of(event))
            return
        choice.finished = True
        delta = Delta(index, choice.stream.finish())
        delta.finish_reason = "length" if event.outcome is Outcome.LENGTH else "stop"
        if choice.stream.stopped_by is not None:
            delta.finish_reason, delta.stop_reason = "stop", choice.stream.stopped_by
        elif event.outcome is Outcome.STOP:
            delta.stop_reason = choice.last_token
        self._add(delta)

    def _add(self, delta: Delta) -> None:
        """Queue ``delta``; join it to the choice's newest if many wait, or all streams are busy."""
        self._pace.count()
        newest = self._newest.get(delta.index)
        is_crowded = len(self._waiting) >= self._limits.waiting_events or self._pace.pause
        if newest is not None and is_crowded:
            newest.join(delta)
        else:
            self._waiting.append(delta)
            self._newest[delta.index] = delta
        self._wake.set()

    def _expire(self) -> None:
        self._fail(ApiError(504, "the request took longer than its timeout"), Outcome.TIMEOUT)

    def _fail(self, failure: ApiError, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End all choices with the first failure."""
        if self.failure is None:
            self.failure = failure
            self._cancel_all(outcome)
            self._wake.set()

    def _cancel_all(self, outcome: Outcome) -> None:
        for choice in self.choices:
            if not choice.finished:
                choice.finished = True
                self._host.cancel(choice.request.id, outcome)


_FAULTS = {
    "nonfinite_logits": "the model computed logits that are not finite",
    NO_TOKEN_FITS: "the model's vocabulary has no token that the schema allows next",
}
"""Failures of one sequence, which another try would meet again."""


def failure_of(event: Finished) -> ApiError:
    """Return the answer to a request that the engine did not complete."""
    reason = shorten(event.error)
    if event.outcome is Outcome.TIMEOUT:
        return ApiError(504, "the request took longer than its timeout")
    if event.outcome is Outcome.REFUSED:
        return ApiError(400, f"the engine cannot serve this request: {reason}", code="refused")
    if event.outcome is Outcome.FAILED and reason in _FAULTS:
        return ApiError(500, _FAULTS[reason], code=reason)
    what = reason or "the server is shutting down"
    return ApiError(503, f"the request was ended: {what}", headers={"Retry-After": "1"})
