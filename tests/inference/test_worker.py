"""The engine's process: what it says, when it ends, and what it survives."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from inference.toy_engine import CRASH, HANG, REFUSE, Toy, expected

from open_mythos.errors import InternalError
from open_mythos.inference import worker
from open_mythos.inference.request import Request

ROOT = Path(__file__).parents[2]


def command(**options: Any) -> list[str]:
    """The command of a process around a toy."""
    options = {"factory": "inference.toy_engine:build", "beat_seconds": 0.05} | options
    paths = f"PYTHONPATH={ROOT}:{ROOT / 'tests'}"
    return [
        "env", paths, sys.executable, "-m", "open_mythos.inference.worker", json.dumps(options),
    ]  # fmt: skip


def request(id: str = "a", prompt: int = 5, max_tokens: int = 3) -> Request:
    return Request(id, (prompt, 1), max_tokens)


def add(each: Request) -> dict[str, Any]:
    return {"add": each.to_json()}


class Pipes:
    """A worker process as its parent sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin
        self.process.stdin.write(worker.encode(message))
        self.process.stdin.flush()

    def until(self, name: str) -> Any:
        """The next message of a kind."""
        assert self.process.stdout
        for line in self.process.stdout:
            message = worker.decode(line)
            if name in message:
                return message if name == "fatal" else message[name]
        raise AssertionError(f"ended before {name}")

    def events(self) -> Iterator[dict[str, Any]]:
        while True:
            yield from self.until("events")


@contextmanager
def started(**options: Any) -> Iterator[Pipes]:
    pipe = subprocess.PIPE
    with subprocess.Popen(command(**options), stdin=pipe, stdout=pipe, stderr=pipe) as process:
        try:
            yield Pipes(process)
        finally:
            process.kill()


def finished(pipes: Pipes) -> tuple[list[int], dict[str, Any]]:
    """Tokens and end of the only request."""
    tokens = []
    for event in pipes.events():
        if event["event"] == "token":
            tokens.append(event["token"])
        if event["event"] == "finished":
            return tokens, event
    raise AssertionError


def test_a_request_among_noise_on_stdout():
    """What libraries print does not reach the channel."""
    with started(toy={"noise": True}) as pipes:
        assert pipes.until("ready")["pid"] == pipes.process.pid
        pipes.send(add(request()))
        tokens, end = finished(pipes)
        assert tokens == expected(request())
        assert end["outcome"] == "length"
        assert pipes.process.stdin
        pipes.process.stdin.close()
        assert pipes.process.wait(5) == 0
        assert pipes.process.stderr
        assert pipes.process.stderr.read().count(b"so does its C part") > 0


def test_an_engine_that_refuses_goes_on():
    with started() as pipes:
        pipes.send(add(request(prompt=REFUSE)))
        _, end = finished(pipes)
        assert end["outcome"] == "refused"
        assert "can never fit" in end["error"]
        pipes.send({"add": {"id": "b", "no_such_field": 1}})
        assert finished(pipes)[1]["outcome"] == "refused"
        pipes.send(add(request()))
        assert finished(pipes)[0] == expected(request())


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"{\n", "not a message"), (b"[1]\n", "not a message"), (b"\xff\n", "not a message"),
        (b"[" * 50_000 + b"\n", "not a message"), (b'{"drop": 1}\n', "unknown message"),
    ],
)  # fmt: skip
def test_a_bad_line_is_fatal(line: bytes, what: str):
    with started() as pipes:
        pipes.until("ready")
        assert pipes.process.stdin
        pipes.process.stdin.write(line)
        pipes.process.stdin.flush()
        assert what in pipes.until("fatal")["fatal"]
        assert pipes.process.wait(5) == 1


def test_an_exception_in_a_tick_is_fatal():
    with started() as pipes:
        pipes.send(add(request(prompt=CRASH)))
        assert pipes.until("fatal") == {
            "fatal": "ZeroDivisionError: the device is gone", "kind": "ZeroDivisionError",
        }  # fmt: skip
        assert pipes.process.wait(5) == 1


@pytest.mark.parametrize("state", ["idle", "hanging"])
def test_the_end_of_stdin_ends_the_process(state: str):
    with started() as pipes:
        pipes.until("ready")
        if state == "hanging":
            pipes.send(add(request(prompt=HANG)))
            time.sleep(0.2)
        assert pipes.process.stdin
        pipes.process.stdin.close()
        assert pipes.process.wait(1) == 0


def test_signals_of_the_terminal_are_the_parents():
    with started() as pipes:
        pipes.until("ready")
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            pipes.process.send_signal(each)
        pipes.send(add(request()))
        assert finished(pipes)[0] == expected(request())


def test_a_broken_stdout_ends_the_process():
    with started() as pipes:
        pipes.until("ready")
        assert pipes.process.stdout
        pipes.process.stdout.close()
        assert pipes.process.wait(5) == 0


def test_no_torch_before_the_engine():
    code = "import sys, open_mythos.inference.worker, open_mythos.inference.server.host\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


class Script:
    """Stands for inbox, channel and clock: a tick takes a second, a wait all of its time."""

    def __init__(self, messages: list[list[dict[str, Any]]]) -> None:
        self.messages, self.sent, self.waits, self.now = messages, [], [], 0.0

    def take(self, seconds: float) -> list[dict[str, Any]]:
        self.waits.append(seconds)
        self.now += seconds or 0.25
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def serve(self, engine: Any) -> None:
        with pytest.raises(EOFError):
            worker.serve(engine, self.take, self.sent.append, clock=lambda: self.now)


def kinds(sent: list[dict[str, Any]]) -> list[str]:
    return [kind for message in sent for kind in message]


def test_idle_waits_from_beat_to_beat():
    """Once a second, without polling."""
    script = Script([[], [], [], []])
    script.serve(Toy())
    assert script.waits == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert kinds(script.sent) == ["beat"] * 4
    assert script.sent[-1]["beat"]["ticks"] == 0
    assert script.sent[-1]["beat"]["busy"] is False


def test_all_events_of_a_tick_are_one_line():
    """And a busy engine is not waited for; beats count its ticks."""
    both = [add(request("a", max_tokens=9)), add(request("b", max_tokens=9))]
    script = Script([both, *([] for _ in range(9))])
    script.serve(Toy())
    assert script.waits[:10] == [0.0] * 10
    lines = [message["events"] for message in script.sent if "events" in message]
    assert [len(line) for line in lines] == [2] * 9 + [4]
    assert [m["beat"]["ticks"] for m in script.sent if "beat" in m] == [1, 5, 9]
    assert [m["beat"]["busy"] for m in script.sent if "beat" in m] == [True, True, True]


def test_a_cancellation_in_the_same_tick():
    script = Script([[add(request()), {"cancel": "a", "outcome": "stop_string"}]])
    script.serve(Toy())
    assert script.sent[0]["events"] == [
        {"event": "finished", "id": "a", "outcome": "stop_string", "error": ""}
    ]


def taken(content: bytes) -> tuple[list[dict[str, Any]], Callable[[], list[dict[str, Any]]]]:
    """Everything that an inbox makes of a file."""
    ends: list[int] = []
    inbox = worker.Inbox(io.BytesIO(content), lambda: ends.append(1))
    while not ends:
        time.sleep(0.001)
    return ends, lambda: inbox.take(0.0)


def test_an_inbox_keeps_the_order_and_sees_the_end():
    ends, take = taken(b'{"a":1}\n{"b":2}\n')
    assert take() == [{"a": 1}, {"b": 2}]
    assert take() == []
    assert ends == [1]


def test_too_many_or_too_long_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(worker, "MAX_WAITING", 3)
    monkeypatch.setattr(worker, "MAX_LINE_BYTES", 20)
    with pytest.raises(InternalError, match="too many"):
        taken(b"{}\n" * 4)[1]()
    assert taken(b"{}\n" * 3)[1]() == [{}] * 3
    assert taken(b'{"a":"' + b"x" * 11 + b'"}\n')[1]() == [{"a": "x" * 11}]
    with pytest.raises(InternalError, match="not a message"):
        taken(b'{"a":"' + b"x" * 12 + b'"}\n')[1]()
    with pytest.raises(InternalError, match="not a message"):
        taken(b"{}")[1]()
