"""Plot the demo's results: more loops above, against dense models below, a puzzle at the bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.demo.results import ChainResults, DemoResults, SudokuResults, TextResults
from experiments.figure import log2_ticks, panels

LOOPED, DENSE, MUTED, RIGHT, WRONG = "#2563eb", "#d97706", "#94a3b8", "#059669", "#dc2626"


def draw(results: DemoResults, path: Path) -> None:
    """Draw the panels to ``path``; its suffix decides the format."""
    r = results
    with panels(path, 3, rows=3, size=(5, 3.7), dpi=130) as axes:
        _chain_loops(axes[0], r.chains)
        _sudoku_loops(axes[1], r.sudoku)
        _text_loops(axes[2], r.text)
        _chain_lengths(axes[3], r.chains)
        _sudoku_levels(axes[4], r.sudoku)
        _text_cost(axes[5], r.text)
        loops = list(r.sudoku.boards)
        for ax, n in zip(axes[6:], (loops[0], loops[1], loops[-1]), strict=True):
            _board(ax, r.sudoku, n)


def _chain_loops(ax: Any, r: ChainResults) -> None:
    for hops in (h for h in r.hops if h >= r.trained_hops):
        depth = (hops - r.trained_hops + 2) / (r.hops[-1] - r.trained_hops + 2)
        accuracy = r.accuracy[r.hops.index(hops)]
        ax.plot(r.loops, accuracy, "o-", color=LOOPED, alpha=depth, ms=4, label=f"{hops} hops")
    dense = r.dense_accuracy[r.hops.index(r.asked_hops)]
    ax.axhline(dense, color=DENSE, ls="--", label=f"dense, {r.asked_hops} hops")
    _loop_axis(ax, r.loops)
    ax.set(
        title=f"Chains: trained on {r.trained_hops} hops, asked for more",
        ylabel="unseen chains answered", ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.62))


def _chain_lengths(ax: Any, r: ChainResults) -> None:
    few, many = r.accuracy_at(r.trained_hops), r.accuracy_at(r.chosen_loops)
    ax.axvspan(r.hops[0], r.trained_hops, color=LOOPED, alpha=0.07, lw=0)
    ax.plot(r.hops, many, "o-", color=LOOPED, label=f"looped, {r.chosen_loops} loops")
    ax.plot(r.hops, few, "o:", color=LOOPED, label=f"looped, {r.trained_hops} loops")
    ax.plot(r.hops, r.dense_accuracy, "o--", color=DENSE, label="dense, equal parameters")
    ax.axhline(1 / r.entities, color=MUTED, lw=0.8, ls=":", label="chance")
    ax.set(
        title="Longer chains, same weights", xlabel="hops (shaded: seen in training)",
        ylabel="unseen chains answered", ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend(fontsize=8)


def _sudoku_loops(ax: Any, r: SudokuResults) -> None:
    for i, (level, solved) in enumerate(zip(r.levels, r.solved, strict=True)):
        name = "needs a guess" if level == "guess" else f"{level} rounds"
        alpha = (i + 1.5) / (len(r.levels) + 0.5)
        ax.plot(r.loops, solved, "o-", color=LOOPED, alpha=alpha, ms=4, label=name)
    ax.axvline(r.trained_loops, color=MUTED, lw=0.8, ls=":")
    _loop_axis(ax, r.loops, " (dotted: most of training)")
    ax.set(title="Sudoku: harder puzzles take more loops", ylabel="puzzles solved",
           ylim=(0, 1.03))  # fmt: skip
    ax.legend(fontsize=8, loc="upper left")


def _sudoku_levels(ax: Any, r: SudokuResults) -> None:
    places = range(len(r.levels))
    column = r.loops.index(r.trained_loops)
    last = [row[-1] for row in r.solved]
    ax.bar([p - 0.2 for p in places], last, 0.38, color=LOOPED, alpha=0.45,
           label=f"looped, {r.loops[-1]} loops")  # fmt: skip
    ax.bar([p - 0.2 for p in places], [row[column] for row in r.solved], 0.38, color=LOOPED,
           label=f"looped, {r.trained_loops} loops")  # fmt: skip
    dense = ax.bar([p + 0.2 for p in places], r.dense_solved, 0.38, color=DENSE,
                   label="dense, equal parameters")  # fmt: skip
    ax.bar_label(dense, [f"{share:.0%}" for share in r.dense_solved], color=DENSE, fontsize=8)
    ax.set_xticks(places, r.levels)
    ax.set(title="Sudoku by difficulty", xlabel="rounds that a solver needs",
           ylabel="puzzles solved", ylim=(0, 1.3))  # fmt: skip
    ax.legend(fontsize=8, loc="upper right", ncols=2)


def _text_loops(ax: Any, r: TextResults) -> None:
    label = f"looped, {_millions(r.looped.parameters)}"
    ax.plot(r.depths, r.looped_bits, "o-", color=LOOPED, label=label)
    ax.axhline(r.dense_bits, color=DENSE, ls="--", label=f"dense, {_millions(r.dense.parameters)}")
    ax.axvline(r.trained_depth, color=MUTED, lw=0.8, ls=":")
    _loop_axis(ax, r.depths, " (dotted: most of training)")
    ax.set(title="Text: same weights, more loops", ylabel="bits per byte, unseen files")
    ax.legend(fontsize=8)


def _text_cost(ax: Any, r: TextResults) -> None:
    for curve, bits, colour, marker, name in (
        (r.dense, r.dense_bits, DENSE, "s", "dense, equal parameters"),
        (r.looped, r.bits_at(r.trained_depth), LOOPED, "o", f"looped, {r.trained_depth} loops"),
        (r.flops, r.flops_bits, DENSE, "^", "dense, equal FLOPs"),
    ):
        label = f"{name}: {_millions(curve.parameters)}"
        ax.plot(curve.training_flops / 1e6, bits, marker, color=colour, ms=9, label=label)
    ax.margins(0.25)
    ax.set(title="Text: what it costs", xlabel="training MFLOPs per token",
           ylabel="bits per byte, unseen files")  # fmt: skip
    ax.legend(fontsize=8)


def _board(ax: Any, r: SudokuResults, n_loops: int) -> None:
    """Draw a puzzle as the looped model fills it in: clues black, right green, wrong red."""
    n, board = r.shape[0] * r.shape[1], r.boards[n_loops]
    for cell, (clue, digit, right) in enumerate(zip(r.clues, board, r.solution, strict=True)):
        colour = "#0f172a" if clue else RIGHT if digit == right else WRONG
        ax.text(cell % n + 0.5, cell // n + 0.5, str(digit), color=colour, ha="center",
                va="center", fontsize=13, weight="bold" if clue else "normal")  # fmt: skip
    for line in range(n + 1):
        ax.axhline(line, color=MUTED, lw=2.2 if line % r.shape[0] == 0 else 0.6)
        ax.axvline(line, color=MUTED, lw=2.2 if line % r.shape[1] == 0 else 0.6)
    wrong = sum(digit != right for digit, right in zip(board, r.solution, strict=True))
    ax.set(xlim=(-0.03, n + 0.03), ylim=(n + 0.03, -0.03), aspect="equal", xticks=[], yticks=[],
           title=f"A puzzle after {n_loops} loop{'s' if n_loops > 1 else ''}: "
           + (f"{wrong} cells wrong" if wrong else "solved"))  # fmt: skip
    for side in ax.spines.values():
        side.set_visible(False)


def _loop_axis(ax: Any, loops: list[int], note: str = "") -> None:
    log2_ticks(ax, loops)
    ax.minorticks_off()
    ax.set_xlabel(f"loops at inference{note}")


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M parameters"
