"""``python -m benchmarks [--only NAME] [--quick] [--out DIR]``: see ``--help``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import caches, decoding, exits, machine, training
from benchmarks.measure import Row
from benchmarks.models import FULL, QUICK, Scale

RESULTS = Path(__file__).resolve().parent / "results"
TIMED = {"training": training, "decoding": decoding, "exits": exits}
SUITES = (*TIMED, "cache")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the suites, show and save what they measure; a missed goal is a row that says so.

    Raises:
        GateError: A fast form disagrees with its plain twin.
    """
    options = _parse(arguments)
    scale = QUICK if options.quick else FULL
    console = Console(width=None if Console().is_terminal else 150)
    description = machine.describe()
    console.print(", ".join(f"{key} {value}" for key, value in description.items()))
    if options.quick:
        console.print("quick: a check that everything runs; the figures mean nothing")
    out = options.out or (None if options.quick else RESULTS)
    missed = 0
    for suite in [options.only] if options.only else SUITES:
        if suite == "cache":
            content: Any = _cache(scale, console, out)
        else:
            timed = _timed(suite, scale, console)
            missed += sum(row.verdict == "MISSED" for row in timed)
            content = [asdict(row) | {"verdict": row.verdict} for row in timed]
        _save(out, suite, {"machine": description, "scale": asdict(scale), "rows": content})
    console.print(f"{missed} goals missed" if missed else "no goal missed")


def _timed(suite: str, scale: Scale, console: Console) -> list[Row]:
    """The rows of a suite, each shown as soon as it is there, then all as a table."""
    module = TIMED[suite]
    rows = []
    for row in module.rows(scale):
        console.print(f"[dim]{suite}, {row.name}, {row.dtype}: {row.ratio:.2f}x[/dim]")
        rows.append(row)
    table = Table(title=f"{module.title(scale)}; medians of {scale.alternations} turns")
    _columns(table, ["", "dtype"], ["fast", "plain", "ratio", "CPU ratio", "goal"])
    _columns(table, ["verdict"], ["error", "error of plain"])
    for row in rows:
        table.add_row(
            row.name, row.dtype, _time(row.fast_seconds), _time(row.plain_seconds),
            f"{row.ratio:.2f}x", f"{row.cpu_ratio:.2f}x",
            "-" if row.goal is None else f"{row.goal:.1f}x", row.verdict,
            f"{row.error:.1e}", f"{row.plain_error:.1e}",
        )  # fmt: skip
    console.print(table)
    return rows


def _cache(scale: Scale, console: Console, out: Path | None) -> list[dict[str, Any]]:
    """Bytes held by real caches, and the table of all variants as Markdown beside them."""
    rows = list(caches.rows(scale))
    table = Table(title=f"cache of one row, {scale.tokens} tokens, {scale.n_loops} loops, float32")
    _columns(table, [""], ["bytes held", "formula", "MHA", "times less"])
    for row in rows:
        table.add_row(
            row.name, f"{row.held:,}", f"{row.formula:,}", f"{row.mha:,}", f"{row.ratio:.1f}x"
        )
    console.print(table)
    console.print(caches.variants_table(), markup=False, soft_wrap=True)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "cache.md").write_text(caches.variants_table() + "\n", encoding="utf-8")
    return [asdict(row) | {"ratio": row.ratio} for row in rows]


def _columns(table: Table, text: Iterable[str], numbers: Iterable[str]) -> None:
    for name in text:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _save(out: Path | None, suite: str, content: dict[str, Any]) -> None:
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=2) + "\n"
        (out / f"{suite}.json").write_text(text, encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Fast paths against their plain twins, behind a correctness gate.",
    )
    parser.add_argument("--only", choices=SUITES, help="one suite instead of all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--out", type=Path, help="folder of the JSON files (benchmarks/results; none if --quick)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
