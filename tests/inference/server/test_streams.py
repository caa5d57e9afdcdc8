"""Streams and their ends: failures, timeouts, clients that leave or take nothing, joined tokens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from open_mythos.inference.request import Outcome
from open_mythos.inference.server.limits import Limits
from open_mythos.inference.server.protocol import CompletionRequest, parse_body
from open_mythos.inference.server.service import Service
from open_mythos.inference.server.streams import Delta, Pace
from open_mythos.tokenizer import ByteTokenizer
from tests.inference.server.fake_host import FakeHost
from tests.inference.server.running import Running, wait_for

Start = Callable[..., Running]


def events(answer: httpx.Response) -> Iterator[Any]:
    """The data of each event; "[DONE]" as text."""
    for line in answer.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def stream(server: Running, **body: Any) -> Any:
    fields = {"model": "toy", "prompt": "abc", "stream": True, **body}
    return server.client.stream("POST", "/v1/completions", json=fields)


def request_of(**body: Any) -> bytes:
    """A request as bytes."""
    data = json.dumps({"model": "toy", "prompt": "abc", **body}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def is_clean(server: Running) -> bool:
    queue = server.service.admission
    return not (server.host.live or queue.open or queue.waiting or queue.cost)


def test_a_refusal_before_the_stream_has_a_status(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.refusal = "it does not fit"
    with stream(server) as answer:
        assert answer.status_code == 400
        assert json.loads(answer.read())["error"]["code"] == "refused"
    assert is_clean(server)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("nonfinite_logits", 500, "nonfinite_logits"),
        ("engine died", 503, "not_ready"),
        ("no_token_fits_schema", 500, "no_token_fits_schema"),
    ],
)
def test_a_failure_in_the_middle(start: Start, failure: str, status: int, code: str) -> None:
    host = FakeHost()
    server = start(host)
    host.fail_after, host.failure = 2, failure
    with stream(server, temperature=0, max_tokens=9) as answer:
        assert answer.status_code == 200
        got = list(events(answer))
    assert "".join(each["choices"][0]["text"] for each in got[:-1]) == "ab"
    assert got[-1]["error"]["code"] == code, "the last event, and no [DONE]"
    assert server.post().status_code == status
    with pytest.raises(openai.APIError):
        list(server.openai().completions.create(model="toy", prompt="a", stream=True))
    wait_for(lambda: is_clean(server))


def test_one_failed_choice_ends_the_others(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.delay = 0.02
    host.fail_after = 3
    assert server.post(n=4, max_tokens=100).status_code == 500
    wait_for(lambda: is_clean(server))


def test_a_timeout(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.stalled = True
    assert server.post(timeout=0.1).status_code == 504
    with stream(server, timeout=0.1) as answer:
        got = list(events(answer))
    assert got[-1]["error"]["code"] == "timeout"
    host.held = True
    answer = server.post(timeout=0.1)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
    assert set(host.cancelled.values()) == {Outcome.TIMEOUT}
    assert all(request.deadline is not None for request in host.requests)
    wait_for(lambda: is_clean(server))


@pytest.mark.parametrize("phase", ["held", "stalled"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves(start: Start, phase: str, is_stream: bool) -> None:
    host = FakeHost()
    server = start(host)
    setattr(host, phase, True)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_of(n=2, stream=is_stream))
        wait_for(lambda: len(host.live) == 2)
    wait_for(lambda: is_clean(server), seconds=2)
    assert list(host.cancelled.values()) == [Outcome.CANCELLED] * 2
    outcomes = server.client.get("/metrics").text
    assert 'outcome="disconnected",route="/v1/completions"} 1.0' in outcomes


def test_a_client_that_leaves_while_sending(start: Start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request_of()[:-1])
    wait_for(lambda: 'outcome="disconnected"' in server.client.get("/metrics").text)


def test_a_client_that_takes_nothing(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """It is cut and its connection dropped, although much is left to be sent."""
    host = FakeHost(context=10**6)
    server = start(host, limits=Limits(send_seconds=0.2))
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        host.delay = 0.01
        connection.sendall(
            request_of(prompt="x" * 300_000, stream=True, echo=True, max_tokens=10_000)
        )
        wait_for(lambda: host.live)
        wait_for(lambda: is_clean(server))
        assert Outcome.CANCELLED in host.cancelled.values()
        connection.settimeout(10)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        assert len(received) < 300_000
    assert not caplog.records
    assert server.post().status_code == 200


@pytest.mark.parametrize("keeps", ["close", "keep-alive"])
def test_a_client_that_does_not_take_a_whole_answer(start: Start, keeps: str) -> None:
    """The request has ended, its answer waits in the connection, which is dropped, too."""
    host = FakeHost(context=10**6)
    server = start(host, limits=Limits(send_seconds=0.2))
    server.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    assert is_clean(server)
    n_files = len(os.listdir("/proc/self/fd"))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        data = request_of(prompt="x" * 300_000, echo=True, max_tokens=1)
        connection.sendall(data.replace(b"Host", f"Connection: {keeps}\r\nHost".encode(), 1))
        connection.settimeout(10)
        received = connection.recv(10)
        wait_for(lambda: is_clean(server))
        wait_for(lambda: len(os.listdir("/proc/self/fd")) == n_files + 1)  # this end
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
        assert len(received) < 300_000
    assert server.post().status_code == 200


def test_signs_of_life(start: Start) -> None:
    host = FakeHost()
    server = start(host, limits=Limits(ping_seconds=0.05))
    host.delay = 0.3
    with stream(server, max_tokens=1) as answer:
        lines = list(answer.iter_lines())
    assert any(line.startswith(":") for line in lines)
    assert lines[-2] == "data: [DONE]"


def test_tokens_are_joined_when_all_streams_are_busy(start: Start) -> None:
    host = FakeHost()
    server = start(host, limits=Limits(joined_above=10, joined_seconds=0.05))
    with stream(server, max_tokens=100, temperature=0, return_token_ids=True) as answer:
        got = [each["choices"][0] for each in events(answer) if each != "[DONE]"]
    assert "".join(each["text"] for each in got) == ("abc" * 34)[:100]
    assert sum(len(each["token_ids"]) for each in got) == 100
    assert len(got) < 60


def test_pace() -> None:
    now = [0.0]
    pace = Pace(Limits(joined_above=4, joined_seconds=0.5), clock=lambda: now[0])
    for _ in range(4):
        assert pace.pause == 0
        pace.count()
        now[0] += 0.24
    assert pace.pause == 0.5
    now[0] += 0.1
    assert pace.pause == 0


def test_one_event_per_token_at_a_normal_pace(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.delay = 0.002
    with stream(server, max_tokens=20, temperature=0) as answer:
        got = list(events(answer))
    assert len(got) >= 18


def test_a_stop_string_cancels_the_rest(start: Start) -> None:
    host = FakeHost()
    server = start(host)
    host.delay = 0.001
    answer = server.post(stop="ca", max_tokens=250, temperature=0).json()
    assert answer["choices"][0]["text"] == "ab"
    assert answer["usage"]["completion_tokens"] == 4
    wait_for(lambda: is_clean(server))
    assert list(host.cancelled.values()) == [Outcome.STOP_STRING]


def test_a_bug_while_following_ends_the_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("open_mythos.inference.text.TextStream.push", broken)
    server = start()
    begin = time.monotonic()
    assert server.post().status_code == 500
    assert time.monotonic() - begin < 5
    wait_for(lambda: is_clean(server))


def test_a_slow_client_finds_joined_tokens() -> None:
    """Events that wait beyond the limit are joined; nothing is lost."""
    limits = Limits(waiting_events=4)

    async def run() -> list[list[Delta]]:
        host = FakeHost()
        await host.start()
        service = Service(host, ByteTokenizer(), "toy", limits=limits)
        body = parse_body(
            CompletionRequest,
            b'{"model": "toy", "prompt": "abc", "n": 3, "max_tokens": 50, "temperature": 0}',
            limits,
        )
        answer, _ = await service.prepare(body, "")
        await answer.start()
        while host.live:
            await asyncio.sleep(0.001)
        batches = [batch async for batch in answer.deltas()]
        answer.close()
        assert service.admission.open == 0
        return batches

    batches = asyncio.run(run())
    assert len(batches[0]) <= 4 + 3
    for index in range(3):
        own = [delta for batch in batches for delta in batch if delta.index == index]
        assert "".join(delta.piece.text for delta in own) == ("abc" * 17)[:50]
        assert sum(len(delta.piece.tokens) for delta in own) == 50
        assert own[-1].finish_reason == "length"
