"""An engine without a model, for the tests of the process around it (loads no torch)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mythos import errors
from open_mythos.inference.ledger import LedgerError
from open_mythos.inference.request import Event, Finished, Outcome, Request, Started, Token

CRASH, HANG, REFUSE, LOSE = 666, 667, 668, 669
"""A prompt that starts with one of these crashes a tick, hangs in one, is refused, or is lost."""


def expected(request: Request) -> list[int]:
    """The tokens of a request."""
    return [(sum(request.prompt) + i) % 97 for i in range(request.max_tokens)]


@dataclass
class Toy:
    """Every tick gives each request its next token."""

    step_seconds: float = 0.0
    noise: bool = False

    def __post_init__(self) -> None:
        self.running: dict[str, tuple[Request, int]] = {}
        self.ended: dict[str, Outcome] = {}

    @property
    def busy(self) -> bool:
        return bool(self.running or self.ended)

    def stats(self) -> dict[str, float]:
        return {"running": len(self.running)}

    def add(self, request: Request) -> None:
        if request.prompt[0] == REFUSE:
            raise errors.ConfigError("the prompt can never fit", where="prompt", allowed="less")
        self.running[request.id] = request, -1

    def cancel(self, id: str, outcome: Outcome = Outcome.CANCELLED) -> None:
        if self.running.pop(id, None):
            self.ended[id] = outcome

    def step(self) -> list[Event]:
        time.sleep(self.step_seconds)
        if self.noise:
            print("a library prints")
            os.write(1, b"so does its C part\n")
        events: list[Event] = [Finished(id, outcome) for id, outcome in self.ended.items()]
        self.ended.clear()
        for id, (request, done) in list(self.running.items()):
            if request.prompt[0] == CRASH:
                raise ZeroDivisionError("the device is gone")
            if request.prompt[0] == LOSE:
                raise LedgerError("pages are lost")
            time.sleep(3600 * (request.prompt[0] == HANG))
            events.append(Started(id, 0) if done < 0 else Token(id, expected(request)[done], 3))
            self.running[id] = request, done + 1
            if done + 1 == request.max_tokens:
                del self.running[id]
                events.append(Finished(id, Outcome.LENGTH))
        return events


def fingerprint(options: Mapping[str, Any]) -> str:
    """Content of the file that stands for the weights."""
    return Path(options["weights"]).read_text() if "weights" in options else ""


def build(options: Mapping[str, Any]) -> tuple[Toy, dict[str, Any]]:
    """Build a toy; ``fails`` names an error to raise, ``once`` a file that must be absent."""
    if "fails" in options:
        raise getattr(errors, options["fails"], RuntimeError)("no such model")
    if "once" in options:
        os.close(os.open(options["once"], os.O_CREAT | os.O_EXCL))
    return Toy(**options.get("toy", {})), {
        "vocab_size": 97, "pid": os.getpid(), "fingerprint": fingerprint(options),
    }  # fmt: skip
