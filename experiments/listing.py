"""Claims and their verdicts from recorded results, as terminal and Markdown tables."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from experiments.claim import DOES_NOT_HOLD, HOLDS, HOLDS_IN_PART, Claim, Record, Summary
from experiments.results import Results
from experiments.table import CLAIMS, committed_results, experiment
from open_mythos.console import show as show_table

_COLORS = {HOLDS: "green", HOLDS_IN_PART: "cyan", DOES_NOT_HOLD: "red"}


@dataclass(frozen=True)
class Line:
    """One row of the list of claims."""

    claim: str
    title: str
    source: str
    verdicts: dict[str, str]
    """Scale -> verdict of its recorded results."""
    keys: dict[str, str]
    """Scale -> metrics that decided the verdict."""
    missing: str
    """Why a result is missing; "" if none is."""


def recorded(claim: str, scale: str) -> tuple[list[Record], Summary] | None:
    """Return the recorded results of a scale and their summary; None if cells are missing."""
    module = experiment(claim)
    cells = module.cells(scale)
    records = Results(committed_results(claim, scale)).of(cells)
    return (records, module.summarise(records)) if len(records) == len(cells) else None


def lines() -> list[Line]:
    """Return a row for every claim, sorted by number; claims without a number come last."""
    found = [_line(experiment(claim).CLAIM) for claim in CLAIMS]

    def number(line: Line) -> tuple[int, str]:
        match = re.match(r"c(\d+)", line.claim)
        return int(match[1]) if match else sys.maxsize, line.claim

    return sorted(found, key=number)


def _line(claim: Claim) -> Line:
    summaries, missing = dict[str, Summary](), list[str]()
    for scale, hardware in claim.hardware.items():
        if known := recorded(claim.id, scale):
            summaries[scale] = known[1]
            continue
        minutes = claim.minutes.get(scale)
        duration = f" for about {minutes:g} minutes" if minutes else ""
        missing.append(f"{scale}: not run, needs {hardware}{duration}")
    return Line(
        claim.id, claim.title, claim.source, {scale: s.verdict for scale, s in summaries.items()},
        {scale: s.key for scale, s in summaries.items()}, "; ".join(missing),
    )  # fmt: skip


def print_claims() -> None:
    """Print the table of all claims."""
    table = Table(title="claims", title_justify="left", show_lines=True)
    for heading in ("claim", "source", "verdict", "key metrics"):
        table.add_column(heading)
    for line in lines():
        verdicts = [f"{_colored(verdict)} ({scale})" for scale, verdict in line.verdicts.items()]
        missing = [f"[dim]{line.missing}[/]"] if line.missing else []
        table.add_row(
            f"[bold]{line.claim}[/] {line.title}", line.source,
            "\n".join([*verdicts, *missing]), "\n".join(line.keys.values()),
        )  # fmt: skip
    show_table(Console(), table)


def show(claim: Claim, summary: Summary, console: Console) -> None:
    """Print the metrics and the verdict of one run."""
    table = Table(title=f"{claim.id}: {claim.title}", title_justify="left")
    for i, heading in enumerate(summary.head):
        table.add_column(heading, justify="right" if i else "left")
    for row in summary.rows:
        table.add_row(*row)
    show_table(console, table)
    console.print(f"pass mark: {claim.pass_mark}", highlight=False, markup=False)
    console.print(_colored(summary.verdict), highlight=False)
    console.print(summary.sentence, highlight=False, markup=False)


def _colored(verdict: str) -> str:
    return f"[bold {_COLORS.get(verdict, 'yellow')}]{verdict}[/]"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table whose columns, except the first, are right-aligned."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, rule, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
