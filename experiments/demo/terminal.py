"""Print the demo's results."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.demo.report import hop_summary, text_summary
from experiments.demo.results import DemoResults

_SHADES = " ░▒▓█"


def show(r: DemoResults, console: Console) -> None:
    """Print all results."""
    console.print(_hop_table(r))
    console.print(f"{hop_summary(r)}\n", highlight=False)
    console.print(_text_table(r))
    console.print("expert load per loop (columns: experts; darker: larger share)")
    top = max(max(row) for row in r.expert_load)
    for t, row in enumerate(r.expert_load):
        cells = "".join(2 * _shade(share / top) for share in row)
        console.print(f"  loop {t + 1}  {cells}", highlight=False)
    console.print(f"\n[bold]sample with {r.mean_depth} loops[/]", highlight=False)
    console.print(r.prompt + r.samples[r.mean_depth], highlight=False, markup=False)
    console.print(f"\n{text_summary(r)}\n", highlight=False)


def _shade(share: float) -> str:
    return _SHADES[round(share * (len(_SHADES) - 1))]


def _hop_table(r: DemoResults) -> Table:
    table = Table(
        title=f"\nchains: % of unseen chains answered, by loops (trained on {r.trained_hops} hops)",
        title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0),
    )  # fmt: skip
    table.add_column("hops", no_wrap=True)
    for loops in r.hop_loops:
        table.add_column(str(loops), justify="right", no_wrap=True)
    for heading in ("exit", "loops", "dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for i, hops in enumerate(r.hops):
        style = "bold" if hops == r.asked_hops else ""
        cells = [f"{100 * share:.0f}" for share in [*r.hop_accuracy[i], r.exit_accuracy[i]]]
        table.add_row(
            str(hops), *cells, f"{r.exit_loops[i]:.1f}", f"{100 * r.hop_dense[i]:.0f}", style=style
        )
    return table


def _text_table(r: DemoResults) -> Table:
    table = Table(
        title=f"text: bits per byte on {r.val_bytes:,} bytes of unseen files", title_justify="left"
    )
    for heading in ("loops", "looped", "dense", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for depth, bits in zip(r.depths, r.looped_bits, strict=True):
        note = "mean of training" if depth == r.mean_depth else ""
        note = "deeper than trained" if depth > r.max_depth else note
        style = "bold" if depth == r.best_depth else ""
        table.add_row(str(depth), f"{bits:.4f}", f"{r.dense_bits:.4f}", note, style=style)
    return table
