"""Limits of the server, and the admission of requests by their cost.

Costs are counted in loop-tokens: tokens times the loops that each may run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from open_mythos.checks import check_fields, within
from open_mythos.inference.server.errors import ApiError


@dataclass(frozen=True)
class Limits:
    """Every limit of the server; a request beyond one is refused."""

    body_bytes: int = within(2_000_000, ge=1)
    """Longest body of a request: beyond it, 413."""
    body_seconds: float = within(10.0, gt=0)
    """Time for a client to send headers and body: beyond it, 408."""
    header_bytes: int = within(65_536, ge=256)
    """Longest headers with path: beyond them, 431."""
    connections: int = within(1024, ge=1)
    """Open connections: beyond them, 503."""
    prompts: int = within(32, ge=1)
    """Prompts of a request."""
    messages: int = within(1024, ge=1)
    """Messages of a chat."""
    choices: int = within(8, ge=1)
    """Choices per prompt (n)."""
    stops: int = within(4, ge=0)
    """Stop strings."""
    stop_characters: int = within(256, ge=1)
    """Characters of a stop string."""
    alternatives: int = within(20, ge=0)
    """Alternatives per token in log-probabilities."""
    biases: int = within(300, ge=0)
    """Entries of logit_bias."""
    salt_characters: int = within(256, ge=0)
    """Characters of cache_salt."""
    loops: int = within(256, ge=1)
    """Loops per token, even where unvalidated depths are allowed."""
    schema_bytes: int = within(65_536, ge=1)
    """Longest JSON schema."""
    schema_seconds: float = within(1.0, gt=0)
    """Time to compile a JSON schema."""
    template_bytes: int = within(1_000_000, ge=1)
    """Longest text of a rendered chat."""
    template_seconds: float = within(0.1, gt=0)
    """CPU time to render a chat."""
    queued_requests: int = within(256, ge=1)
    """Requests that wait for the engine, each of a request's choices counted: beyond them, 429. A
    request that finds an empty queue is accepted with any number of choices."""
    queued_seconds: float = within(60.0, gt=0)
    """Work that waits, in seconds at the engine's measured speed: beyond it, 429. A request that
    finds an empty queue is accepted at any cost."""
    requests_per_key: int = within(64, ge=1)
    """Requests that wait or run with one key: beyond them, 429."""
    timeout_seconds: float = within(300.0, gt=0)
    """Longest time a request may take, and the default of its timeout: beyond it, 504."""
    send_seconds: float = within(10.0, gt=0)
    """Time after which a client that takes nothing is cut."""
    ping_seconds: float = within(15.0, gt=0)
    """Time between two signs of life on a silent stream."""
    waiting_events: int = within(256, ge=1)
    """Events that wait for a slow client before tokens are joined into one event."""
    joined_above: int = within(2000, ge=1)
    """Events per second, over all streams, above which streams join tokens."""
    joined_seconds: float = within(0.02, ge=0)
    """Time over which they join."""

    def __post_init__(self) -> None:
        check_fields("limits", self)


@dataclass
class Place:
    """A request's place in the queue; leave it once started, and release it at its end."""

    admission: Admission
    key: str
    cost: int
    choices: int = 1
    is_waiting: bool = True

    def correct(self, cost: int) -> None:
        """Replace the estimated cost by the exact one."""
        if self.is_waiting:
            self.admission.cost += cost - self.cost
            self.cost = cost

    def leave(self) -> None:
        """Leave the queue: the engine has begun."""
        if self.is_waiting:
            self.is_waiting = False
            self.admission.waiting -= 1
            self.admission.waiting_choices -= self.choices
            self.admission.cost -= self.cost

    def release(self) -> None:
        """End: neither waiting nor running any more."""
        self.leave()
        self.admission.open -= 1
        self.admission.by_key[self.key] -= 1
        if not self.admission.by_key[self.key]:
            del self.admission.by_key[self.key]


@dataclass
class Admission:
    """Counts requests and their cost; refuses with 429 what would wait too long.

    Nothing here looks at text: a refusal costs microseconds.
    """

    limits: Limits
    speed: Callable[[], float]
    """Loop-tokens per second of the engine."""
    waiting: int = 0
    waiting_choices: int = 0
    open: int = 0
    cost: int = 0
    """Loop-tokens that wait."""
    by_key: Counter[str] = field(default_factory=Counter)

    def check_room(self, key: str) -> None:
        """Raise the 429 that a request of ``key`` would get whatever it costs."""
        if self.waiting_choices >= self.limits.queued_requests:
            raise self.full("queued_requests", "too many requests wait")
        if key and self.by_key[key] >= self.limits.requests_per_key:
            raise self.full("requests_per_key", "too many requests of this key wait or run")

    def enter(self, key: str, cost: int, choices: int = 1) -> Place:
        """Take a place for a request of ``cost`` loop-tokens, all its choices together.

        Raises:
            ApiError: 429, with the time after which to try again.
        """
        self.check_room(key)
        if self.waiting and self.waiting_choices + choices > self.limits.queued_requests:
            raise self.full("queued_requests", "too many requests wait")
        if self.cost and self.cost + cost > self.limits.queued_seconds * self.speed():
            raise self.full("queued_seconds", "too much work waits")
        self.waiting, self.open, self.cost = self.waiting + 1, self.open + 1, self.cost + cost
        self.waiting_choices += choices
        self.by_key[key] += 1
        return Place(self, key, cost, choices)

    def full(self, reason: str, what: str) -> ApiError:
        """Return the 429; a client may try again when the queue has been worked off."""
        seconds = min(60, max(1, math.ceil(self.cost / max(self.speed(), 1e-9))))
        return ApiError(
            429, f"{what}: try again in {seconds} s", code=reason,
            headers={"Retry-After": str(seconds)},
        )  # fmt: skip
