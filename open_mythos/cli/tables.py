"""Tables that ``evaluate`` and ``train gate`` print."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from open_mythos.evaluation import DepthRow, ExitReport, ExitRow
from open_mythos.train.gate import GateReport

_BAR = 30
"""Width of the histogram's longest bar."""


def depth_table(rows: list[DepthRow], checkpoint: str, split: str) -> Table:
    """Show the loss at each depth."""
    table = Table(title=f"{checkpoint}, {split}: {rows[0].tokens:,} tokens", title_justify="left")
    for heading in ("loops", "loss (nats/token)", "bits per byte", "perplexity"):
        table.add_column(heading, justify="right")
    for row in rows:
        bits = "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        depth = "-" if row.depth is None else str(row.depth)
        table.add_row(depth, f"{row.loss:.4f}", bits, f"{row.perplexity:.3f}")
    return table


def exit_tables(report: ExitReport, title: str, rule: str) -> tuple[Table, Table]:
    """Show adaptive depth beside fixed and random depths, and where positions exited."""
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
    depths = Table(title=f"{title}: {report.tokens:,} tokens", title_justify="left")
    depths.add_column("depth", no_wrap=True)
    for heading in columns:
        depths.add_column(heading, justify="right")
    for row in report.rows:
        name = rule if row is report.adaptive else row.name
        depths.add_row(name, *(shown(row) for shown in columns.values()))
    left = Table(title=f"loops run under {rule}", title_justify="left")
    for heading in ("loops", "positions", "share"):
        left.add_column(heading, justify="right")
    left.add_column("")
    most, total = max(report.histogram), sum(report.histogram)
    for loops, count in enumerate(report.histogram, start=1):
        bar = "█" * round(_BAR * count / most)
        left.add_row(str(loops), f"{count:,}", f"{count / total:.1%}", bar)
    return depths, left


def gate_table(report: GateReport, name: str) -> Table:
    """Show what a trained gate gives at several thresholds."""
    losses = report.loss_by_loop
    table = Table(
        title=f"gate on {name}: {report.positions:,} positions, target {report.target!r}",
        caption=f"everybody after one loop {losses[0]:.4f}, after {len(losses)} {losses[-1]:.4f}\n"
        f"gate's cross-entropy {report.curve[0]:.4f} -> {report.curve[-1]:.4f} nats, "
        f"calibration error {report.calibration_error:.3f}",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("threshold", "mean loops", "loss (nats/token)", "nothing left to gain"):
        table.add_column(heading, justify="right")
    for row in report.thresholds:
        table.add_row(
            f"{row.threshold:g}", f"{row.mean_loops:.2f}", f"{row.loss:.4f}", f"{row.finished:.1%}"
        )
    return table
