"""The serving engine's process, seen from the HTTP process (asyncio; this module loads no torch).

:class:`Host` starts the process (:mod:`open_mythos.inference.worker`), passes requests to it and
spreads its events over tickets, one per request. Whatever happens to the process, the last event
of every ticket is one ``Finished``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from open_mythos.errors import (
    ConfigError,
    DataError,
    EnvironmentError_,
    InternalError,
    MythosError,
)
from open_mythos.inference.ledger import LedgerError
from open_mythos.inference.request import (
    Event,
    Finished,
    Outcome,
    Request,
    Token,
    event_from_json,
)
from open_mythos.inference.worker import MAX_LINE_BYTES, decode, encode

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "draining", "stalled", "dead"]

MOST_WAITING = 256
"""Events of a ticket that wait singly; later tokens join the last of them."""
_EXIT_SECONDS = 1.0
_BYTES_PER_SCORE = 32
_ERRORS = {
    each.__name__: each
    for each in (ConfigError, DataError, EnvironmentError_, InternalError, LedgerError)
}
_SHUTTING_DOWN = "the server is shutting down"


class HostNotReady(EnvironmentError_):
    """The engine takes no requests now; ``state`` is the host's."""

    def __init__(self, state: State) -> None:
        super().__init__(
            "the engine takes no requests now", where="engine", value=state, allowed="ready",
            fix="try again later",
        )  # fmt: skip
        self.state = state


def worker_command(options: Mapping[str, Any]) -> list[str]:
    """Return the command of an engine process; :func:`worker.run` lists the options."""
    return [sys.executable, "-m", "open_mythos.inference.worker", json.dumps(dict(options))]


class Ticket:
    """The events of one request, for one reader.

    A slow reader loses nothing and holds up nobody: when ``MOST_WAITING`` events wait, further
    tokens join the last one and are read as one batch.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        self._waiting: deque[deque[Event]] = deque()
        self._arrived = asyncio.Event()
        self._over = False

    @property
    def events(self) -> AsyncIterator[Event]:
        """All events one by one; the last is the Finished."""
        return self

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if not await self._wait():
            raise StopAsyncIteration
        event = self._waiting[0].popleft()
        if not self._waiting[0]:
            self._waiting.popleft()
        return event

    async def batch(self) -> list[Event]:
        """Return what waits first: one event or joined tokens; nothing after the Finished."""
        return list(self._waiting.popleft()) if await self._wait() else []

    def put(self, event: Event) -> None:
        """Add an event; the host does."""
        last = self._waiting[-1] if len(self._waiting) >= MOST_WAITING else None
        if last and isinstance(event, Token) and isinstance(last[-1], Token):
            last.append(event)
        else:
            self._waiting.append(deque([event]))
        self._over = self._over or isinstance(event, Finished)
        self._arrived.set()

    async def _wait(self) -> bool:
        while not self._waiting and not self._over:
            self._arrived.clear()
            await self._arrived.wait()
        return bool(self._waiting)


class Host:
    """Runs an engine process, and starts it once more if it dies.

    Attributes:
        facts: What the engine says of its model: vocabulary, context, depths, slots, ...
        beat: The last beat: the engine's statistics, ``ticks`` since its start,
            ``last_tick_timestamp`` (Unix time) and ``busy``, whether work is left.
        failure: Why the process died last; empty if it never did.
        ledger_violations: How often it died because its books did not balance.
        on_dead: Set when the process died twice within ``restart_window``, or once while it was
            started again: there will be no other.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stall_seconds: float = 5.0,
        dead_seconds: float = 30.0,
        restart_window: float = 600.0,
        start_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up; :meth:`start` starts the process.

        Args:
            command: Command line of the process, see :func:`worker_command`.
            stall_seconds: Silence after which the state is "stalled".
            dead_seconds: Silence after which the process is killed.
            restart_window: Seconds within which a second death is final.
            start_seconds: Most seconds until the process is ready.
            clock: Seconds, for stalls and deaths.
        """
        self.command = list(command)
        self.stall_seconds, self.dead_seconds = stall_seconds, dead_seconds
        self.restart_window, self.start_seconds = restart_window, start_seconds
        self.facts: dict[str, Any] = {}
        self.beat: dict[str, Any] = {}
        self.failure = ""
        self.ledger_violations = 0
        self.on_dead = asyncio.Event()
        self._clock = clock
        self._heard = clock()
        self._phase: State = "starting"
        self._tickets: dict[str, Ticket] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._answered = asyncio.Event()
        self._starts = 0
        self._process: Process | None = None
        self._requests: asyncio.StreamWriter | None = None
        self._stopping = False
        self._lives: asyncio.Task[None] | None = None
        self._error: MythosError | None = None

    @property
    def state(self) -> State:
        """What the engine does; "stalled" while it is silent although it should not be."""
        silent = self._clock() - self._heard
        return "stalled" if self._phase == "ready" and silent > self.stall_seconds else self._phase

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None while there is none."""
        return None if self._process is None else self._process.pid

    @property
    def open(self) -> int:
        """Number of requests without a Finished."""
        return len(self._tickets)

    async def start(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            MythosError: It cannot start; the text is the engine's own.
        """
        self._lives = asyncio.create_task(self._live_on())
        await self._answered.wait()
        if self._phase == "dead":
            await self._lives  # raises what nobody foresaw
            raise self._error or HostNotReady("dead")

    def submit(self, request: Request) -> Ticket:
        """Pass a request to the engine; its deadline is a time of ``time.monotonic()``.

        Raises:
            HostNotReady: The state is not "ready".
            ConfigError: A request of this id is open, or request or answer is too long.
        """
        state = self.state
        if state != "ready" or self._requests is None:
            raise HostNotReady(state)
        line = encode({"add": request.to_json(time.monotonic())})
        scores = len(request.prompt) * (1 + (request.logprobs or 0)) * request.prompt_logprobs
        if max(len(line), scores * _BYTES_PER_SCORE) > MAX_LINE_BYTES:
            raise ConfigError(
                "the prompt, or the number of log-probabilities of it, is too large",
                where="prompt", value=len(request.prompt),
                allowed="a message that fits the line to the engine", fix="shorten the prompt",
            )  # fmt: skip
        if request.id in self._tickets:
            raise ConfigError(
                "a request of this id is open",
                where="id",
                value=request.id,
                allowed="an id of its own",
            )
        ticket = self._tickets[request.id] = Ticket(request.id)
        self._idle.clear()
        self._requests.write(line)
        return ticket

    def cancel(self, id: str, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End a request at the next tick; without effect if it has ended."""
        if id in self._tickets and self._requests is not None:
            self._requests.write(encode({"cancel": id, "outcome": outcome.value}))

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, wait for the open ones, and fail those that take longer.

        Args:
            seconds: Time for the open ones. A later call may give less.
        """
        self._close_door()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        for id in list(self._tickets):
            self.cancel(id)
        self._fail_open(_SHUTTING_DOWN)

    async def stop(self) -> None:
        """End the process, at once; open requests fail. Nothing is left running."""
        self._close_door()
        self._fail_open(_SHUTTING_DOWN)
        self._stopping = True
        if self._requests is not None:
            self._requests.close()
        if self._lives is not None:
            await asyncio.wait({self._lives}, timeout=_EXIT_SECONDS)
            self._lives.cancel()
            await asyncio.wait({self._lives})
        self._phase = "dead"

    def _close_door(self) -> None:
        if self._phase != "dead":
            self._phase = "draining"

    def _fail_open(self, error: str) -> None:
        for id in list(self._tickets):
            self._deliver(Finished(id, Outcome.FAILED, error))

    def _deliver(self, event: Event) -> None:
        ticket = self._tickets.get(event.id)
        if ticket is None:
            return  # it has its Finished
        if isinstance(event, Finished):
            del self._tickets[event.id]
            if not self._tickets:
                self._idle.set()
        ticket.put(event)

    async def _live_on(self) -> None:
        """Run the process, and once more unless it died before it was ready or too soon after."""
        died_before = -math.inf
        try:
            while True:
                starts = self._starts
                self._error = await self._live()
                if self._phase == "draining" or not self._starts:
                    return
                self.failure = str(self._error)
                self.ledger_violations += isinstance(self._error, LedgerError)
                logger.error("the engine's process died: %s", self.failure)
                now = self._clock()
                if self._starts == starts or now - died_before <= self.restart_window:
                    return
                died_before = now
                logger.warning("the engine's process is started again")
        finally:
            if self._starts and self._phase != "draining":
                self.on_dead.set()
            self._phase = "dead"
            self._answered.set()

    async def _live(self) -> MythosError:
        """Run the process until it ends, and return why it did."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self.command, stdin=PIPE, stdout=PIPE, limit=MAX_LINE_BYTES, start_new_session=True
            )
        except OSError as failed:
            return EnvironmentError_(
                "the engine's process cannot be started",
                where=self.command[0],
                value=str(failed),
                allowed="a program that starts",
            )
        self._process, self._requests = process, process.stdin
        assert process.stdin is not None
        if self._stopping:
            process.stdin.close()
        try:
            error = await self._listen(process)
            self._let_go()
            if error is None:  # its exit status says why
                with suppress(TimeoutError):
                    async with asyncio.timeout(_EXIT_SECONDS):
                        await process.wait()
        finally:
            self._let_go()
            process.stdin.close()
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            self._process = None
        return error or EnvironmentError_(
            "the engine's process ended", where="exit status", value=process.returncode,
            allowed="it runs until the server ends it", fix="its last lines on stderr say more",
        )  # fmt: skip

    def _let_go(self) -> None:
        self._requests = None
        if self._phase == "ready":
            self._phase = "starting"
        self._fail_open("engine died")

    async def _listen(self, process: Process) -> MythosError | None:
        """Handle the messages of one life; return the error that ends it, None if it just ends."""
        assert process.stdout is not None
        seconds = self.start_seconds
        try:
            # a line without end: the process died while writing it
            while (line := await _read_line(process.stdout, seconds)).endswith(b"\n"):
                self._heard, seconds = self._clock(), self.dead_seconds
                match decode(line):
                    case {"events": list() as events}:
                        for event in events:
                            self._deliver(event_from_json(event))
                    case {"beat": dict() as beat}:
                        self.beat = beat
                    case {"ready": dict() as facts}:
                        self._begin(facts)
                    case {"fatal": str() as text, "kind": str() as kind}:
                        return _ERRORS.get(kind, EnvironmentError_)(text)
                    case other:
                        raise InternalError(
                            "unknown message", where="engine", value=sorted(other),
                            allowed="events, beat, ready, fatal",
                        )  # fmt: skip
        except MythosError as error:
            return error
        except (KeyError, TypeError, ValueError) as error:
            return InternalError(
                "the engine's message cannot be read", where="engine", value=type(error).__name__,
                allowed="a message of its protocol",
            )  # fmt: skip
        return None

    def _begin(self, facts: dict[str, Any]) -> None:
        before = self.facts.get("fingerprint")
        if before is not None and before != facts.get("fingerprint"):
            raise EnvironmentError_(
                "the model was replaced while it was served", where="fingerprint",
                value=facts.get("fingerprint"), allowed=str(before), fix="restart the server",
            )  # fmt: skip
        self.facts, self.beat = facts, {}
        self._starts += 1
        if self._phase == "starting":
            self._phase = "ready"
            self._answered.set()


async def _read_line(reader: asyncio.StreamReader, seconds: float) -> bytes:
    """Return the next line, empty at the end.

    Raises:
        EnvironmentError_: None came for ``seconds``.
    """
    for _ in range(2):  # if this process was suspended, lines wait although the time has passed
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds / 2):
                return await reader.readline()
    raise EnvironmentError_(
        "the engine's process hangs",
        where="seconds of silence",
        value=seconds,
        allowed="an answer in time",
    )
