"""Host and engine process together: every ticket ends once, whatever happens to the process."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from inference.test_worker import command, request
from inference.toy_engine import CRASH, HANG, LOSE, REFUSE, expected

from open_mythos.errors import ConfigError, DataError, EnvironmentError_
from open_mythos.inference.request import (
    Event,
    Finished,
    Outcome,
    PromptScored,
    Request,
    Started,
    Token,
)
from open_mythos.inference.server.host import (
    MOST_WAITING,
    Host,
    HostNotReady,
    Ticket,
    worker_command,
)

DIED = "engine died"


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test as a coroutine that must end within 20 seconds and leave no task or file."""

    @wraps(test)
    def run(*args: Any, **named: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await test(*args, **named)
            assert asyncio.all_tasks() == {asyncio.current_task()}

        before = open_files()
        asyncio.run(bounded())
        assert open_files() == before

    return run


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class Time:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def running(toy: dict[str, Any] | None = None, **named: Any) -> AsyncIterator[Host]:
    host = Host(command(toy=toy or {}), **named)
    try:
        await host.start()
        yield host
    finally:
        await host.stop()


async def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def read(ticket: Ticket) -> list[Event]:
    return [event async for event in ticket.events]


def ended(events: list[Event], outcome: Outcome, error: str = "") -> bool:
    """Whether one Finished, the last event, says so."""
    ends = [event for event in events if isinstance(event, Finished)]
    return ends == events[-1:] == [Finished(ends[0].id, outcome, error)]


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events if isinstance(event, Token)]


def alive(pid: int) -> bool:
    """Whether a process exists; one that has ended and waits for its parent does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@in_loop
async def test_requests_side_by_side():
    async with running() as host:
        assert host.state == "ready"
        assert host.facts == {"vocab_size": 97, "pid": host.pid, "fingerprint": ""}
        requests = [request(f"r{i}", prompt=i, max_tokens=1 + i) for i in range(40)]
        answers = await asyncio.gather(*(read(host.submit(each)) for each in requests))
        for each, events in zip(requests, answers, strict=True):
            assert events[0] == Started(each.id, 0)
            assert tokens(events) == expected(each)
            assert ended(events, Outcome.LENGTH)
        assert host.open == 0
        await until(lambda: host.beat)
        assert host.beat.keys() == {"running", "ticks", "last_tick_timestamp", "busy"}


@in_loop
async def test_refused_by_the_engine():
    async with running() as host:
        (end,) = await read(host.submit(request(prompt=REFUSE)))
        assert isinstance(end, Finished)
        assert end.outcome is Outcome.REFUSED
        assert "can never fit" in end.error


@in_loop
async def test_books_that_do_not_balance_are_counted():
    """The engine ends, and its successor's beats do not lose the count."""
    async with running() as host:
        (*_, end) = await read(host.submit(request(prompt=LOSE)))
        assert isinstance(end, Finished)
        assert end.outcome is Outcome.FAILED
        await until(lambda: host.state == "ready")
        assert host.ledger_violations == 1
        assert ended(await read(host.submit(request())), Outcome.LENGTH)


@in_loop
async def test_refused_by_the_host():
    """An id that is open, and answers above the longest line."""
    async with running({"step_seconds": 0.01}) as host:
        ticket = host.submit(request())
        with pytest.raises(ConfigError, match="this id is open"):
            host.submit(request())
        scored = Request("b", (1,) * 100_000, 0, logprobs=20, prompt_logprobs=True)
        with pytest.raises(ConfigError, match="too large"):
            host.submit(scored)
        assert host.open == 1
        assert ended(await read(ticket), Outcome.LENGTH)


@pytest.mark.parametrize(
    ("fails", "expected_class"),
    [
        ("ConfigError", ConfigError), ("DataError", DataError),
        ("EnvironmentError_", EnvironmentError_), ("Other", EnvironmentError_),
    ],
)  # fmt: skip
@in_loop
async def test_an_engine_that_cannot_start(fails: str, expected_class: type[Exception]):
    host = Host(command(fails=fails))
    with pytest.raises(expected_class, match="no such model"):
        await host.start()
    assert host.state == "dead"
    assert not host.on_dead.is_set()
    with pytest.raises(HostNotReady):
        host.submit(request())
    await host.stop()


@in_loop
async def test_a_command_that_does_not_exist_or_says_nothing():
    with pytest.raises(EnvironmentError_, match="cannot be started"):
        await Host(["no-such-program"]).start()
    with pytest.raises(EnvironmentError_, match="exit status"):
        await Host([sys.executable, "-c", "raise SystemExit(3)"]).start()
    with pytest.raises(EnvironmentError_, match="hangs"):
        await Host([sys.executable, "-c", "input()"], start_seconds=0.1).start()


@pytest.mark.parametrize("line", ["{", "[]", '{"events":[{"event":"?"}]}', '{"x":1}', "x" * 99])
@in_loop
async def test_an_engine_that_talks_nonsense(line: str):
    script = f"print('{{\"ready\":{{}}}}'); print('{line}', flush=True); input()"
    async with running() as host:
        host.command = [sys.executable, "-c", script]
        os.kill(host.facts["pid"], signal.SIGKILL)
        await host.on_dead.wait()
        assert host.state == "dead"


@in_loop
async def test_a_killed_engine_is_started_once_more():
    """Open tickets fail at once; the second death is final."""
    async with running() as host:
        for death in (1, 2):
            assert host.pid
            pid = host.pid
            open_ones = [host.submit(request(f"r{i}", max_tokens=10**6)) for i in range(32)]
            await anext(open_ones[0].events)
            os.kill(pid, signal.SIGKILL)
            async with asyncio.timeout(1):
                answers = await asyncio.gather(*map(read, open_ones))
            assert all(ended(events, Outcome.FAILED, DIED) for events in answers)
            with pytest.raises(HostNotReady):
                host.submit(request())
            if death == 1:
                await until(lambda: host.state == "ready")
                assert not host.on_dead.is_set()
                assert tokens(await read(host.submit(request()))) == expected(request())
        await host.on_dead.wait()
        assert host.state == "dead"
        assert host.pid is None
        assert "-9" in host.failure


@in_loop
async def test_deaths_that_lie_far_apart():
    clock = Time()
    async with running(restart_window=600.0, clock=clock) as host:
        for _ in range(3):
            before = host.facts["pid"]
            os.kill(before, signal.SIGKILL)
            await until(lambda before=before: host.facts["pid"] != before)
            clock.now += 601.0
        await until(lambda: host.state == "ready")
        assert not host.on_dead.is_set()


@in_loop
async def test_an_engine_that_cannot_be_started_again(tmp_path: Path):
    host = Host(command(once=str(tmp_path / "once")))
    await host.start()
    os.kill(host.facts["pid"], signal.SIGKILL)
    await host.on_dead.wait()
    assert "FileExistsError" in host.failure
    await host.stop()


@in_loop
async def test_another_model_is_not_served_instead(tmp_path: Path):
    weights = tmp_path / "weights"
    weights.write_text("one")
    host = Host(command(weights=str(weights)))
    await host.start()
    weights.write_text("two")
    os.kill(host.facts["pid"], signal.SIGKILL)
    await host.on_dead.wait()
    assert "replaced" in host.failure
    assert host.facts["fingerprint"] == "one"
    await host.stop()


@in_loop
async def test_a_crash_in_a_tick():
    async with running() as host:
        crashes, other = host.submit(request("a", prompt=CRASH)), host.submit(request("b"))
        answers = await asyncio.gather(read(crashes), read(other))
        assert all(ended(events, Outcome.FAILED, DIED) for events in answers)
        await until(lambda: host.state == "ready")
        assert "the device is gone" in host.failure


@in_loop
async def test_a_stopped_engine_is_stalled():
    """And goes on as if nothing had been when it is continued in time."""
    async with running({"step_seconds": 0.001}, stall_seconds=0.3) as host:
        ticket = host.submit(request(max_tokens=500))
        await anext(ticket.events)
        assert host.pid
        os.kill(host.pid, signal.SIGSTOP)
        await until(lambda: host.state == "stalled", 1)
        with pytest.raises(HostNotReady) as raised:
            host.submit(request("b"))
        assert raised.value.state == "stalled"
        os.kill(host.pid, signal.SIGCONT)
        await until(lambda: host.state == "ready", 1)
        assert tokens(await read(ticket)) == expected(request(max_tokens=500))


@in_loop
async def test_an_idle_engine_is_never_stalled():
    """It beats; the thresholds are a few beats."""
    async with running(stall_seconds=0.5, dead_seconds=1.0) as host:
        for _ in range(30):
            await asyncio.sleep(0.05)
            assert host.state == "ready"


@in_loop
async def test_a_tick_that_hangs_is_a_death():
    async with running(stall_seconds=0.2, dead_seconds=0.6) as host:
        pid = host.pid
        ticket = host.submit(request(prompt=HANG))
        await until(lambda: host.state == "stalled", 2)
        assert ended(await read(ticket), Outcome.FAILED, DIED)
        await until(lambda: host.state == "ready")
        assert host.pid != pid
        assert "hangs" in host.failure


@pytest.mark.parametrize("seen_before", [0, 1, 2, 9, 30, 32])
@in_loop
async def test_cancel(seen_before: int):
    """At once, when started, at the first token, later, before the end, and after it.

    The others are not disturbed, and the ticket ends once.
    """
    async with running({"step_seconds": 0.002}) as host:
        cancelled = request("a", max_tokens=30)
        ticket, other = host.submit(cancelled), host.submit(request("b"))
        events = [await anext(ticket.events) for _ in range(seen_before)]
        host.cancel("a", Outcome.STOP_STRING)
        host.cancel("a", Outcome.CANCELLED)
        events += await read(ticket)
        assert len([event for event in events if isinstance(event, Finished)]) == 1
        assert tokens(events) == expected(cancelled)[: len(tokens(events))]
        if len(tokens(events)) < cancelled.max_tokens:
            assert ended(events, Outcome.STOP_STRING)
        assert tokens(await read(other)) == expected(request("b"))
        host.cancel("never seen")
        assert host.open == 0


@pytest.mark.parametrize("n", [200, pytest.param(4000, marks=pytest.mark.slow)])
@in_loop
async def test_many_cancelled_at_random(n: int):
    """Every one ends once, those not cancelled with all their tokens."""
    draw = random.Random(n)
    async with running() as host:

        async def one(i: int) -> bool:
            each = request(f"r{i}", prompt=i % 97, max_tokens=draw.randrange(1, 20))
            ticket, patience, events = host.submit(each), draw.randrange(40), []
            async for event in ticket.events:
                events.append(event)
                if len(events) == patience:
                    host.cancel(each.id)
            whole = tokens(events) == expected(each) and ended(events, Outcome.LENGTH)
            return whole or (patience <= len(events) and ended(events, Outcome.CANCELLED))

        for start in range(0, n, 100):
            assert all(await asyncio.gather(*map(one, range(start, start + 100))))
        assert host.open == 0


@in_loop
async def test_cancel_after_a_death_and_while_draining():
    async with running({"step_seconds": 0.002}) as host:
        ticket = host.submit(request(max_tokens=10**6))
        draining = asyncio.create_task(host.drain(10))
        await asyncio.sleep(0)
        host.cancel("a")
        assert ended(await read(ticket), Outcome.CANCELLED)
        await draining
        assert host.pid
        os.kill(host.pid, signal.SIGKILL)
        host.cancel("a")
        await until(lambda: host.state == "dead")
        host.cancel("a")
        assert not host.on_dead.is_set()


@in_loop
async def test_drain():
    """Short requests end as usual, long ones fail when the time is over; new ones are refused.

    A second call ends the first.
    """
    async with running({"step_seconds": 0.002}) as host:
        short, long = host.submit(request("a")), host.submit(request("b", max_tokens=10**6))
        draining = asyncio.create_task(host.drain(1000))
        await asyncio.sleep(0)
        assert host.state == "draining"
        with pytest.raises(HostNotReady):
            host.submit(request("c"))
        assert ended(await read(short), Outcome.LENGTH)
        assert not draining.done()
        await host.drain(0.01)
        await draining
        assert ended(await read(long), Outcome.FAILED, "the server is shutting down")
        assert host.open == 0


@pytest.mark.parametrize("how", ["running", "stopped", "hanging", "starting"])
@in_loop
async def test_stop_leaves_no_process(how: str):
    host = Host(command())
    start = asyncio.create_task(host.start())
    tickets = []
    await until(lambda: host.pid)
    assert host.pid
    pid = host.pid
    if how != "starting":
        await start
        tickets = [host.submit(request(prompt=HANG if how == "hanging" else 1, max_tokens=10**6))]
    if how == "stopped":
        os.kill(pid, signal.SIGSTOP)
    async with asyncio.timeout(3):
        await host.stop()
    assert not alive(pid)
    assert host.state == "dead"
    assert all([ended(await read(each), Outcome.FAILED, "the server is shutting down")
                for each in tickets])  # fmt: skip
    if how == "starting":
        with pytest.raises(EnvironmentError_):
            await start
    await host.stop()


@pytest.mark.parametrize("seconds", [0.0, 0.001, 0.02, 0.05, 0.1])
@in_loop
async def test_stop_at_any_time_of_the_start(seconds: float):
    host = Host(command())
    start = asyncio.create_task(host.start())
    await asyncio.sleep(seconds)
    pid = host.pid
    await host.stop()
    assert host.pid is None
    assert pid is None or not alive(pid)
    await asyncio.gather(start, return_exceptions=True)


@in_loop
async def test_a_host_that_was_never_started():
    host = Host(command())
    with pytest.raises(HostNotReady) as raised:
        host.submit(request())
    assert raised.value.state == "starting"
    await host.drain(1)
    await host.stop()


@pytest.mark.parametrize("cycles", [4, pytest.param(50, marks=pytest.mark.slow)])
@in_loop
async def test_starts_and_stops_leave_nothing(cycles: int):
    """No process; of open files and tasks, see ``in_loop``."""
    pids = []
    for i in range(cycles):
        async with running() as host:
            pids.append(host.pid)
            ticket = host.submit(request(max_tokens=10**6 if i % 2 else 3))
            await anext(ticket.events)
    gc.collect()  # a transport that was not closed warns
    assert not any(map(alive, filter(None, pids)))


def test_a_killed_server_leaves_no_engine():
    """The engine sees the end of its stdin; its tick hangs."""
    script = f"""
import asyncio, sys
from open_mythos.inference.server.host import Host
from open_mythos.inference.request import Request
async def main():
    host = Host({command()!r})
    await host.start()
    host.submit(Request("a", ({HANG},), 1))
    await asyncio.sleep(0.1)
    print(host.pid, flush=True)
    await asyncio.sleep(1000)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as server:
        assert server.stdout
        pid = int(server.stdout.readline())
        assert alive(pid)
        server.kill()

    async def gone() -> None:
        await until(lambda: not alive(pid), 1)

    asyncio.run(gone())


@in_loop
async def test_a_slow_reader_gets_everything():
    """Tokens join above the limit; the order stays, and others are not held up."""
    async with running() as host:
        slow = request("slow", max_tokens=3 * MOST_WAITING)
        ticket = host.submit(slow)
        assert ended(await read(host.submit(request("b"))), Outcome.LENGTH)
        await until(lambda: host.open == 0)
        batches = []
        while batch := await ticket.batch():
            batches.append(batch)
        assert len(batches) == MOST_WAITING + 1
        assert max(map(len, batches)) == 2 * MOST_WAITING + 2
        events = [event for batch in batches for event in batch]
        assert tokens(events) == expected(slow)
        assert ended(events, Outcome.LENGTH)
        assert await ticket.batch() == []


@in_loop
async def test_only_tokens_join():
    ticket = Ticket("a")
    for _ in range(MOST_WAITING):
        ticket.put(Started("a", 0))
    ticket.put(Token("a", 1, 1))
    ticket.put(Token("a", 2, 1))
    ticket.put(PromptScored("a", (None,)))
    ticket.put(Token("a", 3, 1))
    ticket.put(Finished("a", Outcome.LENGTH))
    kinds = [type(event).__name__ for event in await read(ticket)]
    assert kinds[MOST_WAITING:] == ["Token", "Token", "PromptScored", "Token", "Finished"]


def test_the_command_of_a_worker():
    assert worker_command({"checkpoint": "x"})[1:3] == ["-m", "open_mythos.inference.worker"]
