"""``python -m benchmarks [--only NAME] [--device cuda] [--quick] [--out DIR]``: see ``--help``."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# PyTorch's profiler otherwise reports every start on the terminal; it reads this when it is loaded
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import caches, machine, report, roofline, store, suites
from benchmarks.clock import OutOfTime, deadline, device, on, release, threads
from benchmarks.measure import Absent, GateError
from benchmarks.models import FULL, GPU, QUICK, Scale
from open_mythos.errors import MythosError

BUDGET = {"cpu": float("inf"), "cuda": 480.0}
"""Time limit of all suites together, in seconds."""


@dataclass
class Outcome:
    """Result of one suite."""

    rows: list[Any] = field(default_factory=list)
    stopped: str = ""
    """Reason for an early end, or ""."""
    failed: bool = False
    """Whether an error ended it, rather than the deadline."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suites; print and save the results of each as it ends.

    Returns:
        Exit code 1 if a suite failed, by its gate or an error; a missed goal is no failure.
    """
    options = _parse(arguments)
    try:
        with on(options.device) as chosen:
            budget = BUDGET.get(chosen.type, float("inf"))
            return _run(options, chosen, options.budget or budget)
    except MythosError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run(options: argparse.Namespace, chosen: torch.device, budget: float) -> int:
    begin = time.monotonic()
    console = Console(width=None if Console().is_terminal else 150)
    if chosen.type == "cpu" and not (options.only or options.quick or options.budget):
        return _run_in_processes(options, console)
    scale = QUICK if options.quick else GPU if chosen.type == "cuda" else FULL
    description = machine.describe()
    console.print(", ".join(f"{key} {value}" for key, value in description.items() if value))
    if (warning := machine.warning(description)) is not None:
        console.print(f"[bold]{warning}[/bold]")
    if options.quick:
        console.print("quick: a smoke test; the numbers are meaningless")
    out = options.out
    if out is None and not options.quick:
        out = store.RESULTS / machine.slug(description)
    allowed = suites.of_device(chosen.type)
    if options.only:
        allowed = {options.only: float("inf")}
    contents, failed = {}, False
    for suite, end in _deadlines(allowed, begin, budget).items():
        load, start = machine.OtherLoad(), time.monotonic()
        outcome = _measure(suite, scale, end, console)
        failed |= outcome.failed
        content = {
            "suite": suite, "title": suites.suite(suite).title(scale), "machine": description,
            "seconds": round(time.monotonic() - start, 1), "others": load.share(),
            "complete": not outcome.stopped, "stopped": outcome.stopped,
            "scale": asdict(scale), "limits": _limits() if outcome.rows else None,
            "rows": [store.as_json(row) for row in outcome.rows],
        }  # fmt: skip
        _show(suite, content, console)
        # keep earlier results if nothing was measured
        if out is not None and outcome.rows and not outcome.failed:
            store.save(out, suite, content)
        contents[suite] = content
    _summary(contents, console)
    taken = time.monotonic() - begin
    console.print(f"{taken / 60:.1f} minutes" if taken > 90 else f"{taken:.0f} seconds")
    return int(failed)


def _run_in_processes(options: argparse.Namespace, console: Console) -> int:
    """Run every suite in its own process: in a shared one, later suites were slower."""
    out = options.out or store.RESULTS / machine.slug(machine.describe())
    failed = False
    for suite in suites.of_device("cpu"):
        command = [sys.executable, "-m", "benchmarks", "--only", suite, "--out", str(out)]
        failed |= subprocess.run(command, check=False).returncode != 0
    _summary(store.load(out), console)
    return int(failed)


def _deadlines(allowed: Mapping[str, float], begin: float, budget: float) -> dict[str, float]:
    """Return the deadline of each suite; unused time goes to later suites."""
    total, passed, found = sum(allowed.values()), 0.0, {}
    for suite, seconds in allowed.items():
        passed += seconds
        share = passed / total if total < float("inf") else 1.0
        found[suite] = begin + budget * share
    return found


def _measure(suite: str, scale: Scale, end: float, console: Console) -> Outcome:
    """Collect the rows of a suite until it ends, fails or reaches its deadline."""
    found = Outcome()
    try:
        with deadline(end):
            for row in suites.suite(suite).rows(scale):
                found.rows.append(row)
                if not isinstance(row, caches.HeldRow):
                    figure = report.figure(store.as_json(row))
                    console.print(f"[dim]{suite}, {row.name}, {row.dtype}: {figure}[/dim]")
    except OutOfTime:
        found.stopped = "out of time" if found.rows else "not run: out of time"
    except GateError as error:
        found.stopped, found.failed = f"wrong: {error}", True
    except torch.OutOfMemoryError as error:
        found.stopped = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        console.print(traceback.format_exc(), markup=False, soft_wrap=True)
        found.stopped, found.failed = f"failed: {type(error).__name__}", True
    release()  # free device memory for the next suite
    return found


def _limits() -> list[dict[str, Any]]:
    """Return the measured peaks, on one thread and on all; cached."""
    found = []
    for n in sorted({1, torch.get_num_threads()} if device().type == "cpu" else {1}):
        with threads(n) if device().type == "cpu" else contextlib.nullcontext():
            found.append(roofline.describe(device()))
    return found


def _show(suite: str, content: Mapping[str, Any], console: Console) -> None:
    """Print a suite's results as a table."""
    rows = content["rows"]
    if rows and suite == "cache":
        columns, lines = report.cache_lines(rows)
    else:
        columns, lines = report.lines(rows)
    table = Table(title=f"{suite}: {content['title']}")
    for name, numeric in columns:
        table.add_column(name, justify="right" if numeric else "left")
    for line in lines:
        table.add_row(*line)
    console.print(table)
    for note in report.notes(content):
        console.print(note)


def _summary(contents: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print the goals and how many were missed."""
    goals = report.goals(contents)
    if goals:
        table = Table(title="goals, row by row")
        for name in ("", "goal", "measured", "", "explanation"):
            table.add_column(name)
        for goal in goals:
            table.add_row(goal.name, goal.goal, goal.measured, goal.verdict, goal.reason)
        console.print(table)
    missed = sum(goal.verdict == "MISSED" for goal in goals)
    absent = [suite for suite, content in contents.items() if content["stopped"]]
    absent += [row["name"] for content in contents.values() for row in content["rows"]
               if row["kind"] == Absent.__name__]  # fmt: skip
    if absent:
        console.print(f"incomplete: {', '.join(absent)}")
    console.print(f"{missed} goals missed" if missed else "no goal missed")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Benchmark fast against plain implementations, behind a correctness gate.",
    )
    parser.add_argument("--only", choices=suites.names(), help="run one suite")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--quick", action="store_true", help="smoke test at tiny sizes")
    parser.add_argument(
        "--budget", type=_seconds, help="time limit of all suites in seconds (cuda: 480; cpu: none)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON results (default: benchmarks/results/MACHINE, none with --quick)",
    )
    return parser.parse_args(arguments)


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("not a positive number of seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
