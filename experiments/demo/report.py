"""Write the demo's report, a self-contained HTML file."""

from __future__ import annotations

import base64
from pathlib import Path

from experiments.demo.results import DemoResults
from open_mythos.reports.html import heatmap, render, table, write_html


def write_report(results: DemoResults, picture: Path, path: Path) -> None:
    """Write the page with the plot embedded."""
    r = results
    overlaps = [row[t + 1] for t, row in enumerate(r.expert_overlap[:-1])]
    samples = {f"looped, {depth} loops": text for depth, text in r.samples.items()}
    page = render(
        "report.html", Path(__file__).parent,
        title="OpenMythos demo: adjustable depth", r=r, hop_summary=hop_summary(r),
        summary=text_summary(r), picture=base64.b64encode(picture.read_bytes()).decode(),
        depths=table(
            ("loops", "bits per byte", "against dense", ""),
            [(depth, f"{bits:.4f}", f"{bits - r.dense_bits:+.4f}", _seen(depth, r))
             for depth, bits in zip(r.depths, r.looped_bits, strict=True)]
            + [("dense", f"{r.dense_bits:.4f}", "", "")],
            r.best_depth,
        ),
        models=table(
            ("task", "model", "parameters", "active per token", "train MFLOPs / token", "seconds"),
            [(task, c.label, c.parameters, c.active_parameters, f"{c.training_flops / 1e6:.1f}",
              round(c.seconds))
             for task, c in (("chains", r.hop_looped_run), ("chains", r.hop_dense_run),
                             ("text", r.looped), ("text", r.dense))],
        ),
        experts=heatmap(r.expert_load, max(map(max, r.expert_load))),
        even=1 / len(r.expert_load[0]), overlap=sum(overlaps) / len(overlaps),
        samples=samples | {"dense": r.dense_sample},
    )  # fmt: skip
    write_html(page, path)


def hop_summary(r: DemoResults) -> str:
    """Summarize the results on chains."""
    i, deepest = r.hops.index(r.asked_hops), r.hop_loops[-1]
    few, many, most = (
        r.hop_accuracy_at(loops)[i] for loops in (r.trained_hops, r.chosen_loops, deepest)
    )
    return (
        f"Chains of {r.asked_hops} relations, trained on {r.trained_hops} at most: the looped "
        f"model answers {few:.0%} with {r.trained_hops} loops, {many:.0%} with {r.chosen_loops} "
        f"and {most:.0%} with {deepest}, from the same weights. With early exit it answers "
        f"{r.exit_accuracy[i]:.0%} with {r.exit_loops[i]:.1f} loops on average, and uses "
        f"{r.exit_loops[0]:.1f} on chains of {r.hops[0]}. The dense model with the same "
        f"number of parameters answers {r.hop_dense[i]:.0%}; chance is {1 / r.entities:.0%}."
    )


def text_summary(r: DemoResults) -> str:
    """Summarize the results on text."""
    at = dict(zip(r.depths, r.looped_bits, strict=True))
    best, deepest = r.best_depth, r.depths[-1]
    gain = (at[1] - at[best]) / at[1]
    drift = at[deepest] - at[best]
    versus = (at[best] - r.dense_bits) / r.dense_bits
    direction = "fewer" if versus < 0 else "more"
    return (
        f"Source text: the looped model needs {at[1]:.3f} bits per byte with one loop and "
        f"{at[best]:.3f} with {best}, {gain:.1%} fewer, from the same weights; that is "
        f"{abs(versus):.1%} {direction} than the dense model's {r.dense_bits:.3f}. At {deepest} "
        f"loops, {deepest // r.mean_depth} times the mean depth in training, it needs "
        f"{at[deepest]:.3f} ({drift:+.3f} from its best). rho(A) is {r.rho:.3f}."
    )


def _seen(depth: int, r: DemoResults) -> str:
    if depth > r.max_depth:
        return "deeper than ever trained"
    return "mean of training" if depth == r.mean_depth else ""
