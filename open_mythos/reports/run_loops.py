"""The part of the page about the loop: depth, states, spectrum, routing."""

from __future__ import annotations

from html import escape
from typing import Any

from open_mythos.model.layers.injection import MAX_DECAY
from open_mythos.reports.run_charts import Line, bars, curves, depth_curve, heat, hue
from open_mythos.reports.run_record import RunRecord, number

_MOST_LINES = 7
_BINS = 24
_COLLAPSE = 0.85


def sections(run: RunRecord) -> str:
    """Everything about the loop; one sentence for a dense model."""
    if not run.looped:
        rows = measured(run)
        at = f" Its validation loss is {rows[0]['loss']:.4f} nats per token." if rows else ""
        return _section("Depth", _missing(f"A dense model has no loops.{at}"))
    return (
        _section("Depth", _depth(run))
        + _section("States in the loop", _states(run))
        + _section("Spectrum of A", _spectrum(run))
        + _section("Routing", _routing(run))
    )


def best_row(run: RunRecord) -> dict[str, Any] | None:
    """The row with the smallest loss of those that :func:`measured` gives."""
    return min(measured(run), key=lambda row: row["loss"], default=None)


def row_at_mean(run: RunRecord) -> dict[str, Any] | None:
    """The row nearest to the mean training depth."""
    rows, mean = measured(run), run.mean_depth
    if mean is None or any(row.get("depth") is None for row in rows):
        return rows[0] if rows else None
    return min(rows, key=lambda row: abs(row["depth"] - mean), default=None)


def measured(run: RunRecord) -> list[dict[str, Any]]:
    """Depth, loss and, where bytes are known, bits per byte: of the record of validated depths, or
    of the last evaluation. Rows with a finite loss only."""
    rows = _finite(run.evaluations[max(run.evaluations)]) if run.evaluations else []
    record = _finite((run.depths or {}).get("rows", []))
    if len(record) <= len(rows):
        return rows
    scale = next((row["bits_per_byte"] / row["loss"] for row in rows if _bits(row)), None)
    return [
        {**row, "bits_per_byte": None if scale is None else scale * row["loss"]} for row in record
    ]


def counted(loops: float) -> str:
    """ "1 loop", "4 loops"."""
    return f"{loops:g} loop" if loops == 1 else f"{loops:g} loops"


def _bits(row: dict[str, Any]) -> bool:
    return number(row.get("bits_per_byte")) is not None and row["loss"] != 0


def _finite(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose loss is a number, and whose depth is one if they have any."""
    return [
        row
        for row in rows
        if isinstance(row, dict)
        and number(row.get("loss")) is not None
        and (row.get("depth") is None or (number(row["depth"]) or 0) >= 1)
    ]


def _depth(run: RunRecord) -> str:
    parts = [_loss_against_depth(run), _last_evaluation(run), _depths_that_ran(run)]
    return f'<div class="pair">{"".join(parts)}</div>'


def _loss_against_depth(run: RunRecord) -> str:
    curves_by_step = {
        step: [(row["depth"], row["loss"]) for row in _finite(rows) if row.get("depth")]
        for step, rows in run.evaluations.items()
    }
    record = run.depths or {}
    rows = [(row["depth"], row["loss"]) for row in _finite(record.get("rows", []))]
    last = rows or (curves_by_step[max(curves_by_step)] if curves_by_step else [])
    if not last:
        return _box(
            "Loss against depth",
            _missing(
                "No evaluation yet: train.eval_every is 0, or the "
                "run has not come to its end. Without validation data there is none."
            ),
        )
    valid, limit = run.valid_range, run.loss_limit
    said = "Validation loss, nats per token, with the same weights."
    if valid is not None:
        said += f" Green: validated, {valid[0]} to {valid[1]} loops."
    if limit is not None:
        said += f" Dashed: best + {record['tolerance']:g}."
    if run.mean_depth is not None:
        said += f" Dotted: mean depth of the training, {run.mean_depth:g}."
    if record.get("holds_at_twice_the_mean") is False:
        said += " At twice the mean depth the loss is out of bounds."
    earlier = [points for _, points in sorted(curves_by_step.items())[:-1] if points]
    if earlier:
        said += " Faint: earlier evaluations."
    chart = depth_curve(
        last, "Loss against depth", earlier=earlier, valid=valid, mean=run.mean_depth, limit=limit
    )
    return _box("Loss against depth", chart, said)


def _last_evaluation(run: RunRecord) -> str:
    rows = measured(run)
    if not rows:
        return ""
    best = min(row["loss"] for row in rows)
    cells = ""
    for row in rows:
        shown = "n set" if row["loss"] == best else "n"
        cells += (
            f'<tr><td class="n">{escape(str(row.get("depth")))}</td>'
            f'<td class="{shown}">{row["loss"]:.4f}</td>'
            f'<td class="n">{_decimals(row.get("bits_per_byte"))}</td></tr>'
        )
    at = f"At step {max(run.evaluations):,}; b" if run.evaluations else "B"
    said = f"{at}old: the smallest loss."
    head = "<tr><th>loops</th><th>nats per token</th><th>bits per byte</th></tr>"
    return _box("Last evaluation", f"<table>{head}{cells}</table>", said)


def _decimals(value: Any) -> str:
    x = number(value)
    return "" if x is None else f"{x:.4f}"


def _depths_that_ran(run: RunRecord) -> str:
    total: list[int] = []
    for line in run.steps.values():
        counts = line.get("depth_histogram")
        if isinstance(counts, list) and all(isinstance(n, int) for n in counts):
            total += [0] * (len(counts) - len(total))
            total = [n + (counts[i] if i < len(counts) else 0) for i, n in enumerate(total)]
    if not sum(total):
        return _box("Depths that ran", _missing("No depth was logged."))
    mean = sum(loops * n for loops, n in enumerate(total, start=1)) / sum(total)
    chart = bars(
        total, [str(i) for i in range(1, len(total) + 1)], "Depths that ran", "loops", "sequences"
    )
    said = f"Sequences of the logged steps by their number of loops; {mean:.2f} on average."
    return _box("Depths that ran", chart, said)


def _states(run: RunRecord) -> str:
    boxes = []
    norms, deltas = run.by_loop("state_norm"), run.by_loop("delta_norm")
    if not norms:
        return _missing("No state was logged.")
    shown = _some(norms)
    legend = '<ul class="legend"><li><i class="ramp"></i>first to last loop</li></ul>'
    chart = curves(_by_loop(norms, shown), "Norm of the state after each loop", zero=True)
    boxes.append(_box("Norm of the state", chart, "Mean over tokens, after each loop."))
    share: dict[int, list[tuple[int, float]]] = {}
    for loop, points in deltas.items():
        at = dict(norms.get(loop, []))
        share[loop] = [(step, d / at[step]) for step, d in points if d > 0 and at.get(step)]
    if any(share.values()):
        chart = curves(_by_loop(share, shown), "Relative change made by each loop", log=True)
        said = "Length of the step over length of the state. Falling by loop: the states settle."
        boxes.append(_box("What each loop changes", chart, said))
    alike = run.by_loop("token_correlation")
    if alike:
        chart = curves(
            _by_loop(alike, shown),
            "Correlation of tokens",
            bound=_COLLAPSE,
            zero=_all_positive(alike),
        )
        said = "Mean cosine between the states of two tokens; above the dashed line they collapse."
        boxes.append(_box("Likeness of the tokens", chart, said))
    gap = run.curve("loop_gap")
    if gap:
        chart = curves([Line(gap)], "What the loops are worth", bound=0.0)
        said = "(Loss with 1 loop - loss with the mean number of loops) / the latter, in training."
        boxes.append(_box("What the loops are worth", chart, said))
    return f'{legend}<div class="pair">{"".join(boxes)}</div>'


def _all_positive(by_loop: dict[int, list[tuple[int, float]]]) -> bool:
    return all(value >= 0 for points in by_loop.values() for _, value in points)


def _spectrum(run: RunRecord) -> str:
    boxes = []
    rho = run.curve("rho")
    if rho:
        chart = curves([Line(rho)], "Spectral radius of A", bound=MAX_DECAY)
        said = f"rho(A), the slowest channel; it cannot pass {MAX_DECAY} (dashed)."
        boxes.append(_box("Spectral radius", chart, said))
    decays = run.checkpoint.decays if run.checkpoint else []
    if decays:
        assert run.checkpoint is not None
        counts = [0] * _BINS
        for decay in decays:
            counts[min(_BINS - 1, int(decay * _BINS))] += 1
        names = [f"{i / _BINS:.2f}" for i in range(_BINS)]
        half = decays[len(decays) // 2]
        said = (
            f"Channels by what A leaves of them in one loop, at step {run.checkpoint.step:,}: "
            f"{decays[0]:.3f} to {decays[-1]:.3f}, median {half:.3f}."
        )
        boxes.append(
            _box("Decays", bars(counts, names, "Decays of A", "decay per loop", "channels"), said)
        )
    else:
        boxes.append(
            _box(
                "Decays",
                _missing(
                    "They are read from a checkpoint, and there is none whose weights can be read."
                ),
            )
        )
    return f'<div class="pair">{"".join(boxes)}</div>'


def _routing(run: RunRecord) -> str:
    layers = run.layers("router_entropy")
    if not layers:
        return _missing("This model routes nothing, or no routing was logged.")
    boxes = []
    for layer in layers:
        shares = run.latest(f"router_share/layer{layer}")
        title = f"Layer {layer}: experts by loop"
        if _is_table(shares):
            even = 1 / len(shares[0])
            said = f"Share of each loop's choices; even is {even:.1%}. Last logged."
            boxes.append(_box(title, f'<div class="scroll">{heat(shares, title)}</div>', said))
        else:
            boxes.append(
                _box(
                    title,
                    _missing(
                        "Shares are logged with evaluations and checkpoints; there was none yet."
                    ),
                )
            )
        entropy = run.by_loop(f"router_entropy/layer{layer}")
        if entropy:
            title = f"Layer {layer}: evenness"
            lines = _by_loop(entropy, _some(entropy))
            said = "Entropy of the load over log E: 1 is even, 0 a single expert."
            boxes.append(_box(title, curves(lines, title, zero=True, bound=1.0), said))
    legend = '<ul class="legend"><li><i class="ramp"></i>first to last loop</li></ul>'
    return f'{legend}<div class="pair">{"".join(boxes)}</div>'


def _is_table(shares: Any) -> bool:
    return (
        isinstance(shares, list)
        and bool(shares)
        and all(isinstance(row, list) and len(row) == len(shares[0]) > 0 for row in shares)
        and all(number(x) is not None for row in shares for x in row)
    )


def _some(by_loop: dict[int, list[tuple[int, float]]]) -> list[int]:
    """A few of the loops, the first and the last among them; none that hardly ever ran."""
    most = max(map(len, by_loop.values()))
    loops = [loop for loop, points in by_loop.items() if 5 * len(points) >= most]
    count = min(len(loops), _MOST_LINES)
    return sorted({loops[round(i * (len(loops) - 1) / max(1, count - 1))] for i in range(count)})


def _by_loop(values: dict[int, list[tuple[int, float]]], shown: list[int]) -> list[Line]:
    most = max(shown)
    return [
        Line(values[loop], hue(loop - 1, most), str(loop)) for loop in shown if values.get(loop)
    ]


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _box(title: str, content: str, about: str = "") -> str:
    return f"<div><h3>{escape(title)}</h3><p>{escape(about)}</p>{content}</div>"


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
