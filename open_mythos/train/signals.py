"""Stop a run by a signal: finish the step, save, exit."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from open_mythos.errors import MythosError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STANDARD_ERROR = 2


class PreemptedError(MythosError):
    """The run was told to stop and has saved a checkpoint; resuming continues it bit for bit."""

    exit_code = 75


class StopRequest:
    """Within ``with``, SIGINT and SIGTERM set :attr:`received` instead of ending the process.

    After the first signal of either kind, SIGINT has its previous effect, so that a run that hangs
    while it saves can be interrupted. Further SIGTERMs have no effect: launchers such as torchrun
    forward those that the scheduler has already sent to every process.

    It does nothing if it is not ``active``, or outside the main thread, where Python delivers no
    signals.
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

    def __exit__(self, *error: object) -> None:
        for number in STOP_SIGNALS:
            self._restore(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._restore(signal.SIGINT)
        if self.received is None:
            self.received = signal.Signals(number)
            # no logging: the handler may interrupt a write to sys.stderr, which is not reentrant
            message = f"{self.received.name}: finishing the step, then saving\n"
            with contextlib.suppress(OSError):
                os.write(_STANDARD_ERROR, message.encode())

    def _restore(self, number: signal.Signals) -> None:
        if number in self._before:
            # None: the handler was not set from Python and cannot be restored
            signal.signal(number, self._before.pop(number) or signal.SIG_DFL)
