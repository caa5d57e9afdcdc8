"""The page of one prompt's trace: one HTML file without network access."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict
from typing import Any

from markupsafe import Markup

from open_mythos.reports.figures import INK, canvas, label_axes, ramp, styled, tag, to_svg
from open_mythos.reports.html import heatmap, render
from open_mythos.reports.trace_record import PromptTrace, TokenTrace


def page(trace: PromptTrace) -> str:
    """Return the page as HTML."""
    prompt = trace.prompt if len(trace.prompt) <= 40 else trace.prompt[:39] + "…"
    return render(
        "trace.html",
        title=f"{prompt}: {trace.n_loops} loops", trace=trace, summary=summary(trace),
        cell_class=_cell_class, paths=_paths(trace), changes=_changes(trace),
        experts=_experts(trace),
        data={"loops": trace.n_loops, "tokens": _without_nan(trace.tokens)},
    )  # fmt: skip


def summary(trace: PromptTrace) -> str:
    """Summarize the trace in a few sentences."""
    known = [token for token in trace.tokens if token.right]
    settled = sum(token.settled for token in trace.tokens) / len(trace.tokens)
    sentences = []
    if known:
        after_one, at_end = (sum(token.right[t] for token in known) for t in (0, -1))
        sentences.append(
            f"The most likely token is {trace.goal_name} at {after_one} of {len(known)} positions "
            f"after one loop, and at {at_end} after {trace.n_loops}."
        )
    sentences.append(f"Predictions stop changing after loop {settled:.1f} on average.")
    if trace.exit_rule:
        loops = [token.exit or trace.n_loops for token in trace.tokens]
        early = sum(t < trace.n_loops for t in loops)
        sentences.append(
            f"Under the exit rule {trace.exit_rule}, {early} of {len(loops)} positions exit before "
            f"the last loop; the mean is {sum(loops) / len(loops):.1f} loops."
        )
    return " ".join(sentences)


def _without_nan(tokens: list[TokenTrace]) -> Any:
    """Return the tokens as JSON-ready values without paths; NaN becomes None."""
    text = json.dumps([asdict(token) | {"path": None} for token in tokens])
    return json.loads(text, parse_constant=lambda _: None)


def _cell_class(token: TokenTrace, t: int) -> str:
    """Return the CSS classes of the prediction after loop ``t`` (from 1)."""
    classes, predictions = ["c"], token.predictions
    if t == 1 or predictions[t - 2][0].token != predictions[t - 1][0].token:
        classes.append("new")
    if token.right and token.right[t - 1]:
        classes.append("hit")
    if token.exit is not None and token.exit < len(predictions):
        classes += ["stop"] * (t == token.exit) + ["after"] * (t > token.exit)
    return " ".join(classes)


@styled
def _paths(trace: PromptTrace) -> Markup:
    """Draw every token's states in the plane of the two principal components."""
    figure, ax = canvas(440, 320)
    figure.set_layout_engine("none")
    ax.set_position((0.03, 0.08, 0.84, 0.89))
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid(False)
    ax.spines["bottom"].set_visible(False)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("variance: horizontal {:.0%}, vertical {:.0%}".format(*trace.explained))
    count = len(trace.tokens)
    for i, token in enumerate(trace.tokens):
        (line,) = ax.plot(*zip(*token.path, strict=True), "o-", color=ramp(i, count), markersize=4)
        tag(line, "way")
    ax.apply_aspect()
    taken: list[tuple[float, float, float]] = []
    for token in trace.tokens:
        text, place = token.text, token.path[-1]
        x, y = ax.transData.transform(place)
        end = x + 8 * len(text)
        free = all(x > b or a > end or abs(y - c) > 14 for a, b, c in taken)
        taken += [(x, end, y)] if free else []
        name = ax.annotate(
            text, place, (7, 0), textcoords="offset points", va="center", color=INK,
            parse_math=False,
        )  # fmt: skip
        tag(name, "name" if free else "name crowded")
    with warnings.catch_warnings():
        # the browser renders the text; matplotlib's font may lack characters
        warnings.filterwarnings("ignore", "Glyph")
        return to_svg(figure, "Paths of the states in two dimensions", "paths")


@styled
def _changes(trace: PromptTrace) -> Markup:
    """Draw the relative change of every token's state per loop on a logarithmic axis."""
    figure, ax = canvas(440, 320)
    ax.set_yscale("log")
    for i, token in enumerate(trace.tokens):
        moved = [change if change > 0 else math.nan for change in token.change]
        loops = range(1, len(moved) + 1)
        (line,) = ax.plot(loops, moved, "o-", color=ramp(i, len(trace.tokens)), markersize=4)
        tag(line, "way")
    label_axes(ax, "loop", x_ticks=12)
    return to_svg(figure, "Relative change of the state at each loop", "changes")


def _experts(trace: PromptTrace) -> list[Markup]:
    """Return a table of expert shares by loop for each MoE layer."""
    tables = []
    for layer in range(len(trace.tokens[0].experts[0]) if trace.tokens[0].experts else 0):
        shares = []
        for t in range(trace.n_loops):
            chosen = [token.experts[t][layer] for token in trace.tokens]
            counts = [sum(e in each for each in chosen) for e in range(trace.n_experts)]
            shares.append([count / len(chosen) for count in counts])
        tables.append(heatmap(shares, max(map(max, shares))))
    return tables
