"""``python -m benchmarks.report``: generate the tables and plots of docs/speed.md.

The text between ``<!-- measured: speed -->`` and ``<!-- end -->`` is generated from
``benchmarks/results/<machine>/*.json``; a test checks that it is up to date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots, store
from benchmarks.measure import time_text

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "speed.md"
ORDER = (
    "experts", "training", "loops", "prefill", "decoding", "context", "batch", "exits", "engine",
    "http", "quantized", "compiled", "start", "pretraining", "serving", "kernels", "cache",
)  # fmt: skip
DISTURBED = 0.05
"""Share of all cores used by other processes above which a table carries a note."""
_BLOCK = re.compile(r"(<!-- measured: speed -->\n).*?(<!-- end -->)", re.DOTALL)
Columns = list[tuple[str, bool]]


@dataclass(frozen=True)
class Goal:
    """One goal and its measurement."""

    name: str
    goal: str
    measured: str
    verdict: str
    reason: str
    """Explanation of a missed goal."""


def goals(contents: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Return every row with a goal, suite by suite."""
    found = []
    for suite in in_order(contents):
        for row in contents[suite]["rows"]:
            if row.get("goal") is None:
                continue
            missed = row["verdict"] == "MISSED"
            found.append(
                Goal(
                    f"{suite}: {row['name']}, {row['dtype']}",
                    goal_text(row),
                    figure(row),
                    row["verdict"],
                    row.get("reason", "") if missed else "",
                )
            )
    return found


def in_order(contents: Iterable[str]) -> list[str]:
    """Sort suites for display."""
    return sorted(contents, key=lambda s: ORDER.index(s) if s in ORDER else len(ORDER))


def figure(row: Mapping[str, Any]) -> str:
    """Format a row's result."""
    if "ratio" in row and "value" not in row:
        return f"{row['ratio']:.2f}x"
    if "value" in row:
        return with_unit(row["value"], row["unit"])
    return str(row.get("reason", ""))


def goal_text(row: Mapping[str, Any]) -> str:
    """Format a row's goal; "-" without one."""
    if row.get("goal") is None:
        return "-"
    if "value" not in row:
        return f">= {row['goal']:g}x"
    sign = "<=" if row.get("at_most") else ">="
    return f"{sign} {with_unit(row['goal'], row['unit'])}"


def with_unit(value: float, unit: str) -> str:
    """Format a number with up to four digits and its unit."""
    number = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    if abs(value) >= 1e4:
        number = f"{value:,.0f}"
    return f"{number}{'' if unit in ('', 'x') or unit.startswith('x ') else ' '}{unit}"


def lines(rows: Sequence[Mapping[str, Any]]) -> tuple[Columns, list[list[str]]]:
    """Return columns (name, whether numeric) and cells of a suite's table."""
    columns: Columns = [
        ("", False), ("dtype", False), ("time", True), ("result", True), ("goal", True),
        ("", False), ("of roofline", True), ("plain", True), ("dense, equal FLOPs", True),
        ("error", True),
    ]  # fmt: skip
    cells = [
        [
            row["name"], row["dtype"],
            _seconds(row.get("fast_seconds", row.get("seconds"))),
            figure(row), goal_text(row),
            "-" if row.get("goal") is None else row["verdict"], _limit(row),
            _seconds(row.get("plain_seconds")), _dense(row),
            "-" if row.get("error") is None else f"{row['error']:.1e}",
        ]
        for row in rows
    ]  # fmt: skip
    used = [
        i for i in range(len(columns)) if i < 4 or any(line[i] not in ("-", "") for line in cells)
    ]
    return [columns[i] for i in used], [[line[i] for i in used] for line in cells]


def cache_lines(rows: Sequence[Mapping[str, Any]]) -> tuple[Columns, list[list[str]]]:
    """Return columns and cells of the cache suite, whose rows are bytes."""
    columns: Columns = [("", False), *((name, True) for name in
                        ("bytes held", "formula", "MHA", "reduction"))]  # fmt: skip
    return columns, [
        [row["name"], *(f"{row[name]:,}" for name in ("held", "formula", "mha")),
         f"{row['mha'] / row['held']:.1f}x"]
        for row in rows
    ]  # fmt: skip


def _seconds(value: float | None) -> str:
    return "-" if value is None else time_text(value)


def _limit(row: Mapping[str, Any]) -> str:
    if row.get("share") is None:
        return "-"
    return f"{100 * row['share']:.2g} % ({row['floor']['bound']})"


def _dense(row: Mapping[str, Any]) -> str:
    """Format the time of the dense model over that of the fast implementation."""
    if row.get("dense_seconds") is None:
        return "-"
    return f"{row['dense_seconds'] / row['fast_seconds']:.2f}x"


def notes(content: Mapping[str, Any]) -> list[str]:
    """Return notes on how far a suite's results can be trusted."""
    found = []
    if content.get("stopped"):
        found.append(f"{content['suite']}: {content['stopped']}")
    others = content.get("others")
    if others is not None and others > DISTURBED:
        found.append(
            f"Other processes used {others:.0%} of all cores: ratios are more reliable than times."
        )
    return found


def markdown(columns: Columns, cells: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    head = [name for name, _ in columns]
    rule = ["---:" if numeric else "---" for _, numeric in columns]
    safe = ([cell.replace("|", r"\|") for cell in line] for line in cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *safe))


def section(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Format goals, plots and tables of one machine."""
    newest = max((content["machine"] for content in contents.values()), key=lambda m: m["date"])
    parts = [f"### {_title(newest)}\n", _source(folder, contents)]
    found = goals(contents)
    if found:
        missed = sum(goal.verdict == "MISSED" for goal in found)
        parts.append(
            f"**Goals, row by row:** {len(found) - missed} met, {missed} missed.\n\n"
            + markdown(
                [(name, False) for name in ("", "goal", "measured", "", "explanation")],
                [(g.name, g.goal, g.measured, g.verdict, g.reason or "-") for g in found],
            )
        )
    for plot in plots.of(folder, contents):
        parts.append(f"![{plot.title}](speed/{plot.path.name})\n")
    for suite in in_order(contents):
        content = contents[suite]
        table = cache_lines if suite == "cache" else lines
        remarks = "".join(f"\n{note}\n" for note in notes(content))
        parts.append(
            f"#### {suite}\n\n{content.get('title', suite)}\n\n"
            + markdown(*table(content["rows"]))
            + remarks
        )
    return "\n".join(parts)


def _title(description: Mapping[str, Any]) -> str:
    named = description.get("accelerator") or description["processor"]
    n = description["threads"]
    return f"{named}, {n} thread{'s' if n > 1 else ''}"


def _source(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> str:
    """Format commit, date and versions, grouped by run."""
    runs: dict[str, list[str]] = {}
    for suite in in_order(contents):
        m = contents[suite]["machine"]
        run = f"commit {m['commit']}, {m['date']}, PyTorch {m['torch']}, {m['instructions']}"
        if "wait_policy" in m:
            run += f", idle threads: {m['wait_policy']}"
        runs.setdefault(run, []).append(suite)
    sources = "; ".join(f"{', '.join(each)}: {run}" for run, each in runs.items())
    return f"`benchmarks/results/{folder.name}/`. {sources}.\n"


def measured(root: Path = store.RESULTS) -> str:
    """Return the text between the markers of the page."""
    folders = store.machines(root)
    return "\n".join(section(folder, store.load(folder)) for folder in folders)


def remade(text: str, root: Path = store.RESULTS) -> str:
    """Return the page's text with its generated block updated."""
    return _BLOCK.sub(lambda m: f"{m[1]}{measured(root)}{m[2]}", text)


def main() -> int:
    """Rewrite the page and its plots."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(remade(text), encoding="utf-8")
    for folder in store.machines():
        for plot in plots.of(folder, store.load(folder)):
            plot.draw()
            print(plot.path.relative_to(ROOT))
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
