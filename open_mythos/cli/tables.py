"""Tables that the commands print, and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from open_mythos.errors import printable

if TYPE_CHECKING:
    from open_mythos.evaluation import AnswerRow, DepthRow, ExitReport, ExitRow
    from open_mythos.evaluation.harness import TaskRow
    from open_mythos.train.gate import GateReport

_BAR = 30
"""Width of the histogram's longest bar, in characters."""


def new_console(*, stderr: bool = False, quiet: bool = False, width: int | None = None) -> Console:
    """Create a console for names and numbers: nothing in them is markup or the name of an emoji."""
    return Console(stderr=stderr, quiet=quiet, width=width, markup=False, emoji=False)


def new_table(
    title: str,
    headings: Iterable[str],
    caption: str | None = None,
    *,
    first: Literal["left", "right"] = "left",
) -> Table:
    """Create a table; columns after the first are right-aligned."""
    table = Table(
        title=printable(title), title_justify="left", title_style="bold", caption=caption,
        caption_justify="left", show_header=bool(headings), min_width=min(100, len(title) + 2),
    )  # fmt: skip
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else first, no_wrap=not i)
    return table


def scaled(
    value: float,
    unit: str,
    *,
    base: int = 1000,
    prefixes: tuple[str, ...] = ("", "k", "M", "G", "T", "P"),
) -> str:
    """Format a number with three significant digits and a prefix: "1.41 MFLOP"."""
    power = 0
    while value >= base - 0.5 and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    digits = f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
    return f"{digits} {prefixes[power]}{unit}"


def bar_mark(console: Console) -> str:
    """Return the character of a bar that the console can show."""
    return "█" if console.encoding.startswith("utf") else "#"


def depth_table(rows: list[DepthRow], checkpoint: str, split: str) -> Table:
    """Show the loss at each depth."""
    headings = ("loops", "loss (nats/token)", "bits per byte", "perplexity")
    title = f"{checkpoint}, {split}: {rows[0].tokens:,} tokens"
    table = new_table(title, headings, first="right")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        depth = "-" if row.depth is None else str(row.depth)
        table.add_row(depth, f"{row.loss:.4f}", bits, f"{row.perplexity:.3f}")
    return table


def answer_table(rows: list[AnswerRow], checkpoint: str, questions: str) -> Table:
    """Show the accuracy of generated answers at each depth."""
    headings = ("loops", "correct", "accuracy", "loops per token")
    title = f"{checkpoint}, {questions}: {rows[0].questions:,} questions"
    table = new_table(title, headings, first="right")
    for row in rows:
        depth = "-" if row.depth is None else str(row.depth)
        table.add_row(depth, f"{row.correct:,}", f"{row.accuracy:.1%}", f"{row.mean_loops:.2f}")
    return table


def task_table(rows: list[TaskRow], checkpoint: str) -> Table:
    """Show every metric of every task at each depth."""
    headings = ("task", "documents", "metric", "loops", "value", "standard error")
    table = new_table(f"{checkpoint}: tasks by depth", headings)
    before = None
    for row in rows:
        first = (row.task, f"{row.documents:,}", row.metric)
        depth = "-" if row.depth is None else str(row.depth)
        stderr = "" if row.stderr is None else f"{row.stderr:.4f}"
        table.add_row(*("" if first == before else each for each in first), depth,
                      f"{row.value:.4f}", stderr)  # fmt: skip
        before = first
    return table


def exit_tables(
    report: ExitReport, title: str, rule: str, *, mark: str = "#"
) -> tuple[Table, Table]:
    """Compare adaptive depth with fixed and random depths; show where positions exited.

    The bars of the histogram are of the character ``mark``.
    """
    columns: dict[str, Callable[[ExitRow], str]] = {
        "loops": lambda row: f"{row.mean_loops:.2f}",
        "computed": lambda row: f"{row.computed:.1%}",
        "loss": lambda row: f"{row.loss:.4f}",
        "accuracy": lambda row: f"{row.accuracy:.2%}",
    }
    if report.full.bits_per_byte is not None:
        columns["bits/byte"] = lambda row: f"{row.bits_per_byte:.4f}"
    if report.full.seconds is not None:
        columns["seconds"] = lambda row: f"{row.seconds:.3f}"
    depths = new_table(f"{title}: {report.tokens:,} tokens", ("depth", *columns))
    for row in report.rows:
        name = rule if row is report.adaptive else row.name
        depths.add_row(name, *(shown(row) for shown in columns.values()))
    exits = new_table(
        f"loops per position with {rule}", ("loops", "positions", "share"), first="right"
    )
    exits.add_column()
    most, total = max(report.histogram), sum(report.histogram)
    for loops, count in enumerate(report.histogram, start=1):
        bar = mark * round(_BAR * count / most)
        exits.add_row(str(loops), f"{count:,}", f"{count / total:.1%}", bar)
    return depths, exits


def gate_table(report: GateReport, name: str) -> Table:
    """Show loss and mean depth of a trained gate at several thresholds."""
    losses = report.loss_by_loop
    table = new_table(
        f"gate on {name}: {report.positions:,} positions, target {report.target!r}",
        ("threshold", "mean loops", "loss (nats/token)", "no further gain"),
        f"loss of all positions after one loop {losses[0]:.4f}, after {len(losses)} "
        f"{losses[-1]:.4f}\ngate's cross-entropy {report.curve[0]:.4f} -> {report.curve[-1]:.4f} "
        f"nats, calibration error {report.calibration_error:.3f}",
        first="right",
    )
    for row in report.thresholds:
        table.add_row(
            f"{row.threshold:g}", f"{row.mean_loops:.2f}", f"{row.loss:.4f}", f"{row.finished:.1%}"
        )
    return table
