"""Metrics of a run: a one-method logger protocol, a JSON-lines file, a logger group, events."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from open_mythos.checks import checked
from open_mythos.distributed import rank
from open_mythos.errors import EnvironmentError_, InternalError
from open_mythos.files import refuse_link

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
"""Name -> number, list of numbers (one per loop), or other JSON returned by an evaluation."""
EVENTS = ("resumed", "skipped", "rewound", "preempted", "stopped")
"""Kinds of events: resumed from a checkpoint, non-finite step skipped, rolled back to a checkpoint,
stopped by a signal, stopped with DivergedError."""


class MetricsLogger(Protocol):
    """Receives the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics measured after ``step`` optimizer steps."""


class JsonlLogger:
    """Appends one JSON object per call to a file: ``{"step": ..., name: number or list, ...}``.

    Creates missing folders. Numbers that are not finite become null. A resumed run appends: of two
    lines with the same step and names the later one counts.

    Raises:
        EnvironmentError_: The file cannot be written.
    """

    @checked
    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            refuse_link(self.path, "metrics cannot be written")
            with self.path.open("a+b") as file:
                file.seek(max(0, file.tell() - 1))
                if file.read() not in (b"", b"\n"):
                    file.write(b"\n")  # a killed run may have left a partial line
        except OSError as error:
            raise EnvironmentError_(
                "metrics cannot be written", where=str(self.path), value=str(error),
                allowed="a file that can be written",
                fix="choose another folder, or fix its permissions",
            ) from error  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and flush it to the operating system."""
        line = json.dumps({"step": step, **{k: finite(v) for k, v in metrics.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class LoggerGroup:
    """Forwards metrics to several loggers, on rank 0 only, and survives their failures.

    The first failure of a logger is reported as a warning; training and other loggers continue.
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
            except Exception as error:  # no failure of a logger may stop training
                if id(each) not in self._warned:
                    self._warned.add(id(each))
                    message = "%s failed at step %d and may lose metrics: %s"
                    logger.warning(message, type(each).__name__, step, error)

    def close(self) -> None:
        """Close every logger that has a ``close`` method."""
        for each in self._loggers:
            try:
                getattr(each, "close", lambda: None)()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(each).__name__, error)


def event(kind: str, **facts: Any) -> Metrics:
    """Return ``{"event": {"kind": kind, **facts}}``; ``kind`` is one of :data:`EVENTS`.

    Raises:
        InternalError: The kind is unknown.
    """
    if kind not in EVENTS:
        raise InternalError("no such event", where="event", value=kind, allowed=", ".join(EVENTS))
    return {"event": {"kind": kind, **facts}}


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, which JSON can represent."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
