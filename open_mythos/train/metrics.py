"""Where the numbers of a run go: a one-method protocol, a JSON-lines file, what loops report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from open_mythos.errors import EnvironmentError_
from open_mythos.trace import LoopTrace

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
"""Name -> number, list of numbers (one per loop), or whatever JSON an evaluation gives."""


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
                fix="choose another folder, or mend its permissions",
            ) from error  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        line = json.dumps({"step": step, **{k: _finite(v) for k, v in metrics.items()}})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class LoggerGroup:
    """Hands metrics on to several loggers, on rank 0 only, and survives their failures.

    A logger that raises is named in one warning; training goes on, and so do the other loggers.
    """

    def __init__(self, loggers: Iterable[MetricsLogger]) -> None:
        self._loggers = list(loggers)
        self._warned: set[int] = set()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call every logger."""
        if not _is_first_rank():
            return
        for each in self._loggers:
            try:
                each.log(step, metrics)
            except Exception as error:  # whatever a logger does must not stop training
                if id(each) not in self._warned:
                    self._warned.add(id(each))
                    logger.warning(
                        "%s failed at step %d and may lose metrics: %s",
                        type(each).__name__, step, error,
                    )  # fmt: skip


def merge_trace(total: LoopTrace, trace: LoopTrace) -> None:
    """Add the norms and expert loads of one micro-batch to those of its step."""
    for name in ("state_norm", "delta_norm"):
        into, rows = getattr(total, name), getattr(trace, name)
        for loop, value_R in rows.items():
            into[loop] = torch.cat([into[loop], value_R]) if loop in into else value_R
    for key, load_E in trace.load.items():
        total.load[key] = total.load[key] + load_E if key in total.load else load_E


def loop_metrics(trace: LoopTrace) -> Metrics:
    """Per loop: mean norm of state and step, and the entropy of the load of each mixture layer."""
    metrics: Metrics = {}
    for name in ("state_norm", "delta_norm"):
        by_loop = getattr(trace, name)
        metrics[name] = [by_loop[loop].mean().item() for loop in sorted(by_loop)]
    for layer in sorted({layer for layer, _ in trace.load}):
        metrics[f"router_entropy/layer{layer}"] = trace.routing_entropy(layer).tolist()
    return metrics


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_first_rank() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
