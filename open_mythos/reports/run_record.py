"""Read the folder of a training run, which may be incomplete."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_mythos.accounting import Accounting, account
from open_mythos.checks import is_number
from open_mythos.config import MythosConfig
from open_mythos.errors import DataError, MythosError
from open_mythos.files import read_object, read_text
from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes
from open_mythos.model.layers.injection import LTIInjection
from open_mythos.run_folder import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    METRICS_FILE,
    STATE_FILE,
    VALIDATED_DEPTHS,
    read_config,
    step_folders,
)  # fmt: skip
from open_mythos.train.config import DepthConfig
from open_mythos.train.monitoring.validated import depth_record

MAX_METRICS_BYTES = 1 << 28
Series = list[tuple[int, float]]
"""(step, value); NaN for logged values that are not finite."""


class Event(NamedTuple):
    """An event of the run."""

    step: int
    kind: str
    """A kind of :data:`open_mythos.train.monitoring.metrics.EVENTS`, or "alarm"."""
    text: str


class Alarm(NamedTuple):
    """An alarm of the watchdog."""

    step: int
    name: str
    what: str
    fix: str


class Checkpoint(NamedTuple):
    """The newest checkpoint."""

    step: int
    path: Path
    state: dict[str, Any]
    """Content of ``state.json``; empty if unreadable."""
    decays: list[float]
    """Diagonal of A, ascending; empty without A or if the weights are unreadable."""
    problem: str
    """Why a part is missing, if one is."""


@dataclass
class RunRecord:
    """The content of a run's folder."""

    folder: Path
    config: dict[str, Any] | None
    """Nested config fields; None if neither run.yaml nor a checkpoint has them."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Logged step -> metrics, in order."""
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Step -> rows of depth and loss."""
    events: list[Event] = field(default_factory=list)
    alarms: list[Alarm] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    broken_lines: int = 0
    """Metrics lines that are not JSON, such as one cut off by a kill."""
    seconds: float = 0.0
    """Time of the logged steps, including repeated ones."""

    @property
    def looped(self) -> bool:
        """Whether the model is looped; True if unknown."""
        return (self.config or {}).get("architecture", "looped") == "looped"

    @property
    def last_step(self) -> int:
        """Last step in the metrics or the checkpoint."""
        return max([*self.steps, self.checkpoint.step if self.checkpoint else 0])

    @property
    def depths(self) -> dict[str, Any] | None:
        """Record of validated depths: stored, logged, or computed from the last evaluation."""
        stored = self.checkpoint.state.get(VALIDATED_DEPTHS) if self.checkpoint else None
        for found in (stored, self.latest("eval/validated")):
            if isinstance(found, dict) and isinstance(found.get("rows"), list):
                return found
        mean = self.mean_depth
        if not self.evaluations or mean is None:
            return None
        rows = self.evaluations[max(self.evaluations)]
        return depth_record(rows, mean) if len(rows) > 1 else None

    @property
    def mean_depth(self) -> float | None:
        """Mean training depth; None if unknown or for a dense model."""
        section = (self.config or {}).get("depth")
        if not self.looped or not isinstance(section, Mapping):
            return None
        # ignore fields of other releases
        known = {each.name for each in fields(DepthConfig)}
        try:
            depth = DepthConfig(**{k: v for k, v in section.items() if k in known})
            depth.validate()
            return depth.expected
        except (TypeError, ValueError):
            return None

    @property
    def valid_range(self) -> tuple[int, int] | None:
        """Range of validated depths."""
        low, high = (number((self.depths or {}).get(name)) for name in ("low", "high"))
        return None if low is None or high is None else (int(low), int(high))

    @property
    def loss_limit(self) -> float | None:
        """Maximum loss of a validated depth."""
        best, more = (number((self.depths or {}).get(k)) for k in ("best_loss", "tolerance"))
        return None if best is None or more is None else best + more

    def setting(self, section: str, name: str) -> Any:
        """Return a config field; None if unknown."""
        part = (self.config or {}).get(section)
        return part.get(name) if isinstance(part, Mapping) else None

    def curve(self, name: str) -> Series:
        """Return a metric over the steps that logged it."""
        return [(at, _or_nan(line[name])) for at, line in self.steps.items() if name in line]

    def values(self, name: str) -> Series:
        """Return the finite values of :meth:`curve`."""
        return [(step, value) for step, value in self.curve(name) if not math.isnan(value)]

    def by_loop(self, name: str) -> dict[int, Series]:
        """Return loop (from 1) -> values of a metric with one entry per loop."""
        found: dict[int, Series] = {}
        for step, line in self.steps.items():
            values = line.get(name)
            for loop, value in enumerate(values if isinstance(values, list) else [], start=1):
                found.setdefault(loop, []).append((step, _or_nan(value)))
        return found

    def latest(self, name: str) -> Any:
        """Return the last value logged under ``name``, or None."""
        return next((line[name] for line in reversed(self.steps.values()) if name in line), None)

    def layers(self, name: str) -> list[int]:
        """Return the layers N for which "name/layerN" was logged."""
        keys = {key for line in self.steps.values() for key in line}
        found = (re.fullmatch(rf"{re.escape(name)}/layer([0-9]+)", key) for key in keys)
        return sorted(int(match[1]) for match in found if match)

    def counts(self) -> Accounting | None:
        """Count parameters and FLOPs; None if the configuration is unknown."""
        model = (self.config or {}).get("model")
        layers = None
        try:
            if self.checkpoint is not None:
                stored = read_object(self.checkpoint.path / "config.json", "damaged")
                model, layers = stored.get("config", model), stored.get("n_layers")
            if model is None or (not self.looped and layers is None):
                return None
            context = self.setting("train", "seq_len")
            return account(MythosConfig.from_dict(model), context=context, n_layers=layers)
        except (TypeError, ValueError):
            return None


def read_run(folder: str | Path) -> RunRecord:
    """Read a folder with some of run.yaml, metrics.jsonl and checkpoints.

    Raises:
        DataError: There are neither metrics nor a checkpoint.
    """
    path = Path(folder)
    lines, broken = _lines(path / METRICS_FILE)
    checkpoint = _newest_checkpoint(path)
    try:
        config: Any = read_config(path / CONFIG_FILE)
    except (DataError, RecursionError):
        config = checkpoint.state.get("config") if checkpoint else None
    if not lines and checkpoint is None:
        raise DataError(
            "no run to report on", where="report", value=str(folder),
            allowed=f"the folder of a run: {METRICS_FILE}, {CHECKPOINTS_FOLDER}, {CONFIG_FILE}",
            fix="pass the run's train.out_dir",
        )  # fmt: skip
    known = config if isinstance(config, dict) else None
    record = RunRecord(path, known, checkpoint=checkpoint, broken_lines=broken)
    _follow(record, lines)
    return record


def number(value: Any) -> float | None:
    """Return ``value`` as a float; None if it is not a finite number."""
    return float(value) if is_number(value) else None


def _or_nan(value: Any) -> float:
    return float(value) if is_number(value) else math.nan


def _follow(record: RunRecord, lines: list[dict[str, Any]]) -> None:
    """Replay the lines in order; on a rollback, drop later measurements."""
    before, tokens_before = 0, 0.0
    for line in lines:
        step, keep = line["step"], None
        late = isinstance(line.get("event"), dict) and line["event"].get("kind") == "skipped"
        if step < before and not late:  # a skipped step is noticed one step late
            # an event belongs to the step before it, which is kept
            keep = step if "event" in line else step - 1
            known = any(e.kind in ("rewound", "resumed") and e.step >= step for e in record.events)
            if not known and "event" not in line:
                record.events.append(Event(step, "resumed", f"continued before step {step}"))
        if isinstance(line.get("event"), dict):
            facts = dict(line["event"])
            kind, to = str(facts.pop("kind", "")), facts.get("to")
            text = ", ".join(f"{name}: {value}" for name, value in facts.items())
            record.events.append(Event(step, kind, text))
            if kind == "rewound" and isinstance(to, int):
                step = keep = to
        if keep is not None:
            for kept in (record.steps, record.evaluations):
                for later in [at for at in kept if at > keep]:
                    del kept[later]
            tokens_before = number(record.latest("tokens")) or 0.0
        before = before if late else step
        _note(record, step, line)
        tokens, rate = number(line.get("tokens")), number(line.get("tokens_per_second"))
        if tokens is not None:
            record.seconds += max(0.0, tokens - tokens_before) / rate if rate else 0.0
            tokens_before = tokens
    record.steps = dict(sorted(record.steps.items()))


def _note(record: RunRecord, step: int, line: dict[str, Any]) -> None:
    """Add the alarms, evaluation and metrics of one line."""
    alarms, rows = line.get("alarms"), line.get("eval/depths")
    for alarm in alarms if isinstance(alarms, list) else []:
        if isinstance(alarm, dict):
            name, what, fix = (str(alarm.get(key, "")) for key in ("name", "what", "fix"))
            record.alarms.append(Alarm(step, name, what, fix))
            record.events.append(Event(step, "alarm", name))
    if isinstance(rows, list):
        record.evaluations[step] = [row for row in rows if isinstance(row, dict)]
    noted = any(event.kind == "skipped" and event.step == step for event in record.events)
    if line.get("skipped") == 1 and not noted:
        record.events.append(Event(step, "skipped", "loss or gradient was not finite"))
    metrics = {name: value for name, value in line.items() if name not in ("step", "event")}
    if metrics:
        record.steps.setdefault(step, {}).update(metrics)


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that are JSON objects with a step, and the number of other lines."""
    try:
        text = read_text(path, MAX_METRICS_BYTES, errors="replace")
    except OSError:
        return [], 0
    except ValueError as error:
        raise DataError(
            "the metrics are too long", where=str(path), value=str(error),
            allowed=f"{MAX_METRICS_BYTES:,} bytes", fix="log less often, or report on a part of it",
        ) from error  # fmt: skip
    found, broken = [], 0
    for line in text.split("\n"):  # other ends of lines are text in JSON
        try:
            # integers beyond the float range would break the arithmetic
            values = json.loads(line, parse_int=lambda x: int(x) if len(x) < 20 else float(x))
            values["step"] = int(values["step"])
            found.append(values)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            broken += bool(line.strip())
    return found, broken


def _newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint; report damaged parts in ``problem``."""
    found = step_folders(folder / CHECKPOINTS_FOLDER)
    if not found:
        return None
    step, path = found[-1]
    problem, state, decays = "", dict[str, Any](), list[float]()
    try:
        state = read_object(path / STATE_FILE, "the checkpoint's state cannot be read")
        decays = _decays(path)
    except (OSError, ValueError, MythosError) as error:
        problem = str(error).splitlines()[0]
    return Checkpoint(step, path, state, decays, problem)


def _decays(path: Path) -> list[float]:
    """Read only the diagonal of A."""
    shapes = stored_shapes(path)
    names = [f"model/recurrent.injection.{name}" for name in ("log_A", "dt_bias")]
    if not set(names) <= shapes.keys():
        return []
    log_A, dt_bias = (torch.empty(shapes[name]) for name in names)
    read_tensors(path, dict(zip(names, (log_A, dt_bias), strict=True)))
    injection = LTIInjection(len(log_A), matrix="diagonal")
    with torch.no_grad():
        injection.log_A.copy_(log_A)
        injection.dt_bias.copy_(dt_bias)
        return sorted(injection.coefficients()[0].tolist())
