"""Jobs that test the harness itself, and the command line as a job."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest.mock import patch

from chaos.fork_server import begin
from open_mythos.errors import EnvironmentError_


def give(value: Any) -> Any:
    return value


def refuse() -> None:
    raise EnvironmentError_("it cannot be done")


def fail() -> float:
    return 1 / 0


def wait_for_ever() -> None:
    begin()
    while True:
        signal.pause()


def hold(descriptor: int) -> None:
    """Keep a descriptor open for as long as this lives."""
    os.write(descriptor, b"h")
    while True:
        signal.pause()


def command(arguments: list[str], at: int | None = None, send: str = "SIGTERM") -> int:
    """``open-mythos`` with these arguments, which sends itself a signal in step number ``at``."""
    from open_mythos.cli import main
    from open_mythos.train import Trainer

    plain = Trainer.train_step

    def train_step(trainer: Trainer, step: int) -> Any:
        if step == at:
            os.kill(os.getpid(), getattr(signal, send))
        return plain(trainer, step)

    with patch.object(Trainer, "train_step", train_step):
        return main(arguments)
