"""Where the numbers of a run go: a one-method protocol, a JSON-lines file, what loops report."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.distributed import rank
from open_mythos.errors import EnvironmentError_, InternalError
from open_mythos.model.trace import LoopTrace, load_entropy

logger = logging.getLogger(__name__)

Metrics = dict[str, Any]
"""Name -> number, list of numbers (one per loop), or whatever JSON an evaluation gives."""


PER_ROW = ("state_norm", "delta_norm", "correlation")
"""What a trace records of every row."""
EVENTS = ("resumed", "skipped", "rewound", "preempted", "stopped")
"""What can happen to a run beside steps: continued from a checkpoint, a step left out, gone back to
an older checkpoint, told to stop, given up."""


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
        line = json.dumps({"step": step, **{k: finite(v) for k, v in metrics.items()}})
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
        if rank() != 0:
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

    def close(self) -> None:
        """Let every logger that has a ``close`` write what it still holds."""
        for each in self._loggers:
            try:
                getattr(each, "close", _nothing)()
            except Exception as error:
                logger.warning("%s could not be closed: %s", type(each).__name__, error)


def event(kind: str, **facts: Any) -> Metrics:
    """A line that tells what happened instead of what was measured: ``{"event": {...}}``.

    Args:
        kind: One of :data:`EVENTS`.
        facts: Numbers and texts about it, JSON-ready.

    Raises:
        InternalError: The kind is unknown.
    """
    if kind not in EVENTS:
        raise InternalError("no such event", where="event", value=kind, allowed=", ".join(EVENTS))
    return {"event": {"kind": kind, **facts}}


def depth_metrics(depths_B: Tensor | Sequence[int]) -> Metrics:
    """Mean and largest of the depths that ran, and how many sequences ran 1, 2, ... loops."""
    depths = torch.as_tensor(depths_B)
    return {
        "mean_depth": depths.double().mean().item(),
        "max_depth": int(depths.max()),
        "depth_histogram": torch.bincount(depths.long().flatten())[1:].tolist(),
    }


def exit_histogram(exits: Tensor, max_loops: int) -> list[int]:
    """How many positions left after 1, 2, ... ``max_loops`` loops, from ``LoopTrace.exits``."""
    return torch.bincount(exits.flatten().cpu(), minlength=max_loops + 1)[1:].tolist()


def merge_trace(total: LoopTrace, trace: LoopTrace) -> None:
    """Add what one micro-batch recorded per row, and its expert loads, to those of its step."""
    for name in PER_ROW:
        into, rows = getattr(total, name), getattr(trace, name)
        for loop, value_R in rows.items():
            into[loop] = torch.cat([into[loop], value_R]) if loop in into else value_R
    for key, load_E in trace.load.items():
        total.load[key] = total.load[key] + load_E if key in total.load else load_E


@dataclass(frozen=True)
class LoopFigures:
    """What the loops of a step did; made by :meth:`of`."""

    rows: list[int]
    """(L,) sequences that ran each loop."""
    means: dict[str, list[float]]
    """"state_norm", "delta_norm" and, where it was measured, "correlation" -> (L,) mean over the
    sequences that ran each loop."""
    load: dict[int, Tensor]
    """Mixture layer -> (L, E) tokens that chose each expert at each loop; float64, on the CPU."""

    @classmethod
    def of(cls, trace: LoopTrace) -> LoopFigures:
        """The figures of a step.

        Args:
            trace: Of all its micro-batches and, under data parallelism, of all ranks: see
                :func:`merge_trace`.
        """
        names = [name for name in PER_ROW if getattr(trace, name)]
        loops = range(trace.n_loops)
        means: dict[str, list[float]] = {}
        if names:
            # one tensor, so that an accelerator is waited for once
            found = torch.stack([getattr(trace, name)[t].mean() for name in names for t in loops])
            rows = found.view(len(names), -1).tolist()
            means = dict(zip(names, rows, strict=True))
        return cls(
            rows=[len(trace.state_norm[t]) for t in loops],
            means=means,
            load={
                layer: trace.load_by_loop(layer).double().cpu()
                for layer in sorted({layer for layer, _ in trace.load})
            },
        )

    def expert_share(self, layer: int) -> list[float]:
        """(E,) share of all choices that each expert got, over all loops."""
        load_E = self.load[layer].sum(0)
        return (load_E / load_E.sum().clamp_min(1)).tolist()

    def metrics(self, detail: bool = False) -> Metrics:
        """Everything by its logged name, a list with an entry per loop each.

        Args:
            detail: Also the share of every expert at every loop, L E numbers per layer.
        """
        metrics: Metrics = {_LOGGED.get(name, name): each for name, each in self.means.items()}
        for layer, load_LE in self.load.items():
            share_LE = load_LE / load_LE.sum(-1, keepdim=True).clamp_min(1)
            metrics[f"router_entropy/layer{layer}"] = load_entropy(load_LE).tolist()
            metrics[f"router_min/layer{layer}"] = share_LE.amin(-1).tolist()
            metrics[f"router_max/layer{layer}"] = share_LE.amax(-1).tolist()
            if detail:
                rows = [[round(share, 4) for share in row] for row in share_LE.tolist()]
                metrics[f"router_share/layer{layer}"] = rows
        return metrics


def loop_metrics(trace: LoopTrace, detail: bool = False) -> Metrics:
    """The metrics of a step's loops; see :meth:`LoopFigures.metrics`."""
    return LoopFigures.of(trace).metrics(detail)


_LOGGED = {"correlation": "token_correlation"}


def finite(value: Any) -> Any:
    """``value`` with None for every number that is not finite: what JSON can hold."""
    if isinstance(value, list):
        return [finite(each) for each in value]
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nothing() -> None:
    """What a logger without ``close`` does."""
