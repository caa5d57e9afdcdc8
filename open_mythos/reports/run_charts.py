"""The page's pictures as SVG; colours are the style sheet's, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 38
MOST_POINTS = 400
"""A longer curve is drawn through the smallest and the largest value of each stretch of it."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve."""

    points: Sequence[Point]
    style: str = "a"
    """Class of its colour: "a", "b", "c", or a hue as "hue:215"."""
    name: str = ""
    """Written at its end; empty for none."""


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step at which something happened."""

    at: float
    kind: str
    """Class of its colour: an event's kind."""
    title: str
    """Shown when pointed at."""


@dataclass(frozen=True)
class Scale:
    """Values to places, linearly or by the logarithm."""

    low: float
    high: float
    start: float
    """Place of ``low``."""
    end: float
    """Place of ``high``."""
    log: bool = False
    step: float = 1.0
    """Distance of the ticks of a linear scale, which ``low`` is a multiple of."""

    def __call__(self, value: float) -> float:
        """The place of ``value``, which is kept inside."""
        value = min(max(value, self.low), self.high)
        low, high = (
            (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        )
        at = math.log10(value) if self.log else value
        return round(self.start + (self.end - self.start) * (at - low) / ((high - low) or 1), 1)


def curves(
    lines: Iterable[Line],
    label: str,
    *,
    x_name: str = "step",
    log: bool = False,
    zero: bool = False,
    marks: Sequence[Mark] = (),
    bound: float | None = None,
    x_end: float | None = None,
) -> str:
    """Curves over the steps.

    Args:
        lines: With positive values only if ``log``.
        label: What it shows, for those who cannot see it.
        x_name: Name of the horizontal axis.
        log: Vertical axis by powers of ten.
        zero: The vertical axis begins at zero.
        marks: Events.
        bound: A value to draw a dashed line at.
        x_end: Where the horizontal axis ends, if not with the last point.
    """
    drawn = [line for line in lines if line.points]
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points if not log or y > 0]
    if bound is not None:
        ys.append(bound)
    named = any(line.name for line in drawn)
    right = WIDTH - RIGHT - (34 if named else 0)
    x_scale = Scale(min(xs), max(max(xs), x_end or 0, min(xs) + 1), LEFT, right)
    y_scale = _vertical(ys, log, zero)
    parts = [_grid(y_scale, right), _x_axis(x_scale, x_name)]
    if bound is not None:
        y = y_scale(bound)
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
    parts += [_mark(mark, x_scale) for mark in marks if x_scale.low <= mark.at <= x_scale.high]
    ends: list[float] = []
    for line in drawn:
        thinned = _thin([(x, y) for x, y in line.points if not log or y > 0])
        if not thinned:
            continue
        places = [(x_scale(x), y_scale(y)) for x, y in thinned]
        parts.append(_polyline(line, places))
        if line.name:
            y = _free(places[-1][1], ends)
            ends.append(y)
            parts.append(
                f'<text {_style(line.style, "name")} x="{right + 6}" y="{y + 4:.1f}">'
                f"{escape(line.name)}</text>"
            )
    return svg("".join(parts), WIDTH, HEIGHT, label)


def depth_curve(
    rows: Sequence[Point],
    label: str,
    *,
    earlier: Sequence[Sequence[Point]] = (),
    valid: tuple[int, int] | None = None,
    mean: float | None = None,
    limit: float | None = None,
) -> str:
    """Loss against depth, the depths on a logarithmic axis.

    Args:
        rows: (depth, loss) of the last evaluation.
        label: What it shows.
        earlier: The same of the evaluations before it, oldest first.
        valid: The validated range, shaded.
        mean: Mean depth of the training, a dotted line.
        limit: The loss up to which a depth is good enough, a dashed line.
    """
    depths = [depth for depth, _ in rows]
    right = WIDTH - RIGHT
    x_scale = Scale(min(depths), max(max(depths), min(depths) + 1), LEFT + 8, right - 8, log=True)
    everything = [loss for each in (rows, *earlier) for _, loss in each]
    y_scale = _vertical([*everything, *([] if limit is None else [limit])], False, False)
    parts = []
    if valid is not None:
        left, end = x_scale(valid[0]) - 8, x_scale(valid[1]) + 8
        parts.append(
            f'<rect class="valid" x="{left:.1f}" y="{TOP}" width="{end - left:.1f}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>validated: {valid[0]} to {valid[1]} loops'
            "</title></rect>"
        )
    parts.append(_grid(y_scale, right))
    if mean is not None and x_scale.low <= mean <= x_scale.high:
        x = x_scale(mean)
        parts.append(f'<line class="mean" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    if limit is not None:
        y = y_scale(limit)
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
    for i, each in enumerate(earlier, start=1):
        faint = f"{0.12 + 0.3 * i / len(earlier):.2f}"
        places = [(x_scale(x), y_scale(y)) for x, y in each]
        parts.append(f'<g style="opacity:{faint}">{_polyline(Line(each), places)}</g>')
    places = [(x_scale(x), y_scale(y)) for x, y in rows]
    parts.append(_polyline(Line(rows), places))
    parts += [
        f'<circle class="dot a" cx="{x}" cy="{y}" r="3.4"><title>{depth:g} loops: {loss:.4f}'
        "</title></circle>"
        for (depth, loss), (x, y) in zip(rows, places, strict=True)
    ]
    names = _spaced([(x_scale(depth), f"{depth:g}") for depth in depths])
    parts += [_tick(x, name) for x, name in names]
    parts.append(_x_name("loops", (LEFT + right) / 2))
    return svg("".join(parts), WIDTH, HEIGHT, label)


def bars(values: Sequence[float], names: Sequence[str], label: str, x_name: str, unit: str) -> str:
    """A bar for each value, the names below it where there is room.

    Args:
        values: Not negative.
        names: Of the bars.
        label: What it shows.
        x_name: Name of the horizontal axis.
        unit: Of the values, for those who point at a bar.
    """
    right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
    y_scale = _vertical([*values, 0.0], False, True)
    width = (right - LEFT) / len(values)
    parts = [_grid(y_scale, right)]
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        y = y_scale(value)
        gap = min(2.0, width / 6)
        parts.append(
            f'<rect class="bar" x="{LEFT + i * width + gap / 2:.1f}" y="{y}" '
            f'width="{width - gap:.1f}" height="{max(0.0, foot - y):.1f}"><title>{escape(name)}: '
            f"{value:g} {escape(unit)}</title></rect>"
        )
    middles = [(LEFT + (i + 0.5) * width, name) for i, name in enumerate(names)]
    parts += [_tick(x, name) for x, name in _spaced(middles)]
    parts.append(_x_name(x_name, (LEFT + right) / 2))
    return svg("".join(parts), WIDTH, HEIGHT, label)


def heat(shares: Sequence[Sequence[float]], label: str) -> str:
    """Loops downwards, experts to the right, the share of the loop's choices as colour.

    Args:
        shares: (L, E); twice an even share, and all above it, has the full colour.
        label: What it shows.
    """
    loops, experts = len(shares), len(shares[0])
    cell = min(26.0, max(4.0, (WIDTH - LEFT - RIGHT) / experts))
    row = min(24.0, max(8.0, 320 / loops))
    width, height = LEFT + cell * experts + RIGHT, TOP + row * loops + BOTTOM
    gap = 1.0 if cell > 8 else 0.0
    parts = []
    for t, each in enumerate(shares):
        for e, share in enumerate(each):
            parts.append(
                f'<rect class="heat" x="{LEFT + cell * e:.1f}" y="{TOP + row * t:.1f}" '
                f'width="{cell - gap:.1f}" height="{row - gap:.1f}" '
                f'style="--p:{min(1.0, share * experts / 2):.3f}"><title>loop {t + 1}, expert {e}: '
                f"{share:.1%}</title></rect>"
            )
    rows = [(TOP + row * (t + 0.5), str(t + 1)) for t in range(loops)]
    parts += [
        f'<text class="axis" x="{LEFT - 8}" y="{y + 4.5:.1f}" text-anchor="end">{name}</text>'
        for y, name in _spaced(rows, least=13)
    ]
    columns = [(LEFT + cell * (e + 0.5), str(e)) for e in range(experts)]
    parts += [_tick(x, name, height) for x, name in _spaced(columns)]
    parts.append(_x_name("expert", LEFT + cell * experts / 2, height))
    middle = TOP + row * loops / 2
    parts.append(
        f'<text class="axis" transform="translate(14 {middle:.1f}) rotate(-90)" '
        'text-anchor="middle">loop</text>'
    )
    return svg("".join(parts), width, height, label)


def svg(content: str, width: float, height: float, label: str) -> str:
    """The element around the content, which is never shown larger than drawn."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{width:.0f}px">{content}</svg>'
    )


def hue(i: int, count: int) -> str:
    """Style of curve ``i`` of ``count``: from blue by green to orange."""
    return f"hue:{round(215 - 190 * i / max(1, count - 1))}"


def short(value: float) -> str:
    """A number in few characters: 1.2 M, 34 k, 0.003."""
    size = abs(value)
    for unit, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}" if size >= 1e-3 or not size else f"{value:.0e}"


def _vertical(ys: Sequence[float], log: bool, zero: bool) -> Scale:
    """A scale that holds all of ``ys`` and begins and ends at a tick."""
    low, high = (min(ys), max(ys)) if ys else (0.0, 1.0)
    if log:
        low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return Scale(10.0**low, 10.0 ** max(high, low + 1), HEIGHT - BOTTOM, TOP, log=True)
    low = min(0.0, low) if zero else low
    step = _step(high - low or abs(high) or 1.0)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, max(high, low + step), HEIGHT - BOTTOM, TOP, step=step)


def _step(span: float, wanted: int = 4) -> float:
    """A round number of which about ``wanted`` make up the span."""
    size = 10.0 ** math.floor(math.log10(span / wanted))
    return next(size * n for n in (1, 2, 2.5, 5, 10) if size * n * wanted >= span * 0.999)


def _levels(scale: Scale) -> list[float]:
    if scale.log:
        powers = range(round(math.log10(scale.low)), round(math.log10(scale.high)) + 1)
        every = max(1, math.ceil(len(powers) / 6))
        levels = [10.0**k for k in powers if (k - powers[0]) % every == 0]
        if len(powers) == 2:
            levels += [n * 10.0 ** powers[0] for n in (2, 5)]
        return levels
    count = round((scale.high - scale.low) / scale.step)
    return [scale.low + i * scale.step for i in range(count + 1)]


def _grid(scale: Scale, right: float) -> str:
    """Horizontal lines with their values."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{scale(level)}" y2="{scale(level)}"/>'
        f'<text class="axis" x="{LEFT - 7}" y="{scale(level) + 4.5:.1f}" text-anchor="end">'
        f"{short(round(level, 12))}</text>"
        for level in _levels(scale)
    )


def _x_axis(scale: Scale, name: str) -> str:
    step = _step(scale.high - scale.low)
    first = math.ceil(scale.low / step) * step
    count = math.floor((scale.high - first) / step + 1e-9)
    ticks = [(scale(first + i * step), short(first + i * step)) for i in range(count + 1)]
    shown = "".join(_tick(x, text) for x, text in _spaced(ticks))
    return shown + _x_name(name, (scale.start + scale.end) / 2)


def _tick(x: float, name: str, height: float = HEIGHT) -> str:
    return (
        f'<text class="axis" x="{x:.1f}" y="{height - BOTTOM + 17:.1f}" text-anchor="middle">'
        f"{escape(name)}</text>"
    )


def _x_name(name: str, x: float, height: float = HEIGHT) -> str:
    return (
        f'<text class="axis" x="{x:.1f}" y="{height - 5:.1f}" text-anchor="middle">{escape(name)}'
        "</text>"
    )


def _mark(mark: Mark, scale: Scale) -> str:
    x = scale(mark.at)
    return (
        f'<line class="mark {escape(mark.kind)}" x1="{x}" x2="{x}" y1="{TOP}" '
        f'y2="{HEIGHT - BOTTOM}"><title>{escape(mark.title)}</title></line>'
    )


def _polyline(line: Line, places: Sequence[Point]) -> str:
    if len(places) == 1:
        (x, y) = places[0]
        return f'<circle {_style(line.style, "dot")} cx="{x}" cy="{y}" r="3"/>'
    points = " ".join(f"{x:g},{y:g}" for x, y in places)
    return f'<polyline {_style(line.style, "curve")} points="{points}"/>'


def _style(style: str, kind: str) -> str:
    """The attributes of an element of a curve."""
    if style.startswith("hue:"):
        return f'class="{kind} hued" style="--hue:{style[4:]}"'
    return f'class="{kind} {style}"'


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most about :data:`MOST_POINTS`, none of the extremes left out."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    height: Callable[[Point], float] = lambda point: point[1]  # noqa: E731
    kept: list[Point] = [points[0]]
    for i in range(0, len(points), stretch):
        part = points[i : i + stretch]
        kept += sorted({min(part, key=height), max(part, key=height)})
    return [*kept, points[-1]]


def _free(y: float, taken: Sequence[float], room: float = 13) -> float:
    """The place next to ``y`` at which a name does not cover another."""
    for move in (0.0, *(sign * k for k in range(1, 40) for sign in (room / 2, -room / 2))):
        free = all(abs(y + move - other) >= room for other in taken)
        if free and TOP + 2 <= y + move <= HEIGHT - BOTTOM:
            return y + move
    return y


def _spaced(ticks: Sequence[tuple[float, str]], least: float = 0) -> list[tuple[float, str]]:
    """Those of the ticks whose names do not touch the one before."""
    shown: list[tuple[float, str]] = []
    for place, name in ticks:
        room = least or 7 * (len(name) + (len(shown[-1][1]) if shown else 0)) / 2 + 8
        if not shown or place - shown[-1][0] >= room:
            shown.append((place, name))
    return shown
