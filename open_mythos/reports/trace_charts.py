"""The page's pictures as SVG; colours and highlighting are the style sheet's and the script's."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape
from itertools import pairwise

from open_mythos.reports.trace_record import PromptTrace, TokenTrace
from open_mythos.reports.words import visible

WIDTH, HEIGHT = 480, 340
LABELLED = 24
"""With more tokens than this, only the chosen one's path has its name beside it."""


def paths(trace: PromptTrace) -> str:
    """The way of every token's state through the plane of the two principal components."""
    points = [point for token in trace.tokens for point in token.path]
    xs, ys = zip(*points, strict=True)
    # one scale for both directions: distances in the picture are distances in the plane
    span = max(max(xs) - min(xs), (max(ys) - min(ys)) * (WIDTH - 80) / (HEIGHT - 60), 1e-9)
    scale = (WIDTH - 80) / span

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = WIDTH / 2 + (point[0] - (max(xs) + min(xs)) / 2) * scale
        y = (HEIGHT - 20) / 2 - (point[1] - (max(ys) + min(ys)) / 2) * scale
        return round(x, 1), round(y, 1)

    named = len(trace.tokens) <= LABELLED
    ways = "".join(
        _way(i, token, [place(point) for point in token.path], _hue(i, len(trace.tokens)))
        for i, token in enumerate(trace.tokens)
    )
    shares = "first component {:.0%} of the variance, second {:.0%}".format(*trace.explained)
    return _svg(
        f'{ways}<text class="axis" x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{shares}</text>",
        WIDTH, HEIGHT, "Paths of the states in two dimensions", "paths named" if named else "paths",
    )  # fmt: skip


def _way(i: int, token: TokenTrace, places: list[tuple[float, float]], hue: int) -> str:
    line = " ".join(f"{x},{y}" for x, y in places)
    dots = "".join(
        f'<circle data-t="{t}" cx="{x}" cy="{y}" r="{2 if t else 1.5}"/>'
        for t, (x, y) in enumerate(places)
    )
    x, y = places[-1]
    side, anchor = (-7, "end") if x > 0.8 * WIDTH else (7, "start")
    return (
        f'<g class="way" data-i="{i}" style="--hue:{hue}"><polyline points="{line}"/>{dots}'
        f'<text x="{x + side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">'
        f"{escape(visible(token.text))}</text></g>"
    )


def changes(trace: PromptTrace) -> str:
    """The relative change of every token's state at each loop, on a logarithmic scale."""
    moved = [c for token in trace.tokens for c in token.change if c > 0] or [1.0]
    low, high = math.floor(math.log10(max(min(moved), 1e-8))), math.ceil(math.log10(max(moved)))
    high = max(high, low + 1)
    left, right, top, bottom = 52, WIDTH - 14, 12, HEIGHT - 42

    def place(t: int, change: float) -> tuple[float, float]:
        x = left + (right - left) * (t / max(1, trace.n_loops - 1))
        level = math.log10(min(max(change, 10.0**low), 10.0**high))
        return round(x, 1), round(top + (bottom - top) * (high - level) / (high - low), 1)

    grid = "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{place(0, 10.0**k)[1]}" '
        f'y2="{place(0, 10.0**k)[1]}"/><text class="axis" x="{left - 6}" text-anchor="end" '
        f'y="{place(0, 10.0**k)[1] + 4}">{_power(k)}</text>'
        for k in range(low, high + 1)
    )
    loops = _ticks(trace.n_loops)
    grid += "".join(
        f'<text class="axis" x="{place(t - 1, 1)[0]}" y="{HEIGHT - 24}" text-anchor="middle">{t}'
        "</text>"
        for t in loops
    )
    lines = "".join(
        f'<g class="way" data-i="{i}" style="--hue:{_hue(i, len(trace.tokens))}"><polyline points="'
        + " ".join("{},{}".format(*place(t, c)) for t, c in enumerate(token.change))
        + '"/>'
        + "".join(
            '<circle data-t="{}" cx="{}" cy="{}" r="2"/>'.format(t + 1, *place(t, c))
            for t, c in enumerate(token.change)
        )
        + "</g>"
        for i, token in enumerate(trace.tokens)
    )
    axis = f'<text class="axis" x="{(left + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
    return _svg(
        f"{grid}{lines}{axis}loop</text>", WIDTH, HEIGHT,
        "Relative change of the state at each loop", "changes",
    )  # fmt: skip


def hops(trace: PromptTrace) -> str:
    """When each entity of a chain appears, beside one hop per loop."""
    cell, row, left, bottom = 40, 20, 64, 54
    width = left + cell * len(trace.tokens) + 12
    height = row * trace.n_loops + bottom + 10

    def middle(i: int, loop: float) -> tuple[float, float]:
        return left + cell * (i + 0.5), 10 + row * (trace.n_loops - loop + 0.5)

    parts = [
        f'<text class="axis" x="{left - 8}" y="{middle(0, t)[1] + 4}" text-anchor="end">{t}</text>'
        for t in _ticks(trace.n_loops)
    ]
    for up, name in ((38, "token"), (22, "entity"), (6, "hops")):
        parts.append(
            f'<text class="axis" x="{left - 8}" y="{height - up}" text-anchor="end">{name}</text>'
        )
    for i, token in enumerate(trace.tokens):
        x, _ = middle(i, 1)
        parts.append(_hop_names(token, x, height))
        for t, p in enumerate(token.goal_probability, start=1):
            parts.append(
                f'<rect class="heat" data-i="{i}" data-t="{t}" x="{x - cell / 2 + 1}" '
                f'y="{middle(i, t)[1] - row / 2 + 1}" width="{cell - 2}" height="{row - 2}" '
                f'style="--p:{p:.3f}"/>'
            )
    for name, loops in (("expected", _expected), ("found", _found)):
        points = [(i, loops(token, trace.n_loops)) for i, token in enumerate(trace.tokens)]
        parts.append(_steps(name, [(i, t) for i, t in points if t], middle))
    parts.append(
        f'<text class="axis" transform="translate(12 {middle(0, trace.n_loops / 2)[1]}) '
        f'rotate(-90)" text-anchor="middle">loop</text>'
    )
    return _svg(
        "".join(parts), width, height, "The loop at which each entity of the chain appears", "hops"
    )


def _hop_names(token: TokenTrace, x: float, height: int) -> str:
    goal = "" if token.goal is None else token.goal
    return (
        f'<text class="axis strong" x="{x}" y="{height - 38}" text-anchor="middle">'
        f"{escape(token.text)}</text>"
        f'<text class="axis" x="{x}" y="{height - 22}" text-anchor="middle">{escape(goal)}</text>'
        f'<text class="axis" x="{x}" y="{height - 6}" text-anchor="middle">'
        f"{'' if token.hops is None else token.hops}</text>"
    )


def _expected(token: TokenTrace, n_loops: int) -> int | None:
    return token.hops if token.hops is not None and token.hops <= n_loops else None


def _found(token: TokenTrace, n_loops: int) -> int | None:
    return token.right_from


def _steps(
    name: str, points: list[tuple[int, int]], middle: Callable[[int, float], tuple[float, float]]
) -> str:
    """Marks at (token, loop), joined where the tokens are neighbours."""
    lines = "".join(
        '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>'.format(name, *middle(*a), *middle(*b))
        for a, b in pairwise(points)
        if b[0] == a[0] + 1
    )
    radius = 7 if name == "expected" else 4
    marks = (middle(*point) for point in points)
    return lines + "".join(
        f'<circle class="{name}" cx="{x}" cy="{y}" r="{radius}"/>' for x, y in marks
    )


def experts(trace: PromptTrace, layer: int) -> str:
    """The share of the tokens that chose each expert at each loop, in one mixture layer."""
    cell, left, bottom, n = 22, 46, 40, trace.n_experts
    width, height = left + cell * n + 10, cell * trace.n_loops + bottom + 8
    parts = []
    for t in range(trace.n_loops):
        y = 8 + cell * t
        parts.append(
            f'<text class="axis" x="{left - 8}" y="{y + 15}" text-anchor="end">{t + 1}</text>'
        )
        chosen = [token.experts[t][layer] for token in trace.tokens]
        for e in range(n):
            share = sum(e in each for each in chosen) / len(chosen)
            parts.append(
                f'<rect class="heat" data-t="{t + 1}" data-e="{e}" x="{left + cell * e + 1}" '
                f'y="{y + 1}" width="{cell - 2}" height="{cell - 2}" style="--p:{share:.3f}">'
                f"<title>expert {e}, loop {t + 1}: {share:.0%} of the tokens</title></rect>"
            )
    ticks = range(0, n, max(1, n // 16))
    parts += [
        f'<text class="axis" x="{left + cell * (e + 0.5)}" y="{height - 22}" '
        f'text-anchor="middle">{e}</text>'
        for e in ticks
    ]
    parts.append(
        f'<text class="axis" x="{left + cell * n / 2}" y="{height - 6}" text-anchor="middle">expert'
        f'</text><text class="axis" transform="translate(12 {8 + cell * trace.n_loops / 2}) '
        'rotate(-90)" text-anchor="middle">loop</text>'
    )
    return _svg("".join(parts), width, height, "Experts chosen at each loop", "experts")


def _svg(content: str, width: float, height: float, label: str, kind: str) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{label}" style="max-width:{1.35 * width:.0f}px">{content}</svg>'
    )


def _hue(i: int, count: int) -> int:
    """From blue by green to orange, along the prompt."""
    return round(215 - 190 * i / max(1, count - 1))


def _ticks(n_loops: int) -> list[int]:
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 1 << 30) if n_loops / step <= 16)
    return [t for t in range(1, n_loops + 1) if t == 1 or t % every == 0]


def _power(k: int) -> str:
    return f"{10.0**k:g}" if -3 <= k <= 3 else f"1e{k}"
