"""Sections of a run's report about the loop: depth, states, spectrum, routing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from open_mythos.model.layers.injection import MAX_DECAY
from open_mythos.reports.figures import Line, bars, curves, depth_curve, has_values, ramp
from open_mythos.reports.html import heatmap, missing, table
from open_mythos.reports.run_record import RunRecord, Series, number
from open_mythos.train.setting import described_run

_MOST_LINES = 7
_BINS = 24
_COLLAPSE = 0.85


class Panel(NamedTuple):
    """A figure or table."""

    title: str
    about: str
    body: Markup


def sections(run: RunRecord) -> list[tuple[str, list[Panel]]]:
    """Return the title and panels of each section; one sentence for a dense model."""
    if not run.looped:
        rows = measured(run)
        at = f" Its validation loss is {rows[0]['loss']:.4f} nats per token." if rows else ""
        return [("Depth", [_empty(f"A dense model has no loops.{at}")])]
    return [
        ("Depth", [_loss_against_depth(run), *_last_evaluation(run), _depths_that_ran(run)]),
        ("States in the loop", _states(run)),
        ("Spectrum of A", _spectrum(run)),
        ("Routing", _routing(run)),
    ]


def measured(run: RunRecord) -> list[dict[str, Any]]:
    """Return rows of depth, loss and, if known, bits per byte: those of the last evaluation, or of
    the record of validated depths if it has more.
    """
    rows = _finite(run.evaluations[max(run.evaluations)]) if run.evaluations else []
    record = _finite((run.depths or {}).get("rows", []))
    if len(record) <= len(rows):
        return rows
    known = (row for row in rows if number(row.get("bits_per_byte")) and row["loss"])
    scale = next((row["bits_per_byte"] / row["loss"] for row in known), None)
    return [
        {**row, "bits_per_byte": None if scale is None else scale * row["loss"]} for row in record
    ]


def row_at_mean(run: RunRecord) -> dict[str, Any] | None:
    """Return the row of :func:`measured` nearest to the mean training depth."""
    rows, mean = measured(run), run.mean_depth
    if mean is None or any(row.get("depth") is None for row in rows):
        return rows[0] if rows else None
    return min(rows, key=lambda row: abs(row["depth"] - mean), default=None)


def drawn(title: str, about: str, lines: Sequence[Line], **options: Any) -> list[Panel]:
    """Return a panel with :func:`curves`; none if no value can be drawn."""
    if not has_values(lines, positive="log" in options):
        return []
    return [Panel(title, about, curves(lines, title, **options))]


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Select rows with a finite loss and a depth of at least 1 or None."""
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and number(row.get("loss")) is not None
        and (row.get("depth") is None or (number(row["depth"]) or 0) >= 1)
    ]


def _loss_against_depth(run: RunRecord) -> Panel:
    title, record = "Loss against depth", run.depths or {}
    evaluations = [_points(rows) for _, rows in sorted(run.evaluations.items())]
    last = _points(record.get("rows", [])) or (evaluations[-1] if evaluations else [])
    if not last:
        return _empty(
            "No evaluation yet: train.eval_every is 0, the run has not ended, or there is no "
            "validation data.", title,
        )  # fmt: skip
    valid, limit = run.valid_range, run.loss_limit
    about = ["Validation loss, nats per token, with the same weights."]
    if valid is not None:
        about.append(f"Green: validated, {valid[0]} to {valid[1]} loops.")
    if limit is not None:
        about.append(f"Dashed: best + {record['tolerance']:g}.")
    if run.mean_depth is not None:
        about.append(f"Dotted: mean training depth, {run.mean_depth:g}.")
    if record.get("holds_at_twice_the_mean") is False:
        about.append("At twice the mean depth the loss exceeds the limit.")
    earlier = [points for points in evaluations[:-1] if points]
    if earlier:
        about.append("Faint: earlier evaluations.")
    figure = depth_curve(
        last, title, earlier=earlier, valid=valid, mean=run.mean_depth, limit=limit
    )
    return Panel(title, " ".join(about), figure)


def _points(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
    return [(row["depth"], row["loss"]) for row in _finite(rows) if row.get("depth")]


def _last_evaluation(run: RunRecord) -> list[Panel]:
    rows = measured(run)
    if not rows:
        return []
    best = min(rows, key=lambda row: row["loss"])
    about = f"At step {max(run.evaluations):,}, {_setting(run)}; b" if run.evaluations else "B"
    body = table(
        ("loops", "nats per token", "bits per byte"),
        [(row.get("depth"), _decimals(row["loss"]), _decimals(row.get("bits_per_byte")))
         for row in rows],
        best.get("depth"),
    )  # fmt: skip
    return [Panel("Last evaluation", f"{about}old: the smallest loss.", body)]


def _setting(run: RunRecord) -> str:
    """Say how the run evaluates itself."""
    found = described_run(run.config)
    if found is None:
        return "in an unknown setting"
    masks = " within documents" if found["document_masks"] else ""
    return (
        f"{found['weights']} weights, {found['dtype']}, at most {found['windows']:,} sequences of "
        f"{found['seq_len']:,} tokens{masks} of {found['data'] or 'the text of the run'}"
    )


def _decimals(value: Any) -> str:
    x = number(value)
    return "" if x is None else f"{x:.4f}"


def _depths_that_ran(run: RunRecord) -> Panel:
    total: list[int] = []
    for line in run.steps.values():
        counts = line.get("depth_histogram")
        if isinstance(counts, list) and all(isinstance(n, int) for n in counts):
            total = [a + b for a, b in zip_longest(total, counts, fillvalue=0)]
    title = "Training depths"
    if not sum(total):
        return _empty("No depths were logged.", title)
    mean = sum(loops * n for loops, n in enumerate(total, start=1)) / sum(total)
    about = f"Sequences of the logged steps by number of loops; {mean:.2f} on average."
    return Panel(title, about, bars(range(1, len(total) + 1), total, title, "loops"))


def _states(run: RunRecord) -> list[Panel]:
    norms, deltas, alike = map(run.by_loop, ("state_norm", "delta_norm", "token_correlation"))
    relative: dict[int, Series] = {}
    for loop, points in deltas.items():
        at = dict(norms.get(loop, []))
        relative[loop] = [(step, d / at[step]) for step, d in points if at.get(step)]
    panels = [
        *_by_loop("Norm of the state", "Mean over tokens, after each loop.", norms, zero=True),
        *_by_loop(
            "Change by each loop",
            "Norm of the update over norm of the state. Falling over loops: the states converge.",
            relative, log=True,
        ),
        *_by_loop(
            "Similarity of the tokens",
            "Mean cosine similarity between token states; above the dashed line they collapse.",
            alike, bound=_COLLAPSE,
        ),
        *drawn(
            "Gain from looping",
            "(Loss with 1 loop - loss with the mean number of loops) / the latter, in training.",
            [Line(run.curve("loop_gap"))], bound=0.0,
        ),
    ]  # fmt: skip
    return panels or [_empty("No states were logged.")]


def _spectrum(run: RunRecord) -> list[Panel]:
    about = f"rho(A), the slowest channel; bounded by {MAX_DECAY} (dashed)."
    panels = drawn("Spectral radius", about, [Line(run.curve("rho"))], bound=MAX_DECAY)
    title, checkpoint = "Decays", run.checkpoint
    if checkpoint is None or checkpoint.problem:
        return [*panels, _empty("There is no checkpoint whose weights can be read.", title)]
    decays = checkpoint.decays
    if not decays:
        return panels or [_empty("This model's injection has no matrix A.")]
    counts, edges = np.histogram(decays, _BINS, (0, 1))
    about = (
        f"Channels by their decay factor in A per loop, at step {checkpoint.step:,}: "
        f"{decays[0]:.3f} to {decays[-1]:.3f}, median {decays[len(decays) // 2]:.3f}."
    )
    centers = (edges[:-1] + 0.5 / _BINS).tolist()
    figure = bars(centers, counts.tolist(), title, "decay per loop", width=1 / _BINS)
    return [*panels, Panel(title, about, figure)]


def _routing(run: RunRecord) -> list[Panel]:
    panels: list[Panel] = []
    for layer in run.layers("router_entropy"):
        shares = run.latest(f"router_share/layer{layer}")
        title = f"Layer {layer}: experts by loop"
        if _is_matrix(shares):
            even = 1 / len(shares[0])
            about = f"Percent of each loop's routing choices, last logged; uniform is {even:.1%}."
            panels.append(Panel(title, about, heatmap(shares, 2 * even)))
        else:
            text = "Expert load is logged with evaluations and checkpoints; there were none yet."
            panels.append(_empty(text, title))
        about = "Entropy of the expert load over log E: 1 is uniform, 0 a single expert."
        entropy = run.by_loop(f"router_entropy/layer{layer}")
        panels += _by_loop(f"Layer {layer}: balance", about, entropy, zero=True, bound=1.0)
    return panels or [_empty("No routing was logged.")]


def _empty(text: str, title: str = "") -> Panel:
    return Panel(title, "", missing(text))


def _is_matrix(shares: Any) -> bool:
    return (
        isinstance(shares, list)
        and bool(shares)
        and all(isinstance(row, list) and len(row) == len(shares[0]) > 0 for row in shares)
        and all(number(x) is not None for row in shares for x in row)
    )


def _by_loop(title: str, about: str, series: dict[int, Series], **options: Any) -> list[Panel]:
    """Return a panel with curves of at most seven loops, without rarely used ones."""
    most = max(map(len, series.values()), default=0)
    loops = [loop for loop, points in series.items() if 5 * len(points) >= most]
    count = min(len(loops), _MOST_LINES)
    shown = sorted({loops[round(i * (len(loops) - 1) / max(1, count - 1))] for i in range(count)})
    lines = [Line(series[loop], ramp(loop - 1, max(shown)), str(loop)) for loop in shown]
    return drawn(title, about, lines, legend="loop", **options)
