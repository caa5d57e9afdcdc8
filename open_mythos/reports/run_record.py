"""What a run has left in its folder, as far as it got; nothing has to be complete.

This module loads torch only to read a checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from open_mythos.accounting import Accounting, account
from open_mythos.config import MythosConfig
from open_mythos.errors import DataError, MythosError
from open_mythos.train.config import DepthConfig
from open_mythos.train.monitoring.validated import STATE_KEY, depth_record

METRICS_FILE, CONFIG_FILE = "metrics.jsonl", "run.yaml"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class Event:
    """Something that happened to the run beside its steps."""

    step: int
    kind: str
    """A kind of :data:`open_mythos.train.monitoring.metrics.EVENTS`, or "alarm"."""
    text: str
    """What happened, in a few words."""


@dataclass(frozen=True)
class Checkpoint:
    """The newest one."""

    step: int
    path: Path
    state: dict[str, Any]
    """Content of its ``state.json``; empty if that cannot be read."""
    decays: list[float]
    """The diagonal of A; empty for a dense model, or if the weights cannot be read."""
    problem: str = ""
    """Why something of it is missing."""


@dataclass
class RunRecord:
    """A run as its folder tells it."""

    folder: Path
    config: dict[str, Any] | None
    """Nested fields; None where neither run.yaml nor a checkpoint has them."""
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Logged step -> its metrics, in order."""
    evaluations: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Step -> rows of depth and loss."""
    events: list[Event] = field(default_factory=list)
    alarms: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    broken_lines: int = 0
    """Lines of the metrics that are not JSON, such as one that a killed run left half written."""
    seconds: float = 0.0
    """Time of the logged steps, those that were run again included."""

    @property
    def looped(self) -> bool:
        """Whether the model has loops; taken to be so where nothing tells."""
        return (self.config or {}).get("architecture", "looped") == "looped"

    @property
    def last_step(self) -> int:
        """Steps done, as far as anything tells."""
        logged = max(self.steps, default=0)
        return max(logged, self.checkpoint.step if self.checkpoint else 0)

    @property
    def wanted_steps(self) -> int | None:
        """Steps of the whole run."""
        return self.setting("train", "steps")

    @property
    def depths(self) -> dict[str, Any] | None:
        """The record of validated depths: the checkpoint's, or made from the last evaluation."""
        stored = self.checkpoint.state.get(STATE_KEY) if self.checkpoint else None
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
        """Mean depth of the training; None if it is not known, and for a dense model."""
        section = (self.config or {}).get("depth")
        if not self.looped or not isinstance(section, Mapping):
            return None
        # fields of an older or a newer release do not matter here
        known = {each.name for each in fields(DepthConfig)}
        try:
            return DepthConfig(**{k: v for k, v in section.items() if k in known}).expected
        except TypeError:
            return None

    @property
    def valid_range(self) -> tuple[int, int] | None:
        """The validated depths."""
        low, high = (number((self.depths or {}).get(name)) for name in ("low", "high"))
        return None if low is None or high is None else (int(low), int(high))

    @property
    def loss_limit(self) -> float | None:
        """The loss up to which a depth is good enough."""
        best, more = (number((self.depths or {}).get(k)) for k in ("best_loss", "tolerance"))
        return None if best is None or more is None else best + more

    def setting(self, section: str, name: str) -> Any:
        """A field of the configuration; None if unknown."""
        part = (self.config or {}).get(section)
        return part.get(name) if isinstance(part, Mapping) else None

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) wherever the metric is a finite number."""
        pairs = ((step, number(line.get(name))) for step, line in self.steps.items())
        return [(step, value) for step, value in pairs if value is not None]

    def by_loop(self, name: str) -> dict[int, list[tuple[int, float]]]:
        """Loop (from 1) -> (step, value) of a metric with an entry per loop."""
        found: dict[int, list[tuple[int, float]]] = {}
        for step, line in self.steps.items():
            values = line.get(name)
            for loop, value in enumerate(values if isinstance(values, list) else [], start=1):
                if (x := number(value)) is not None:
                    found.setdefault(loop, []).append((step, x))
        return found

    def latest(self, name: str) -> Any:
        """The last value that was logged under ``name``; None if there is none."""
        return next((line[name] for line in reversed(self.steps.values()) if name in line), None)

    def layers(self, name: str) -> list[int]:
        """Layers for which "name/layerN" was logged."""
        prefix = f"{name}/layer"
        keys = {key for line in self.steps.values() for key in line if key.startswith(prefix)}
        return sorted(int(key[len(prefix) :]) for key in keys if key[len(prefix) :].isdigit())

    def counts(self) -> Accounting | None:
        """Parameters and FLOPs; None if the configuration does not give them."""
        model = (self.config or {}).get("model")
        layers = None
        try:
            if self.checkpoint is not None:
                stored = _json(self.checkpoint.path / "config.json")
                model, layers = stored.get("config", model), stored.get("n_layers")
            if model is None or (not self.looped and layers is None):
                return None
            context = self.setting("train", "seq_len")
            return account(MythosConfig.from_dict(model), context=context, n_layers=layers)
        except (OSError, TypeError, ValueError):
            return None


def read_run(folder: str | Path) -> RunRecord:
    """Read what there is.

    Args:
        folder: Of a run: run.yaml, metrics.jsonl and checkpoints, or some of them.

    Raises:
        DataError: It is no folder, or holds nothing of a run.
    """
    path = Path(folder)
    lines, broken = _lines(path / METRICS_FILE)
    checkpoint = _newest_checkpoint(path)
    config = _config(path, checkpoint)
    if not lines and checkpoint is None:
        raise DataError(
            "no run to report on", where="report", value=str(folder),
            allowed=f"the folder of a run: {METRICS_FILE}, {CHECKPOINTS}, {CONFIG_FILE}",
            fix="name the folder that train.out_dir named",
        )  # fmt: skip
    record = RunRecord(path, config, checkpoint=checkpoint, broken_lines=broken)
    _follow(record, lines)
    return record


def number(value: Any) -> float | None:
    """``value`` as a finite float; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _follow(record: RunRecord, lines: list[dict[str, Any]]) -> None:
    """Go through the lines in order; where the run went back, what it left behind is dropped."""
    before = tokens_before = 0
    for line in lines:
        step = line["step"]
        if step < before:
            told = any(e.kind in ("rewound", "resumed") and e.step >= step for e in record.events)
            # an event is told of the step it happened after, which stays
            _forget(record, step + 1 if "event" in line else step)
            tokens_before = _tokens(record)
            if not told and "event" not in line:
                record.events.append(Event(step, "resumed", f"went on from before step {step}"))
        if isinstance(line.get("event"), dict):
            facts = dict(line["event"])
            kind, to = str(facts.pop("kind", "")), facts.get("to")
            record.events.append(Event(step, kind, _told(facts)))
            if kind == "rewound" and isinstance(to, int):
                _forget(record, to + 1)
                step, tokens_before = to, _tokens(record)
        alarms = line.get("alarms")
        for alarm in alarms if isinstance(alarms, list) else []:
            if isinstance(alarm, dict):
                record.alarms.append(alarm | {"step": step})
                record.events.append(Event(step, "alarm", str(alarm.get("name", ""))))
        rows = line.get("eval/depths")
        if isinstance(rows, list):
            record.evaluations[step] = [row for row in rows if isinstance(row, dict)]
        metrics = {name: value for name, value in line.items() if name not in ("step", "event")}
        if line.get("skipped") == 1:
            record.events.append(Event(step, "skipped", "loss or gradient was not finite"))
        if metrics:
            record.steps.setdefault(step, {}).update(metrics)
        rate, tokens = number(line.get("tokens_per_second")), number(line.get("tokens"))
        if rate and tokens is not None:
            record.seconds += max(0.0, tokens - tokens_before) / rate
            tokens_before = int(tokens)
        elif tokens is not None:
            tokens_before = int(tokens)
        before = step
    record.steps = dict(sorted(record.steps.items()))


def _tokens(record: RunRecord) -> int:
    """Tokens learnt from at the last step that is kept."""
    return int(number(record.latest("tokens")) or 0)


def _told(facts: Mapping[str, Any]) -> str:
    """The facts of an event in words."""
    parts = []
    for name, value in facts.items():
        if name == "to":
            parts.append(f"to step {value}")
        elif isinstance(value, str):
            parts.append(value)
        else:
            parts.append(f"{name.replace('_', ' ')}: {value}")
    return ", ".join(parts)


def _forget(record: RunRecord, step: int) -> None:
    """Drop what was measured from ``step`` on: it is about to be done again."""
    record.steps = {at: line for at, line in record.steps.items() if at < step}
    record.evaluations = {at: rows for at, rows in record.evaluations.items() if at < step}


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that are JSON objects with a step, and how many are not."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], 0
    found, broken = [], 0
    for line in text.splitlines():
        try:
            values = json.loads(line)
            values["step"] = int(values["step"])
            found.append(values)
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            broken += bool(line.strip())
    return found, broken


def _config(folder: Path, checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        values = None
    if not isinstance(values, dict) and checkpoint is not None:
        values = checkpoint.state.get("config")
    return values if isinstance(values, dict) else None


def _newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The one with the highest step; damaged parts of it are left out and named."""
    found = list(_numbered(folder / CHECKPOINTS))
    if not found:
        return None
    step, path = max(found)
    problem, state, decays = "", dict[str, Any](), list[float]()
    try:
        state = _json(path / "state.json")
        decays = _decays(path)
    except (OSError, ValueError, MythosError) as error:
        problem = str(error).splitlines()[0]
    return Checkpoint(step, path, state, decays, problem)


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step_*"):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and path.is_dir():
            yield int(digits), path


def _decays(path: Path) -> list[float]:
    """The diagonal of A, read without the rest of the model."""
    import torch

    from open_mythos.hub.sharded_tensors import read_tensors, stored_shapes
    from open_mythos.model.layers.injection import LTIInjection

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


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}
