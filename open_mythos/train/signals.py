"""Stopping a run from outside: finish the step, save, leave."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from open_mythos.errors import MythosError

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PreemptedError(MythosError):
    """The run was told to stop and has saved a checkpoint; resuming continues it bit for bit."""

    exit_code = 75


class StopRequest:
    """Within ``with``, SIGINT and SIGTERM set :attr:`received` instead of ending the process.

    Only the first of them: the next one acts as it did before, so that a run that hangs while it
    saves can still be ended. Outside the main thread, where Python delivers no signals, it does
    nothing.

    Args:
        active: False leaves the signals alone.
    """

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if self.active and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        logger.warning("%s: finishing the step, then saving", self.received.name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
