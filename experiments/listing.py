"""Claims and verdicts in a terminal, and what of them is known from recorded results."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from experiments.claim import (
    DOES_NOT_HOLD,
    HOLDS,
    HOLDS_IN_PART,
    Claim,
    Record,
    Summary,
)
from experiments.results import Results
from experiments.table import CLAIMS, PENDING, committed_results, experiment


@dataclass(frozen=True)
class Line:
    """One claim, as the list shows it."""

    claim: str
    """Id."""
    title: str
    """A few words."""
    source: str
    """Who claims it."""
    verdicts: dict[str, str]
    """Scale -> verdict of its recorded results."""
    keys: dict[str, str]
    """Scale -> figures that decided."""
    missing: str
    """Why there is no answer, or no other one; "" where nothing is missing."""


def recorded(claim: str, scale: str) -> tuple[list[Record], Summary] | None:
    """The committed records of a whole scale with what they say; None if cells are missing."""
    asked = experiment(claim)
    cells = asked.cells(scale)
    records = Results(committed_results(claim, scale)).of(cells)
    return (records, asked.summarise(records)) if len(records) == len(cells) else None


def lines() -> list[Line]:
    """All claims, answered or not, in the order of their numbers."""
    found = [_line(claim, experiment(claim).CLAIM) for claim in CLAIMS]
    for claim, (title, needs) in PENDING.items():
        found.append(Line(claim, title, "", {}, {}, f"not answered yet: needs {needs}"))
    return sorted(found, key=lambda line: _number(line.claim))


def _number(claim: str) -> tuple[int, str]:
    """c2 before c10, c1 before c1b, and what has no number at the end."""
    match = re.match(r"c(\d+)", claim)
    return (int(match[1]) if match else sys.maxsize, claim)


def _line(claim: str, words: Claim) -> Line:
    known = {scale: recorded(claim, scale) for scale in words.scales}
    missing = [
        f"{scale}: not run, needs {words.hardware[scale]}{_minutes(words, scale)}"
        for scale, found in known.items()
        if found is None
    ]
    said = {scale: found[1] for scale, found in known.items() if found is not None}
    return Line(
        claim, words.title, words.source, {scale: s.verdict for scale, s in said.items()},
        {scale: s.key for scale, s in said.items()}, "; ".join(missing),
    )  # fmt: skip


def _minutes(words: Claim, scale: str) -> str:
    minutes = words.minutes.get(scale)
    return f" for about {minutes:g} minutes" if minutes else ""


def print_claims() -> None:
    """Print the table of all claims."""
    Console().print(claims_table())


def claims_table() -> Table:
    """Claim, source, verdict and figures of every claim."""
    table = Table(title="claims of the field", title_justify="left", show_lines=True)
    for heading in ("claim", "source", "verdict", "key figures"):
        table.add_column(heading)
    for line in lines():
        verdicts = [
            f"[bold {_colour(said)}]{said}[/] ({scale})" for scale, said in line.verdicts.items()
        ]
        missing = [f"[dim]{line.missing}[/]"] if line.missing else []
        table.add_row(
            f"[bold]{line.claim}[/] {line.title}", line.source,
            "\n".join([*verdicts, *missing]), "\n".join(line.keys.values()),
        )  # fmt: skip
    return table


def show(claim: Claim, summary: Summary, console: Console) -> None:
    """Print the figures and the verdict of one run."""
    table = Table(title=f"{claim.id}: {claim.title}", title_justify="left")
    for i, heading in enumerate(summary.head):
        table.add_column(heading, justify="right" if i else "left")
    for row in summary.rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"pass mark: {claim.pass_mark}", highlight=False, markup=False)
    console.print(f"[bold {_colour(summary.verdict)}]{summary.verdict}[/]", highlight=False)
    console.print(summary.sentence, highlight=False, markup=False)


def _colour(verdict: str) -> str:
    return {HOLDS: "green", HOLDS_IN_PART: "cyan", DOES_NOT_HOLD: "red"}.get(verdict, "yellow")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, all but its first column right-aligned."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (head, rule, *rows))
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
