"""Time of calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Sums the CPU and wall-clock seconds of calls."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Restart."""
        self.cpu = self.wall = 0.0
        self.calls = 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with its time added up."""

        def timed(*arguments: Any, **named: Any) -> Any:
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.cpu += time.process_time() - cpu
                self.wall += time.perf_counter() - wall
                self.calls += 1

        return timed
