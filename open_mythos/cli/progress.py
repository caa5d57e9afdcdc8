"""Progress of a training run on standard error: a live line at a terminal, else lines of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from open_mythos.distributed import rank
from open_mythos.train.monitoring.metrics import MetricsLogger


@contextmanager
def progress(steps: int, quiet: bool, folder: str | None) -> Iterator[list[MetricsLogger]]:
    """Yield the loggers that show a run; none if ``quiet`` or in any process but the first."""
    if quiet or rank() > 0:
        yield []
        return
    if sys.stderr.isatty():
        with _bar() as bar:
            yield [_Line(bar, steps)]
    else:
        yield [_Lines(steps)]
    print(f"run: {folder}", file=sys.stderr)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[numbers]}"), TimeRemainingColumn(), console=Console(stderr=True),
    )  # fmt: skip


class _Line:
    """Updates a progress bar."""

    def __init__(self, bar: Progress, steps: int) -> None:
        self._bar, self._task = bar, bar.add_task("training", total=steps, numbers="")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the loss and throughput; print evaluations above the bar."""
        if measured := _measured(metrics):
            self._bar.console.print(f"step {step}: {measured}")
        if "loss" in metrics:
            numbers = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
            self._bar.update(self._task, completed=step, numbers=numbers)


class _Lines:
    """Prints a line for each logged step, for files and the logs of clusters."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line."""
        words = [f"step {step:,}/{self._steps:,}"]
        if "loss" in metrics:
            words += [
                f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.3g}",
                f"gradient {metrics['grad_norm']:.3g}",
                f"{metrics['tokens_per_second']:,.0f} tokens/s",
            ]  # fmt: skip
        if measured := _measured(metrics):
            words.append(measured)
        if len(words) > 1:
            print("  ".join(words), file=sys.stderr, flush=True)


def _measured(metrics: Mapping[str, Any]) -> str:
    """Say an evaluation's loss at each depth; "" where there is none."""
    rows = metrics.get("eval/depths", [])
    shown = (
        (f"{row['depth']} loops " if row["depth"] else "") + f"{row['loss']:.4f}" for row in rows
    )
    return "validation loss: " + ", ".join(shown) if rows else ""
