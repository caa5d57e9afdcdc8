"""The engine's process: JSON lines in on stdin, JSON lines out on stdout.

Started by :class:`open_mythos.inference.server.host.Host` as
``python -m open_mythos.inference.worker OPTIONS``. To the worker: ``{"add": request}`` and
``{"cancel": id, "outcome": outcome}``. From it: ``{"ready": facts}`` once; ``{"events": [...]}``,
all events of a tick in one line; ``{"beat": stats}`` at least every second, also while nothing
runs, but never during a tick: a tick that hangs shows as silence; ``{"fatal": text, "kind":
class}`` before it exits with 1.

The end of stdin ends the process, so that it never outlives the process that started it. The
signals of a terminal or a service manager do not: the parent first lets running requests finish.

This module loads no torch before it builds an engine.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Protocol

from open_mythos.errors import ConfigError, EnvironmentError_, InternalError, MythosError
from open_mythos.inference.request import Event, Finished, Outcome, Request, event_to_json

if TYPE_CHECKING:
    from open_mythos.tokenizer import Tokenizer

MAX_LINE_BYTES = 1 << 26
"""Longest line in either direction, its end included."""
BEAT_SECONDS = 1.0
MAX_WAITING = 1 << 14
"""Messages that may wait for the end of a tick."""
_MAX_ERROR_CHARACTERS = 4000


class ServedEngine(Protocol):
    """What the worker needs of an engine."""

    @property
    def busy(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, id: str, outcome: Outcome = ...) -> None: ...
    def step(self) -> list[Event]: ...
    def stats(self) -> Mapping[str, Any]: ...


Send = Callable[[Mapping[str, Any]], None]


def build_engine(options: Mapping[str, Any]) -> tuple[ServedEngine, dict[str, Any]]:
    """Load a model and build its engine; return it with the facts of ``{"ready": facts}``.

    Args:
        options: ``checkpoint``, ``device``, ``quantize`` and ``weights`` as ``load_model`` takes
            them; ``tokenizer``, by default the one stored with the model; and ``engine``, keyword
            arguments of the engine.

    Raises:
        MythosError: The model cannot be loaded, or the engine refuses an option.
    """
    from open_mythos.inference.engine import Engine
    from open_mythos.inference.facts import SPEED_CONTEXT, measured_speed, self_check, served_facts
    from open_mythos.inference.loading import load_model

    checkpoint, bits = options["checkpoint"], options.get("quantize", "")
    arguments = options.get("engine", {})
    model, weights = load_model(
        checkpoint, options.get("device", "auto"), bits, options.get("weights", "")
    )
    # an engine of its own, with little memory: statistics begin with the first real request
    context = min(arguments.get("context") or model.cfg.max_seq_len, SPEED_CONTEXT)
    trial = Engine(model, **{**arguments, "context": context})
    self_check(trial)
    speed = measured_speed(trial)
    engine = Engine(model, tokenizer=_tokenizer(checkpoint, options), **arguments)
    facts = served_facts(model, engine, checkpoint, bits, weights)
    return engine, {**facts, "loop_tokens_per_s": speed}


def _tokenizer(checkpoint: str, options: Mapping[str, Any]) -> Tokenizer | None:
    """Return the tokenizer that schemas need, if there is one."""
    from open_mythos.hub.places import model_directory, tokenizer_beside
    from open_mythos.tokenizer import load_tokenizer

    stored = tokenizer_beside(model_directory(checkpoint))
    name = options.get("tokenizer") or stored
    return None if name is None else load_tokenizer(name)


def serve(
    engine: ServedEngine,
    take: Callable[[float], list[dict[str, Any]]],
    send: Send,
    *,
    beat_seconds: float = BEAT_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> NoReturn:
    """Run ticks while there is work, and wait for messages while there is none.

    Args:
        engine: The engine; nothing else touches it.
        take: Returns the messages that wait, and waits up to some seconds for a first one.
        send: Writes a message.
        beat_seconds: Most seconds between two beats, unless a tick takes longer.
        clock: Seconds.

    Raises:
        Exception: Whatever the engine raises; its state cannot be trusted any more.
    """
    ticks, last_tick, due = 0, time.time(), clock()
    while True:
        messages = take(0.0 if engine.busy else max(0.0, due - clock()))
        events = [event for message in messages for event in _apply(engine, message)]
        if messages or engine.busy:
            events += engine.step()
            ticks, last_tick = ticks + 1, time.time()
        if events:
            send({"events": [event_to_json(event) for event in events]})
        if clock() >= due:
            own = {"busy": engine.busy, "ticks": ticks, "last_tick_timestamp": last_tick}
            send({"beat": {**engine.stats(), **own}})
            due = clock() + beat_seconds


def _apply(engine: ServedEngine, message: dict[str, Any]) -> Iterator[Event]:
    """Pass a message on to the engine, and yield the refusal of a request that cannot be run."""
    match message:
        case {"add": {"id": str(id)} as request}:
            try:
                engine.add(Request.from_json(request, time.monotonic()))
            except (ConfigError, EnvironmentError_) as error:
                yield Finished(id, Outcome.REFUSED, str(error))
        case {"cancel": str(id), "outcome": outcome}:
            engine.cancel(id, Outcome(outcome))
        case _:
            raise InternalError(
                "unknown message to the engine", where="engine", value=sorted(message),
                allowed="add, cancel",
            )  # fmt: skip


class Inbox:
    """The lines of a file as messages, read by a thread.

    At the end of the file ``on_end`` is called in that thread, however long a tick takes.
    """

    def __init__(self, file: BinaryIO, on_end: Callable[[], None]) -> None:
        self._file, self._on_end = file, on_end
        # without a limit of its own: the reader must never wait, or it would miss the end
        self._waiting: queue.SimpleQueue[dict[str, Any] | InternalError] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, seconds: float) -> list[dict[str, Any]]:
        """Return the messages that wait; if none does, wait for one.

        Raises:
            InternalError: A line was no JSON object or too long, or too many wait.
        """
        messages: list[dict[str, Any]] = []
        try:
            item = self._waiting.get(timeout=seconds) if seconds else self._waiting.get_nowait()
            while True:
                if isinstance(item, InternalError):
                    raise item
                messages.append(item)
                item = self._waiting.get_nowait()
        except queue.Empty:
            return messages

    def _read(self) -> None:
        try:
            while line := self._file.readline(MAX_LINE_BYTES + 1):
                if self._waiting.qsize() >= MAX_WAITING:
                    raise InternalError(
                        "too many messages wait for the engine",
                        where="engine",
                        value=self._waiting.qsize(),
                        allowed=f"{MAX_WAITING} messages",
                    )
                self._waiting.put(decode(line))
        except InternalError as error:
            self._waiting.put(error)
            while self._file.read(1 << 16):
                pass
        self._on_end()


def decode(line: bytes) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        InternalError: There is none, or the line has no end or is too long.
    """
    error: Exception | None = None
    try:
        if len(line) <= MAX_LINE_BYTES and line.endswith(b"\n"):
            message = json.loads(line)
            if isinstance(message, dict):
                return message
    except (ValueError, RecursionError) as caught:
        error = caught
    raise InternalError(
        "a line between server and engine is not a message", where="engine",
        value=f"{len(line)} bytes",
        allowed=f"one JSON object in at most {MAX_LINE_BYTES} bytes",
    ) from error  # fmt: skip


def encode(message: Mapping[str, Any]) -> bytes:
    """Return a message as a line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def fatal_message(error: BaseException) -> dict[str, str]:
    """Return the last message of a process that dies of ``error``."""
    kind = type(error).__name__
    text = str(error) if isinstance(error, MythosError) else f"{kind}: {error}"
    return {"fatal": text[:_MAX_ERROR_CHARACTERS], "kind": kind}


def run(options: Mapping[str, Any], requests: BinaryIO, answers: BinaryIO) -> None:
    """Build the engine and serve until ``requests`` ends, which ends the process.

    Args:
        options: See :func:`build_engine`; ``factory`` (``"module:function"``) names another
            function that builds the engine, and ``beat_seconds`` the time between beats.
        requests: Messages to the engine.
        answers: Messages from it, unbuffered.

    Raises:
        Exception: Whatever ended the engine; the last message has said so.
    """

    def send(message: Mapping[str, Any]) -> None:
        try:
            line = memoryview(encode(message))
            while line:
                line = line[answers.write(line) :]
        except BrokenPipeError:
            os._exit(0)

    # nothing is to be saved, and a tick may hang: leave at once
    inbox = Inbox(requests, on_end=lambda: os._exit(0))
    factory = options.get("factory")
    build = resolve_name(factory) if factory else build_engine
    try:
        engine, facts = build(options)
        send({"ready": facts})
        serve(engine, inbox.take, send, beat_seconds=options.get("beat_seconds", BEAT_SECONDS))
    except BaseException as error:
        send(fatal_message(error))
        raise


def _own_channel() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for messages; whatever libraries print goes to stderr instead."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return open(requests, "rb"), open(answers, "wb", buffering=0)


def main() -> NoReturn:
    """Run the process that :class:`open_mythos.inference.server.host.Host` starts."""
    faulthandler.enable()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    try:
        run(json.loads(sys.argv[1]), *_own_channel())
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    # without the interpreter's teardown, which waits for threads and devices
    os._exit(1)


if __name__ == "__main__":
    main()
