"""The table of what was done, how often, and what came out."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Row:
    """One line of the table."""

    goal: str
    """Such as "R1"."""
    done: str
    """What was done."""
    times: int = 0
    """How often."""
    outcome: str = ""
    """What came of it; said by the test when it has passed."""
    passed: bool = False
    seconds: float = 0.0

    def count(self, times: int = 1) -> None:
        """It was done once more."""
        self.times += times


@dataclass
class Table:
    """Collects the rows of a session."""

    rows: list[Row] = field(default_factory=list)

    def markdown(self) -> str:
        """As it can be pasted into a page."""
        lines = ["| goal | what was done | times | outcome |", "|---|---|---:|---|"]
        for row in self.ordered():
            outcome = row.outcome if row.passed else "**FAILED**"
            lines.append(f"| {row.goal} | {row.done} | {row.times:,} | {outcome} |")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """As JSON."""
        rows = [asdict(row) for row in self.ordered()]
        path.write_text(json.dumps({"rows": rows}, indent=2) + "\n")

    def ordered(self) -> list[Row]:
        """By the number of the goal, those without one last; what was done in several ways is one.

        "variant: outcome" of several variants becomes "variants: outcome".
        """
        merged: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            merged.setdefault((row.goal, row.done), []).append(row)
        rows = [
            Row(
                goal, done, sum(row.times for row in some), _together([r.outcome for r in some]),
                all(row.passed for row in some), round(sum(row.seconds for row in some), 2),
            )
            for (goal, done), some in merged.items()
        ]  # fmt: skip
        return sorted(rows, key=lambda r: int((re.findall(r"\d+", r.goal) or ["999"])[0]))


def _together(outcomes: list[str]) -> str:
    by_text: dict[str, list[str]] = {}
    for outcome in outcomes:
        variant, _, text = outcome.rpartition(": ")
        by_text.setdefault(text, []).append(variant)
    return "; ".join(
        (f"{', '.join(filter(None, dict.fromkeys(variants)))}: " if any(variants) else "") + text
        for text, variants in by_text.items()
    )


def sizes(short: int, full: int) -> Any:
    """Twins of a test that takes ``times``: a short one, and one that is marked ``chaos``."""
    return pytest.mark.parametrize(
        "times",
        [
            pytest.param(short, id="short", marks=pytest.mark.short),
            pytest.param(full, id="full", marks=pytest.mark.chaos),
        ],
    )


class Recorder:
    """Gives each test with the mark ``goal`` its row."""

    def __init__(self) -> None:
        self.table = Table()

    def row_of(self, item: pytest.Item) -> Row | None:
        mark = item.get_closest_marker("goal")
        if mark is None:
            return None
        if not hasattr(item, "chaos_row"):
            item.chaos_row = Row(*mark.args)
            self.table.rows.append(item.chaos_row)
        return item.chaos_row

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        row, start = self.row_of(item), time.perf_counter()
        try:
            value = yield
            if row is not None:
                row.passed = True
            return value
        except pytest.skip.Exception:
            if row is not None:
                self.table.rows.remove(row)
            raise
        finally:
            if row is not None:
                row.seconds = round(time.perf_counter() - start, 2)
                row.times = row.times or 1

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        if not self.table.rows:
            return
        terminalreporter.section("chaos")
        terminalreporter.write_line(self.table.markdown())
        path = config.getoption("--chaos-json", default=None)
        if path:
            self.table.write(Path(path))
