"""Training progress on standard error: a progress bar in a terminal, else lines of text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from open_mythos.cli.tables import new_console
from open_mythos.distributed import rank
from open_mythos.train.monitoring.metrics import MetricsLogger


@contextmanager
def progress(steps: int, quiet: bool, folder: str | None) -> Iterator[list[MetricsLogger]]:
    """Yield loggers that show a run's progress; none if ``quiet`` or on ranks above 0."""
    if quiet or rank() > 0:
        yield []
        return
    if sys.stderr.isatty():
        with Progress(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(), console=new_console(stderr=True),
        ) as bar:  # fmt: skip
            yield [_Line(bar, steps)]
    else:
        yield [_Lines(steps)]
    print(f"run: {folder}", file=sys.stderr)


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
    """Prints one line per logged step, for log files."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line."""
        words = []
        if "loss" in metrics:
            words += [
                f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.3g}",
                f"grad norm {metrics['grad_norm']:.3g}",
                f"{metrics['tokens_per_second']:,.0f} tokens/s",
            ]  # fmt: skip
        if measured := _measured(metrics):
            words.append(measured)
        if words:
            line = "  ".join([f"step {step:,}/{self._steps:,}", *words])
            print(line, file=sys.stderr, flush=True)


def _measured(metrics: Mapping[str, Any]) -> str:
    """Describe an evaluation's loss at each depth; "" without an evaluation."""
    rows = metrics.get("eval/depths", [])
    shown = (
        (f"{row['depth']} loops " if row["depth"] else "") + f"{row['loss']:.4f}" for row in rows
    )
    return "validation loss: " + ", ".join(shown) if rows else ""
