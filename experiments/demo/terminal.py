"""Print the demo's results."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.demo.report import hop_summary, note, sudoku_summary, text_summary
from experiments.demo.results import ChainResults, DemoResults, SudokuResults, TextResults


def show(r: DemoResults, console: Console) -> None:
    """Print all results."""
    for table, summary in (
        (_hop_table(r.chains), hop_summary(r.chains)),
        (_sudoku_table(r.sudoku), sudoku_summary(r.sudoku)),
        (_text_table(r.text), text_summary(r.text)),
    ):
        console.print(table)
        console.print(f"{summary}\n", highlight=False)
    console.print(f"[bold]sample with {r.text.trained_depth} loops[/]", highlight=False)
    sample = r.text.samples[r.text.trained_depth]
    console.print(r.text.prompt + sample + "\n", highlight=False, markup=False)


def _percent_table(title: str, first: str, loops: list[int], more: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, no_wrap=True)
    for heading in (*map(str, loops), *more):
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _hop_table(r: ChainResults) -> Table:
    title = f"\nchains: % of unseen chains answered, by loops (trained on {r.trained_hops} hops)"
    table = _percent_table(title, "hops", r.loops, ("exit", "loops", "dense"))
    for i, hops in enumerate(r.hops):
        style = "bold" if hops == r.asked_hops else ""
        cells = [_percent(share) for share in [*r.accuracy[i], r.exit_accuracy[i]]]
        table.add_row(
            str(hops), *cells, f"{r.exit_loops[i]:.1f}", _percent(r.dense_accuracy[i]), style=style
        )
    return table


def _sudoku_table(r: SudokuResults) -> Table:
    title = f"sudoku: % of puzzles solved, by loops (most of training at {r.trained_loops})"
    table = _percent_table(title, "solver's rounds", r.loops, ("dense",))
    for i, level in enumerate(r.levels):
        style = "bold" if i == len(r.levels) - 1 else ""
        cells = map(_percent, [*r.solved[i], r.dense_solved[i]])
        table.add_row(f"{level} ({r.asked[i]})", *cells, style=style)
    return table


def _text_table(r: TextResults) -> Table:
    table = Table(
        title=f"text: bits per byte on {r.val_bytes:,} bytes of unseen files", title_justify="left"
    )
    for heading in ("loops", "looped", "dense", "dense, equal FLOPs", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for depth, bits in zip(r.depths, r.looped_bits, strict=True):
        style = "bold" if depth == r.trained_depth else ""
        dense, flops = f"{r.dense_bits:.4f}", f"{r.flops_bits:.4f}"
        table.add_row(str(depth), f"{bits:.4f}", dense, flops, note(depth, r), style=style)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
