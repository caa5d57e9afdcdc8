"""Draw figures with matplotlib as inline SVG.

matplotlib writes fixed colors, document-wide ids and style sheets. :func:`to_svg` replaces the
colors by CSS variables, so that one file follows light and dark mode, and drops the rest.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Point = tuple[float, float]

# placeholders: matplotlib needs hexadecimal colors, the page has CSS variables
_THEME = {
    f"#fe00{i:02x}": f"var(--{name})"
    for i, name in enumerate(("ink", "muted", "line", "accent", "warm", "good"))
}
INK, MUTED, LINE, ACCENT, WARM, GOOD = _THEME
_HUE = re.compile(r"#fd00([0-9a-f]{2})")
_FONT = re.compile(r"font-family:[^;]*; ?")
_DECIMALS = re.compile(r"-?\d+\.\d{2,}")
_SVG, _LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_DASHED, _DOTTED = (0, (5, 4)), (0, (1.5, 3))
_MARKS = {
    "alarm": (WARM, "-"), "rewound": (WARM, _DASHED), "skipped": (WARM, _DOTTED),
    "resumed": (GOOD, "-"),
}  # fmt: skip
_ROUND = [1, 2, 2.5, 5, 10]
_LARGEST = 1e100
"""Larger values become gaps: they would flatten the rest of the curve."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "open-mythos", "font.size": 13, "text.color": INK,
    "axes.edgecolor": LINE, "axes.labelcolor": MUTED, "axes.facecolor": "none",
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": LINE,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.xmargin": 0.02, "axes.formatter.useoffset": False, "axes.unicode_minus": False,
    "xtick.bottom": False, "ytick.left": False, "xtick.color": MUTED, "ytick.color": MUTED,
    "lines.linewidth": 1.7, "lines.solid_joinstyle": "round", "lines.markersize": 5,
    "figure.facecolor": "none", "legend.frameon": False, "legend.labelcolor": "linecolor",
    "legend.handlelength": 1.0, "legend.handletextpad": 0.5, "legend.labelspacing": 0.3,
    "legend.fontsize": 12, "legend.title_fontsize": 13, "legend.borderaxespad": 0.0,
    "path.simplify_threshold": 1.0, "figure.dpi": 72,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A curve; NaN values are gaps."""

    points: Sequence[Point]
    color: str = ACCENT
    name: str = ""
    """Legend entry, if any."""


@dataclass(frozen=True)
class Mark:
    """A vertical line that marks an event."""

    at: float
    kind: str
    """CSS class beside ``mark``."""
    title: str
    """Tooltip."""


styled = rc_context(_STYLE)
"""Decorator of drawing functions that applies the style of the pages."""


def canvas(width: float = 400, height: float = 215) -> tuple[Figure, Axes]:
    """Return a new figure of the given size in CSS pixels (72 dots per inch), and its axes."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.add_subplot()


def to_svg(figure: Figure, label: str, css_class: str = "") -> Markup:
    """Return ``figure`` as an ``<svg>`` element, with a label for screen readers."""
    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file)
    root = ElementTree.fromstring(file.getvalue())
    _simplify(root, {})
    box = root.attrib["viewBox"]
    root.attrib = {
        "class": css_class, "viewBox": box, "role": "img", "aria-label": label,
        "style": f"max-width:{1.3 * float(box.split()[2]):.0f}px",
    }  # fmt: skip
    ElementTree.register_namespace("", _SVG[1:-1])
    text = ElementTree.tostring(root, encoding="unicode")
    text = re.sub(r"\s*\n\s*", "", text).replace(f' xmlns="{_SVG[1:-1]}"', "")
    for placeholder, variable in _THEME.items():
        text = text.replace(placeholder, variable)
    return Markup(_HUE.sub(lambda hue: f"hsl({int(hue[1], 16)} 75% var(--tone))", text))


def ramp(i: int, count: int) -> str:
    """Return color ``i`` of ``count``, from blue through green to orange."""
    return f"#fd00{round(215 - 190 * i / max(1, count - 1)):02x}"


def tag(artist: Artist, css_class: str, title: str = "") -> None:
    """Set the CSS class and tooltip of the SVG group of a matplotlib artist."""
    artist.set_gid(f"{css_class}|{title}")


def has_values(lines: Sequence[Line], positive: bool = False) -> bool:
    """Return whether any value can be drawn."""
    return any(_drawable(y, positive) for line in lines for _, y in line.points)


@styled
def curves(
    lines: Sequence[Line],
    label: str,
    *,
    log: bool = False,
    zero: bool = False,
    marks: Sequence[Mark] = (),
    bound: float | None = None,
    x_end: float | None = None,
    legend: str = "",
) -> Markup:
    """Draw curves with drawable values (:func:`has_values`) over training steps.

    With ``log``, non-positive values become gaps; with ``zero``, the vertical axis starts at zero
    unless there are negative values. ``bound`` is a dashed horizontal line, and ``x_end`` the
    minimum end of the horizontal axis.
    """
    figure, ax = canvas()
    if log:
        ax.set_yscale("log")
    for curve in lines:
        _draw(ax, curve, positive=log)
    steps = [x for line in lines for x, _ in line.points]
    first, last = min(steps), max(steps)
    ax.set_xlim(first, max(last, x_end or last, first + 1))
    if zero and ax.dataLim.y0 >= 0:
        ax.set_ylim(bottom=0)
    if bound is not None:
        ax.axhline(bound, color=MUTED, linestyle=_DASHED, linewidth=1)
    for mark in marks:
        if first <= mark.at <= ax.get_xlim()[1]:
            color, style = _MARKS.get(mark.kind, (MUTED, "-"))
            line = ax.axvline(mark.at, color=color, linestyle=style, linewidth=1.4)
            tag(line, f"mark {mark.kind}", mark.title)
    label_axes(ax, "step")
    if any(line.name for line in lines):
        figure.legend(loc="outside right upper", title=legend)
    return to_svg(figure, label)


@styled
def depth_curve(
    rows: Sequence[Point],
    label: str,
    *,
    earlier: Sequence[Sequence[Point]] = (),
    valid: tuple[int, int] | None = None,
    mean: float | None = None,
    limit: float | None = None,
) -> Markup:
    """Draw (depth, loss) of the last evaluation and of ``earlier`` ones, oldest first.

    The range ``valid`` of validated depths is shaded; the ``mean`` training depth is a dotted line,
    the ``limit`` of the loss of a validated depth a dashed one.
    """
    figure, ax = canvas()
    ax.set_xscale("log", base=2)
    if valid is not None:
        band = ax.axvspan(valid[0] / 1.04, valid[1] * 1.04, color=GOOD, alpha=0.14, linewidth=0)
        tag(band, "valid", f"validated: {valid[0]} to {valid[1]} loops")
    if mean is not None:
        ax.axvline(mean, color=MUTED, linestyle=_DOTTED, linewidth=1.5)
    if limit is not None:
        ax.axhline(limit, color=MUTED, linestyle=_DASHED, linewidth=1)
    for i, each in enumerate(earlier, start=1):
        ax.plot(*zip(*each, strict=True), color=ACCENT, alpha=0.12 + 0.3 * i / len(earlier))
    ax.plot(*zip(*rows, strict=True), "o-", color=ACCENT)
    ax.xaxis.set_major_formatter(_plain)
    label_axes(ax, "loops")
    return to_svg(figure, label)


@styled
def bars(
    centers: Sequence[float], heights: Sequence[float], label: str, x_label: str, width: float = 1
) -> Markup:
    """Draw a histogram with bins of ``width``."""
    figure, ax = canvas()
    ax.bar(centers, heights, width=0.92 * width, color=ACCENT, alpha=0.8)
    label_axes(ax, x_label, whole=width == 1, x_ticks=12)
    return to_svg(figure, label)


def _draw(ax: Axes, line: Line, positive: bool) -> None:
    xs = [x for x, _ in line.points]
    ys = [y if _drawable(y, positive) else math.nan for _, y in line.points]
    missing = [True, *(math.isnan(y) for y in ys), True]
    alone = [i for i in range(len(ys)) if missing[i] and not missing[i + 1] and missing[i + 2]]
    ax.plot(xs, ys, color=line.color, label=line.name or None)
    if alone:  # a line does not show a point without neighbors
        ax.plot([xs[i] for i in alone], [ys[i] for i in alone], "o", color=line.color)


def _drawable(y: float, positive: bool) -> bool:
    return abs(y) < _LARGEST and (y > 0 or not positive)  # false for NaN


def label_axes(ax: Axes, x_label: str, *, whole: bool = True, x_ticks: int = 5) -> None:
    """Set axis labels and a few round ticks."""
    ax.set_xlabel(x_label)
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_locator(MaxNLocator(x_ticks, steps=_ROUND, integer=whole))
        _shorten(ax.xaxis, ax.get_xlim())
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND, min_n_ticks=2))
        _shorten(ax.yaxis, ax.get_ylim())
        return
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(numticks=6))
    ax.yaxis.set_major_formatter(_plain)
    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    ax.yaxis.set_minor_formatter(_plain if high < 50 * low else NullFormatter())


@FuncFormatter
def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def _shorten(axis: Axis, limits: tuple[float, float]) -> None:
    if max(map(abs, limits)) >= 10_000:
        axis.set_major_formatter(EngFormatter(sep=" "))


def _simplify(element: ElementTree.Element, radii: dict[str, str]) -> None:
    """Drop ids, fonts, clip paths, metadata and background; turn markers into circles.

    ``radii`` collects the radius of each marker by its id.
    """
    for child in list(element):
        name = child.tag.removeprefix(_SVG)
        if name == "defs":
            paths = child.iterfind(f"{_SVG}path")
            radii |= {path.get("id", ""): path.get("d", "").split()[2] for path in paths}
        if name in ("defs", "metadata") or child.get("style") == "fill: none":
            element.remove(child)
            continue
        if name == "use":
            child.tag = f"{_SVG}circle"
            x, y, marker = (child.attrib.pop(key) for key in ("x", "y", _LINK))
            child.attrib |= {"cx": x, "cy": y, "r": radii[marker[1:]]}
        child.attrib.pop("clip-path", "")
        css_class, tagged, title = child.attrib.pop("id", "").partition("|")
        for key in child.attrib.keys() - {"style"}:
            child.set(key, _DECIMALS.sub(lambda n: f"{float(n[0]):.1f}", child.attrib[key]))
        if tagged:
            child.set("class", css_class)
        if title:
            tooltip = ElementTree.Element(f"{_SVG}title")
            tooltip.text = title
            child.insert(0, tooltip)
        if name == "path":
            child.set("d", " ".join(child.get("d", "").replace("L", "").split()))
        if name == "text":
            child.set("style", _FONT.sub("", child.get("style", "")))
            if child.get("transform", "").startswith("rotate(-0 "):
                del child.attrib["transform"]
        _simplify(child, radii)
