"""Write the demo's report, a self-contained HTML file."""

from __future__ import annotations

import base64
from pathlib import Path

from experiments.demo.results import ChainResults, Curve, DemoResults, SudokuResults, TextResults
from experiments.sudoku_page import TEMPLATES, boards
from experiments.tasks.sudoku_solver import Grid
from open_mythos.reports.html import render, table, write_html


def write_report(results: DemoResults, picture: Path, path: Path) -> None:
    """Write the page with the plot embedded."""
    r, text, sudoku = results, results.text, results.sudoku
    samples = {f"looped, {depth} loops": sample for depth, sample in text.samples.items()}
    page = render(
        "report.html", TEMPLATES,
        title="OpenMythos demo: adjustable depth", r=r, hop_summary=hop_summary(r.chains),
        sudoku_summary=sudoku_summary(sudoku), text_summary=text_summary(text),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        boards=boards(Grid(*sudoku.shape), sudoku.clues, sudoku.boards, sudoku.solution),
        depths=table(
            ("loops", "bits per byte", "against dense", ""),
            [(depth, f"{bits:.4f}", f"{bits - text.dense_bits:+.4f}", note(depth, text))
             for depth, bits in zip(text.depths, text.looped_bits, strict=True)]
            + [("dense, equal parameters", f"{text.dense_bits:.4f}", "", ""),
               ("dense, equal FLOPs", f"{text.flops_bits:.4f}",
                f"{text.flops_bits - text.dense_bits:+.4f}", "")],
            text.trained_depth,
        ),
        models=table(
            ("task", "model", "parameters", "train MFLOPs / token", "seconds"),
            [(task, c.label, f"{c.parameters:,}", f"{c.training_flops / 1e6:.1f}",
              round(c.seconds)) for task, c in _runs(r)],
        ),
        samples=samples | {"dense": text.dense_sample},
    )  # fmt: skip
    write_html(page, path)


def _runs(r: DemoResults) -> list[tuple[str, Curve]]:
    return [
        ("chains", r.chains.looped), ("chains", r.chains.dense), ("sudoku", r.sudoku.looped),
        ("sudoku", r.sudoku.dense), ("text", r.text.looped), ("text", r.text.dense),
        ("text", r.text.flops),
    ]  # fmt: skip


def hop_summary(r: ChainResults) -> str:
    """Summarize the results on chains."""
    i, deepest = r.hops.index(r.asked_hops), r.loops[-1]
    few, many, most = (r.accuracy_at(n)[i] for n in (r.trained_hops, r.chosen_loops, deepest))
    return (
        f"Chains of {r.asked_hops} relations, trained on {r.trained_hops} at most: the looped "
        f"model answers {few:.0%} with {r.trained_hops} loops, {many:.0%} with {r.chosen_loops} "
        f"and {most:.0%} with {deepest}, from the same weights. With early exit it answers "
        f"{r.exit_accuracy[i]:.0%} with {r.exit_loops[i]:.1f} loops on average, and uses "
        f"{r.exit_loops[0]:.1f} on chains of {r.hops[0]}. The dense model with the same "
        f"number of parameters answers {r.dense_accuracy[i]:.0%}; chance is {1 / r.entities:.0%}."
    )


def sudoku_summary(r: SudokuResults) -> str:
    """Summarize the results on Sudokus."""
    hardest, easiest = r.solved[-1], r.solved[0]
    few, trained = r.loops.index(4), r.loops.index(r.trained_loops)
    return (
        f"Sudokus of 6 x 6, mostly trained at {r.trained_loops} loops: of the puzzles that need a "
        f"guess the looped model solves {hardest[few]:.0%} with {r.loops[few]} loops, "
        f"{hardest[trained]:.0%} with {r.trained_loops} and {hardest[-1]:.0%} with {r.loops[-1]}; "
        f"of the easiest {easiest[few]:.0%} with {r.loops[few]}. The dense model with the same "
        f"number of parameters solves {r.dense_solved[-1]:.0%} and {r.dense_solved[0]:.0%}."
    )


def text_summary(r: TextResults) -> str:
    """Summarize the results on text."""
    trained, deepest = r.bits_at(r.trained_depth), r.depths[-1]
    drift = r.bits_at(2 * r.trained_depth) / trained - 1
    versus, equal = trained / r.dense_bits - 1, r.flops_bits / trained - 1
    return (
        f"Source text: the looped model needs {r.bits_at(1):.3f} bits per byte with one loop and "
        f"{trained:.3f} with {r.trained_depth}, the depth of most of its training; that is "
        f"{abs(versus):.1%} {_direction(versus)} than the {r.dense_bits:.3f} of the dense model "
        f"with the same number of parameters. The dense model of equal training FLOPs "
        f"({r.flops.parameters / r.looped.parameters:.1f} times the parameters) needs "
        f"{r.flops_bits:.3f}, {abs(equal):.1%} {_direction(equal)} than the looped one. Twice the "
        f"depth costs {drift:+.1%}, {deepest} loops "
        f"{r.bits_at(deepest) / trained - 1:+.1%}. rho(A) is {r.rho:.3f}."
    )


def _direction(change: float) -> str:
    return "fewer" if change < 0 else "more"


def note(depth: int, r: TextResults) -> str:
    """Describe a depth in a table."""
    if depth > 2 * r.trained_depth:
        return "deeper than ever trained"
    return "most of training" if depth == r.trained_depth else ""
