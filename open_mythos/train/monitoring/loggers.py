"""Metric loggers beside ``metrics.jsonl``: TensorBoard, Weights & Biases, trackio.

Each needs a package of its own, imported only when the logger is requested.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from open_mythos.checks import is_scalar, pick
from open_mythos.distributed import rank
from open_mythos.errors import EnvironmentError_
from open_mythos.files import read_text, write_text
from open_mythos.train.monitoring.metrics import MetricsLogger

IDENTITY_FILE = "loggers.json"
"""File in the run's folder with its id for the services, under which a resumed run continues."""


@dataclass(frozen=True)
class LoggedRun:
    """What a logger needs to know about the run."""

    folder: Path
    """The run's folder."""
    project: str
    """Project name in the services."""
    config: Mapping[str, Any]
    """Configuration, nested, JSON-ready."""

    def identity(self) -> str:
        """Return a unique name for this run; created once and kept in its folder.

        Raises:
            EnvironmentError_: The file cannot be read or written.
        """
        path = self.folder / IDENTITY_FILE
        try:
            if path.exists():
                return str(json.loads(read_text(path))["id"])
            self.folder.mkdir(parents=True, exist_ok=True)
            name = f"{self.folder.resolve().name}-{uuid.uuid4().hex[:8]}"
            write_text(path, json.dumps({"id": name}) + "\n")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EnvironmentError_(
                "the run's id for its loggers cannot be stored", where=str(path),
                value=str(error), allowed='{"id": "..."} in a writable folder',
                fix="fix the folder's permissions, or remove the file",
            ) from error  # fmt: skip
        return name


class TensorBoardLogger:
    """Writes events for TensorBoard into ``tensorboard`` in the run's folder.

    Show them with ``tensorboard --logdir runs``. After a resume or a rollback the later of two
    values at one step is shown.
    """

    def __init__(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = partial(SummaryWriter, str(run.folder / "tensorboard"))
        self._writer: Any = None
        self._last = 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write every number as a scalar and every alarm as text."""
        if self._writer is None or step < self._last:
            # hide events from this step on that a rolled back or killed run has written
            self.close()
            self._writer = self._open(purge_step=step)
        self._last = step
        for name, value in flat_metrics(metrics).items():
            self._writer.add_scalar(name, value, step)
        for alarm in metrics.get("alarms", ()):
            self._writer.add_text(
                f"alarm/{alarm['name']}", f"{alarm['what']}: {alarm['fix']}", step
            )
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbLogger:
    """Sends metrics to Weights & Biases, with "step" as the x-axis.

    Log in with ``wandb login``, or set WANDB_MODE=offline.
    """

    def __init__(self, run: LoggedRun) -> None:
        name = run.identity()
        self._run: Any = import_module("wandb").init(
            project=run.project, id=name, name=name, resume="allow", dir=str(run.folder),
            config=dict(run.config),
        )  # fmt: skip
        # wandb's own step counter only increases, and a run may roll back
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send every number; an alarm also raises an alert."""
        self._run.log({"step": step, **flat_metrics(metrics)})
        for alarm in metrics.get("alarms", ()):
            self._run.alert(title=alarm["name"], text=f"step {step}: {alarm['what']}")

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


class TrackioLogger:
    """Stores metrics locally for trackio; ``trackio show`` displays them."""

    def __init__(self, run: LoggedRun) -> None:
        self._run: Any = import_module("trackio").init(
            project=run.project, name=run.identity(), resume="allow", config=dict(run.config),
            embed=False,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Store every number at its step."""
        self._run.log(flat_metrics(metrics), step=step)

    def close(self) -> None:
        """Wait until everything is stored."""
        self._run.finish()


LOGGERS: dict[str, Callable[[LoggedRun], MetricsLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}
"""Name for ``watch.loggers``, which is also the package on PyPI -> logger."""


def open_loggers(names: Sequence[str], run: LoggedRun) -> list[MetricsLogger]:
    """Open the loggers ``names``; all processes check their packages, only rank 0 opens them.

    Raises:
        ConfigError: A name is unknown.
        EnvironmentError_: A package is missing, or its service cannot be opened.
    """
    for name in names:
        pick(LOGGERS, name, "watch.loggers", what="logger")
        try:
            import_module(name)
        except ImportError as error:
            raise EnvironmentError_(
                f'the logger "{name}" needs a package that is not installed',
                where="watch.loggers", value=str(error), allowed=f"the package {name}",
                fix=f"pip install {name}",
            ) from error  # fmt: skip
    opened = []
    for name in names if rank() == 0 else ():
        try:
            opened.append(LOGGERS[name](run))
        except EnvironmentError_:
            raise
        except Exception as error:  # each package has exceptions of its own
            raise EnvironmentError_(
                f'the logger "{name}" does not start', where="watch.loggers", value=str(error),
                allowed="a logger that starts",
                fix=f"fix that (for wandb: wandb login, or WANDB_MODE=offline), or remove {name}",
            ) from error  # fmt: skip
    return opened


def flat_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Flatten metrics to one number per name.

    A list with an entry per loop becomes "name/loop01", "name/loop02", ...; rows of an evaluation
    become "name/loss/depth04"; an alarm becomes 1 under "alarm/NAME". Histograms and tables of
    shares are omitted.
    """
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        if not isinstance(value, list):
            flat[name] = value
        elif name == "alarms":
            flat |= {f"alarm/{alarm['name']}": 1.0 for alarm in value}
        elif not name.endswith("_histogram"):
            for loop, each in enumerate(value, start=1):
                if isinstance(each, dict) and "depth" in each:
                    prefix, depth = name.removesuffix("/depths"), each["depth"]
                    end = "" if depth is None else f"/depth{depth:02d}"
                    flat |= {f"{prefix}/{key}{end}": x for key, x in each.items() if key != "depth"}
                else:
                    flat[f"{name}/loop{loop:02d}"] = each
    return {name: value for name, value in flat.items() if is_scalar(value)}
