"""The demo's report: one HTML file that needs no other."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.demo.results import DemoResults


def write_report(results: DemoResults, picture: Path, path: Path) -> None:
    """Write the page to ``path``, with the picture inside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    overlaps = [row[t + 1] for t, row in enumerate(results.expert_overlap[:-1])]
    samples = {f"looped, {depth} loops": text for depth, text in results.samples.items()}
    page = environment.get_template("report.html").render(
        r=results,
        hop_summary=hop_summary(results),
        text_summary=text_summary(results),
        picture=base64.b64encode(picture.read_bytes()).decode(),
        overlap=sum(overlaps) / len(overlaps),
        samples=samples | {"dense": results.dense_sample},
    )
    path.write_text(page, encoding="utf-8")


def hop_summary(r: DemoResults) -> str:
    """Say what depth did for the chains."""
    i, deepest = r.hops.index(r.asked_hops), r.hop_loops[-1]
    few, many, most = (
        r.hop_accuracy_at(loops)[i] for loops in (r.trained_hops, r.chosen_loops, deepest)
    )
    return (
        f"Chains of {r.asked_hops} relations, trained on {r.trained_hops} at most: the looped "
        f"model answers {few:.0%} with {r.trained_hops} loops, {many:.0%} with {r.chosen_loops} "
        f"and {most:.0%} with {deepest}, from the same weights. Left to stop by itself it answers "
        f"{r.exit_accuracy[i]:.0%} with {r.exit_loops[i]:.1f} loops on average, and runs "
        f"{r.exit_loops[0]:.1f} on chains of {r.hops[0]}. The dense model of as many parameters "
        f"answers {r.hop_dense[i]:.0%}; guessing gives {1 / r.entities:.0%}."
    )


def text_summary(r: DemoResults) -> str:
    """Say what depth did for the text."""
    at = dict(zip(r.depths, r.looped_bits, strict=True))
    best, deepest = r.best_depth, r.depths[-1]
    gain = (at[1] - at[best]) / at[1]
    drift = at[deepest] - at[best]
    versus = (at[best] - r.dense_bits) / r.dense_bits
    direction = "fewer" if versus < 0 else "more"
    return (
        f"Source text: the looped model needs {at[1]:.3f} bits per byte with one loop and "
        f"{at[best]:.3f} with "
        f"{best}, {gain:.1%} fewer, from the same weights; {abs(versus):.1%} {direction} than "
        f"the dense model's {r.dense_bits:.3f}. At {deepest} loops, {deepest // r.mean_depth} "
        f"times the mean depth of its training, it needs {at[deepest]:.3f} ({drift:+.3f} from its "
        f"best). rho(A) is {r.rho:.3f}."
    )
