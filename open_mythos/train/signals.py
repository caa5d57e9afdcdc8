"""Stopping a run from outside: finish the step, save, leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from open_mythos.errors import MythosError

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STANDARD_ERROR = 2


class PreemptedError(MythosError):
    """The run was told to stop and has saved a checkpoint; resuming continues it bit for bit."""

    exit_code = 75


class StopRequest:
    """Within ``with``, SIGINT and SIGTERM set :attr:`received` instead of ending the process.

    SIGINT does so once: the next one, from whichever signal was first, acts as it did before, so
    that somebody at a terminal can end a run that hangs while it saves. SIGTERM may come again and
    changes nothing: a launcher such as torchrun passes on what the scheduler has sent to every
    process already. What ends a process that does not leave is SIGKILL.

    Outside the main thread, where Python delivers no signals, it does nothing.

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
        for number in STOP_SIGNALS:
            self._restore(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signal.Signals(number)
        self._restore(signal.SIGINT)
        if first:
            # a handler runs in the middle of anything, a write to sys.stderr included, which cannot
            # be entered twice: no logging here
            said = f"{signal.Signals(number).name}: finishing the step, then saving\n"
            with contextlib.suppress(OSError):
                os.write(_STANDARD_ERROR, said.encode())

    def _restore(self, number: signal.Signals) -> None:
        if number in self._before:
            # None stands for a handler that was not set from Python and cannot be set again
            signal.signal(number, self._before.pop(number) or signal.SIG_DFL)
