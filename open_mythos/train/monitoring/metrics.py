"""Where the numbers of a run go: a one-method protocol, a JSON-lines file, events."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from open_mythos.distributed import rank
from open_mythos.errors import EnvironmentError_, InternalError

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
"""Name -> number, list of numbers (one per loop), or whatever JSON an evaluation gives."""
EVENTS = ("resumed", "skipped", "rewound", "preempted", "stopped")
"""What can happen to a run beside steps: continued from a checkpoint, a step skipped because it was
not finite, rolled back to a checkpoint, told to stop, given up."""


class MetricsLogger(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record what was measured after ``step`` optimizer steps."""


class JsonlLogger:
    """Appends one JSON object per call to a file: ``{"step": ..., name: number or list, ...}``.

    Numbers that are not finite become null, which every JSON reader takes. A resumed run appends:
    of two lines with the same step and names the later one counts.

    Args:
        path: The file; its folder is made if missing.

    Raises:
        EnvironmentError_: The file cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):
                    file.write(b"\n")  # a killed run may have left half a line
        except OSError as error:
            raise EnvironmentError_(
                "metrics cannot be written", where=str(self.path), value=str(error),
                fix="choose another folder, or fix its permissions",
            ) from error  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        line = json.dumps({"step": step, **{k: finite(v) for k, v in metrics.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class LoggerGroup:
    """Hands metrics on to several loggers, on rank 0 only, and survives their failures.

    A logger that raises is named in one warning; training and the other loggers go on.
    """

    def __init__(self, loggers: Iterable[MetricsLogger]) -> None:
        self._loggers = list(loggers)
        self._warned: set[int] = set()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call every logger."""
        if rank() != 0:
            return
        for each in self._loggers:
            try:
                each.log(step, metrics)
            except Exception as error:  # whatever a logger does must not stop training
                if id(each) not in self._warned:
                    self._warned.add(id(each))
                    name = type(each).__name__
                    logger.warning(
                        "%s failed at step %d and may lose metrics: %s", name, step, error
                    )

    def close(self) -> None:
        """Let every logger that has a ``close`` write what it still holds."""
        for each in self._loggers:
            try:
                getattr(each, "close", lambda: None)()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(each).__name__, error)


def event(kind: str, **facts: Any) -> Metrics:
    """Return a line that says what happened instead of what was measured: ``{"event": {...}}``.

    Args:
        kind: One of :data:`EVENTS`.
        facts: Numbers and texts about it, JSON-ready.

    Raises:
        InternalError: The kind is unknown.
    """
    if kind not in EVENTS:
        raise InternalError("no such event", where="event", value=kind, allowed=", ".join(EVENTS))
    return {"event": {"kind": kind, **facts}}


def finite(value: Any) -> Any:
    """Replace every number that is not finite by None, which JSON can hold."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
