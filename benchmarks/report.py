"""``python -m benchmarks.report``: tables and plots of docs/speed.md, made from the results.

The page holds the text between ``<!-- measured: speed -->`` and ``<!-- end -->``; everything there
follows from ``benchmarks/results/<machine>/*.json``. A test compares.
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
    "experts", "training", "loops", "prefill", "decoding", "context", "batch", "exits", "quantized",
    "compiled", "start", "pretraining", "serving", "kernels", "cache",
)  # fmt: skip
DISTURBED = 0.05
"""Share of all cores taken by others from which a table says so."""
_BLOCK = re.compile(r"(<!-- measured: speed -->\n).*?(<!-- end -->)", re.DOTALL)
Columns = list[tuple[str, bool]]


@dataclass(frozen=True)
class Goal:
    """One goal and what was measured."""

    name: str
    goal: str
    measured: str
    verdict: str
    reason: str
    """For a goal that was missed."""


def goals(contents: Mapping[str, Mapping[str, Any]]) -> list[Goal]:
    """Every row that has a goal, suite by suite."""
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
    """Suites in the order in which they are shown."""
    return sorted(contents, key=lambda s: ORDER.index(s) if s in ORDER else len(ORDER))


def figure(row: Mapping[str, Any]) -> str:
    """What a row says, as text."""
    if "ratio" in row and "value" not in row:
        return f"{row['ratio']:.2f}x"
    if "value" in row:
        return with_unit(row["value"], row["unit"])
    return str(row.get("reason", ""))


def goal_text(row: Mapping[str, Any]) -> str:
    """What a row was to reach; "-" if nothing."""
    if row.get("goal") is None:
        return "-"
    if "value" not in row:
        return f">= {row['goal']:g}x"
    sign = "<=" if row.get("at_most") else ">="
    return f"{sign} {with_unit(row['goal'], row['unit'])}"


def with_unit(value: float, unit: str) -> str:
    """A number of three or four figures with its unit."""
    number = f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.4g}"
    if abs(value) >= 1e4:
        number = f"{value:,.0f}"
    return f"{number}{'' if unit in ('', 'x') or unit.startswith('x ') else ' '}{unit}"


def lines(rows: Sequence[Mapping[str, Any]]) -> tuple[Columns, list[list[str]]]:
    """Columns (name, whether of numbers) and cells of a suite's table."""
    columns: Columns = [
        ("", False), ("dtype", False), ("time", True), ("figure", True), ("goal", True),
        ("", False), ("of the limit", True), ("plain", True), ("dense, equal FLOPs", True),
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
    """The same for the suite of the cache, whose rows are bytes."""
    columns: Columns = [("", False), *((name, True) for name in
                        ("bytes held", "by the formula", "MHA", "times less"))]  # fmt: skip
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
    """Time of the dense model over that of the fast form."""
    if row.get("dense_seconds") is None:
        return "-"
    return f"{row['dense_seconds'] / row['fast_seconds']:.2f}x"


def notes(content: Mapping[str, Any]) -> list[str]:
    """What a reader of a suite's figures must know."""
    found = []
    if content.get("stopped"):
        found.append(f"{content['suite']}: {content['stopped']}")
    others = content.get("others")
    if others is not None and others > DISTURBED:
        found.append(
            f"Others took {others:.0%} of all cores meanwhile: ratios hold better than times."
        )
    return found


def markdown(columns: Columns, cells: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head = [name for name, _ in columns]
    rule = ["---:" if numeric else "---" for _, numeric in columns]
    safe = ([cell.replace("|", r"\|") for cell in line] for line in cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *safe))


def section(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> str:
    """All that is known of one machine: goals, plots, tables."""
    newest = max((content["machine"] for content in contents.values()), key=lambda m: m["date"])
    parts = [f"### {_title(newest)}\n", _source(folder, contents)]
    found = goals(contents)
    if found:
        missed = sum(goal.verdict == "MISSED" for goal in found)
        parts.append(
            f"**Goals, row by row:** {len(found) - missed} met, {missed} missed.\n\n"
            + markdown(
                [(name, False) for name in ("", "goal", "measured", "", "why not more")],
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
    """When, by which commit and on what: suites of one run share a line."""
    runs: dict[str, list[str]] = {}
    for suite in in_order(contents):
        m = contents[suite]["machine"]
        run = f"commit {m['commit']}, {m['date']}, PyTorch {m['torch']}, {m['instructions']}"
        if "wait_policy" in m:
            run += f", idle threads: {m['wait_policy']}"
        runs.setdefault(run, []).append(suite)
    told = "; ".join(f"{', '.join(each)}: {run}" for run, each in runs.items())
    return f"`benchmarks/results/{folder.name}/`. {told}.\n"


def measured(root: Path = store.RESULTS) -> str:
    """Everything between the markers of the page."""
    folders = store.machines(root)
    return "\n".join(section(folder, store.load(folder)) for folder in folders)


def remade(text: str, root: Path = store.RESULTS) -> str:
    """The page's text with its block as the results have it."""
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
