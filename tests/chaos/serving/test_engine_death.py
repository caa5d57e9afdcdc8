"""R24: the engine's process hangs and dies; the server is told to end, or is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from statistics import median

import pytest

from chaos.serving.client import Connection, Reply
from chaos.serving.server import MODEL, START_SECONDS, Server, children, is_alive

STREAMS, TIMES = 32, 50
STALL_SECONDS, ERROR_SECONDS, DRAIN_SECONDS, MARGIN = 6.0, 1.0, 1.0, 2.0
LONG = {
    "model": MODEL, "prompt": "abc", "max_tokens": 250, "logit_bias": {"257": -100},
    "stream": True, "temperature": 1.5,
}  # fmt: skip


async def until_end(server: Server, act, streams: int = STREAMS) -> tuple[list[Reply], float]:
    """Begin streams, call ``act`` while they run, and return what each client got and when."""
    connections = [await Connection(server.port).open() for _ in range(streams)]
    for each in connections:
        await each.ask(LONG)
    await asyncio.gather(*(each.read(events=2) for each in connections[:16]))
    await asyncio.to_thread(act)
    begin = time.monotonic()
    replies = await asyncio.gather(*(each.read() for each in connections))
    for each in connections:
        each.close()
    return replies, time.monotonic() - begin


def is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def kinds(replies: list[Reply]) -> set[str]:
    """How requests ended."""
    return {
        "none" if not reply.has_end else "error" if b'"error"' in reply.body else "done"
        for reply in replies
    }


@pytest.mark.chaos
@pytest.mark.goal("R24", "the engine's process is stopped, killed, and killed again; 32 streams")
def test_the_engine_hangs_and_dies(served_model, tmp_path, row):
    server = Server(served_model, tmp_path)
    before, first = server.canary(), server.engine

    def stop_and_kill() -> None:
        nonlocal unready
        os.kill(first, signal.SIGSTOP)
        unready = server.wait_for(lambda: not server.is_ready, STALL_SECONDS)
        assert server.http.get("/health/live").status_code == 200
        os.kill(first, signal.SIGKILL)

    unready = 0.0
    replies, seconds = asyncio.run(until_end(server, stop_and_kill))
    assert kinds(replies) == {"error"}
    assert seconds <= ERROR_SECONDS
    restart = server.wait_for(lambda: server.is_ready, START_SECONDS)
    assert server.canary() == before
    assert server.metrics()["ledger_violations_total"] == 0
    pids = children(server.process.pid)
    replies, again = asyncio.run(until_end(server, lambda: os.kill(server.engine, signal.SIGKILL)))
    assert kinds(replies) == {"error"}
    assert again <= ERROR_SECONDS
    assert server.process.wait(10) == 1
    assert is_free(server.port)
    assert not [pid for pid in (first, *pids) if is_alive(pid)]
    server.http.close()
    row.count(2)
    row.outcome = (
        f"not ready after {unready:.1f} s, errors {1e3 * max(seconds, again):.0f} ms after the "
        f"kill, ready again in {restart:.1f} s; the second death ends with 1, port free, "
        "nothing left"
    )


@pytest.mark.chaos
@pytest.mark.goal("R24", "the server's process is killed")
def test_the_server_is_killed(served_model, tmp_path, row):
    server = Server(served_model, tmp_path)
    pids = children(server.process.pid)
    server.end(signal.SIGKILL)
    begin = time.monotonic()
    while any(map(is_alive, pids)) and time.monotonic() < begin + 10:
        time.sleep(0.02)
    assert not [pid for pid in pids if is_alive(pid)]
    assert is_free(server.port)
    row.outcome = "the engine's process ends by itself"


@pytest.mark.goal("R24", "SIGTERM while 16 streams run")
@pytest.mark.chaos
def test_sigterm(served_model, tmp_path, row):
    over, done = [], 0
    for i in range(TIMES):
        # some end by themselves, some are ended
        drain = DRAIN_SECONDS * (i % 2)
        server = Server(served_model, tmp_path / str(i), "--drain-seconds", str(drain))
        pids, begin = children(server.process.pid), 0.0

        def end(server=server) -> None:
            nonlocal begin
            begin = time.monotonic()
            server.process.send_signal(signal.SIGTERM)

        replies, _ = asyncio.run(until_end(server, end, 16))
        assert server.process.wait(START_SECONDS) == 0
        over.append(time.monotonic() - begin - drain)
        assert kinds(replies) <= {"done", "error"}
        assert is_free(server.port)
        assert not [pid for pid in pids if is_alive(pid)]
        server.http.close()
        done += sum(b"[DONE]" in reply.body for reply in replies)
        row.count()
    assert median(over) <= MARGIN, "of all, because other programs may hold up one"
    row.outcome = (
        f"every client has an end ({done} of {16 * TIMES} whole); exit 0, "
        f"{median(over):.1f} s after the drain (at most {max(over):.1f}); port free, nothing left"
    )
