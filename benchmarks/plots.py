"""The plots of docs/speed.md: each from one or more suites' results, with what it shows as title.

A picture carries a digest of the figures it was drawn from, so a test can tell an old one without
drawing it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "speed"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Distinguishable without colour vision (Okabe and Ito, 2008)."""
MARKS = "osD^vP"
FORMS = {
    "full": "static batch, all loops", "lockstep": "static batch, as deep as the deepest row",
    "compact": "rows leave, nobody joins", "engine": "engine",
}  # fmt: skip
"""How tokens with a depth each are generated, from the slowest on."""
RATE = ", tokens per CPU s"
BY_DEPTH = "geometric, mean depth"
"""Begins the names of rows that differ in the mean depth alone."""
LONG, SHORTER = "against a loop over choices and experts", "choice by choice"
"""What would take a third of the picture, and what is written instead."""
COMPARED = ("experts", "training", "decoding")
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Plot:
    """One picture: where it goes, what it says, what it is drawn from."""

    path: Path
    title: str
    data: Any
    paint: Callable[[Any, Any], None]
    """``paint(axes, data)``."""
    height: float = 4.5

    @property
    def digest(self) -> str:
        """Changes whenever title or figures do."""
        text = json.dumps([self.title, self.data], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def draw(self) -> None:
        """Write the picture."""
        with _axes(self.path, self.height, self.digest) as axes:
            self.paint(axes, self.data)
            # from the edge of the picture: beside long labels there is no room for a title
            axes.figure.suptitle(self.title, x=0.01, ha="left", fontsize=12, weight="bold")


def of(folder: Path, contents: Mapping[str, Mapping[str, Any]]) -> Iterator[Plot]:
    """The plots that a machine's results are enough for."""
    rows = {suite: content["rows"] for suite, content in contents.items()}
    for name, make in (
        ("ratios", _ratios), ("experts", _experts), ("loops", _loops), ("context", _context),
        ("batch", _batch), ("engine", _engine), ("engine_depth", _engine_depth),
    ):  # fmt: skip
        made = make(rows)
        if made is not None:
            title, data, paint = made
            long = 0.3 if name == "ratios" else 0.9 if name == "engine" else 0.0
            height = max(3.0, 1.2 + long * len(data)) if long else 4.5
            yield Plot(FOLDER / f"{folder.name}_{name}.png", title, data, paint, height)


def stored_digest(path: Path) -> str | None:
    """The digest that a picture carries."""
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get("Comment")


@contextmanager
def _axes(path: Path, height: float, digest: str) -> Iterator[Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": "#e2e8f0", "legend.frameon": False,
        "figure.facecolor": "white", "axes.axisbelow": True,
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"Software": None, "Comment": digest}
            figure.savefig(path, dpi=100, metadata=metadata)
        finally:
            plt.close(figure)


Made = tuple[str, Any, Callable[[Any, Any], None]] | None


def _ratios(rows: Mapping[str, Rows]) -> Made:
    """Every comparison with the reference, and its goal."""
    data = [
        [
            f"{suite}: {row['name']}".replace(LONG, SHORTER),
            row["dtype"],
            row["ratio"],
            row.get("goal"),
        ]
        for suite in COMPARED
        for row in rows.get(suite, ())
        if "ratio" in row
    ]
    if not data:
        return None
    with_goal = [(ratio, goal) for _, _, ratio, goal in data if goal is not None]
    met = sum(ratio >= goal for ratio, goal in with_goal)
    least, most = min(row[2] for row in data), max(row[2] for row in data)
    title = f"{least:.1f}x to {most:.1f}x as fast as the reference"
    if with_goal:
        title += f"; {met} of {len(with_goal)} goals met"
    return title, data, _paint_ratios


def _paint_ratios(axes: Any, data: Any) -> None:
    dtypes = list(dict.fromkeys(row[1] for row in data))
    for i, (_, dtype, ratio, goal) in enumerate(data):
        colour = COLOURS[dtypes.index(dtype)]
        axes.barh(i, ratio - 1, left=1, height=0.7, color=colour, hatch="//" * dtypes.index(dtype),
                  edgecolor="white", linewidth=0)  # fmt: skip
        text = f"{ratio:.1f}x" + ("" if goal is None or ratio >= goal else f" (goal {goal:g}x)")
        axes.annotate(text, (max(1, ratio, goal or 0), i), xytext=(6, 0), va="center", fontsize=9,
                      textcoords="offset points")  # fmt: skip
        if goal is not None:
            axes.plot([goal, goal], [i - 0.45, i + 0.45], color="black", lw=2.5)
    handles = [
        axes.barh([0], [0], color=COLOURS[i], hatch="//" * i, edgecolor="white",
                  label=SHORT.get(dtype, dtype))
        for i, dtype in enumerate(dtypes)
    ]  # fmt: skip
    handles += axes.plot([], [], color="black", lw=2.5, label="goal")
    axes.axvline(1, color="#64748b", lw=1)
    axes.set_xscale("log")
    edge = max(max(row[2], row[3] or 0) for row in data)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 1.6 * edge]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(0.9, *(0.9 * row[2] for row in data)), 3 * edge)
    axes.set_yticks(range(len(data)), [row[0] for row in data], fontsize=9)
    axes.set_ylim(len(data) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.set_xlabel("time of the reference / time of the fast path")
    axes.legend(handles=handles, loc="lower right")


def _series(rows: Rows, x: str, y: Callable[[Mapping[str, Any]], float | None]) -> dict[str, Any]:
    """Label -> [[x, y], ...] of the rows that have both."""
    found: dict[str, list[list[float]]] = {}
    for row in rows:
        numbers = row.get("numbers", {})
        value = y(row) if x in numbers else None
        if value is not None:
            found.setdefault(_label(row), []).append([numbers[x], value])
    return found


def _label(row: Mapping[str, Any]) -> str:
    """What a row's line in a plot is called: its name up to the number, and its dtype."""
    name = row["name"].rpartition(", ")[0]
    dtype = SHORT.get(row["dtype"], row["dtype"])
    return f"{name}, {dtype}" if name else dtype


def _paint_lines(
    axes: Any, data: Mapping[str, Any], x: str, y: str, log: str = "both", floor: bool = True
) -> None:
    for i, (label, points) in enumerate(data.items()):
        axes.plot(*zip(*points, strict=True), color=COLOURS[i % 6], marker=MARKS[i % 6], lw=1.8,
                  ls=("-", "--", ":")[i % 3], label=label)  # fmt: skip
    values = sorted({point[0] for points in data.values() for point in points})
    if log in ("both", "x"):
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:,.0f}" for value in values])
    if log == "both":
        axes.set_yscale("log")
        low, high = (edge(point[1] for points in data.values() for point in points)
                     for edge in (min, max))  # fmt: skip
        ticks = [m * 10.0**k for k in range(-3, 7) for m in (1, 2, 5)]
        shown = [tick for tick in ticks if low / 2 <= tick <= 2 * high]
        axes.set_yticks(shown, [f"{tick:,g}" for tick in shown])
        axes.minorticks_off()
    elif floor:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend()


def _loops(rows: Mapping[str, Rows]) -> Made:
    """Time per token against loops."""
    found = rows.get("loops", ())
    data = _series(
        found,
        "loops",
        lambda row: 1e6 * row["seconds"] / row["numbers"]["tokens"] if row.get("seconds") else None,
    )
    spread = [row["value"] for row in found if "seconds_per_loop" in row.get("numbers", {})]
    if not data or not spread:
        return None
    title = f"From 2 to 32 loops, a loop more costs the same to {max(spread):.0f} %"
    return (
        title,
        data,
        lambda axes, data: _paint_lines(axes, data, "loops", "microseconds per token"),
    )


def _context(rows: Mapping[str, Rows]) -> Made:
    """Time of a step against the positions it reads."""
    found = rows.get("context", ())
    data = _series(found, "context", lambda row: 1e3 * row["seconds"])
    off = [row["value"] for row in found if "seconds_per_position" in row.get("numbers", {})]
    if not data or not off:
        return None
    title = f"A step's time is a straight line in the context, to {max(off):.0f} %"

    def paint(axes: Any, data: Any) -> None:
        _paint_lines(axes, data, "positions in the cache", "milliseconds per token", log="")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    return title, data, paint


def _experts(rows: Mapping[str, Rows]) -> Made:
    """Time of the layer against the number of experts, fast and plain."""
    found = [row for row in rows.get("experts", ()) if "experts" in row.get("numbers", {})]
    data: dict[str, list[list[float]]] = {}
    for form, key in (("fast", "fast_seconds"), ("plain", "plain_seconds")):
        for row in found:
            if key in row:
                label = f"{form}, {SHORT.get(row['dtype'], row['dtype'])}"
                point = [row["numbers"]["experts"], 1e3 * row[key]]
                data.setdefault(label, []).append(point)
    if not data:
        return None
    ratios = {row["numbers"]["experts"]: row["ratio"] for row in found if "ratio" in row}
    few, many = min(ratios), max(ratios)
    title = f"Against the plain loop: {ratios[few]:.1f}x with {few:g} experts, "
    title += f"{ratios[many]:.1f}x with {many:g} ({SHORT.get(found[-1]['dtype'], '')})"
    return title, data, lambda axes, data: _paint_lines(
        axes, data, "experts (top-2 up to 16, top-4 of 64, then top-8)",
        "milliseconds, forward and backward",
    )  # fmt: skip


def _batch(rows: Mapping[str, Rows]) -> Made:
    """Tokens per second against rows decoded together."""
    found = [row for row in rows.get("batch", ()) if row.get("unit") == "tok/s"]
    data = _series(found, "batch", lambda row: row["value"])
    if not data:
        return None
    best = max(found, key=lambda row: row["numbers"]["batch"] * 1e6 + row["value"])
    title = (
        f"{best['numbers']['batch']:g} rows decode {best['numbers']['over_first']:.1f}x as many "
        f"tokens as one ({SHORT.get(best['dtype'], best['dtype'])})"
    )
    return (
        title,
        data,
        lambda axes, data: _paint_lines(
            axes, data, "rows decoded together", "tokens per second", log="x"
        ),
    )


def _engine(rows: Mapping[str, Rows]) -> Made:
    """Tokens per second of every form of serving, by the depths and lengths of the requests."""
    data, gains = [], []
    for row in rows.get("engine", ()):
        numbers, (case, _, what) = row.get("numbers", {}), row["name"].rpartition(": ")
        if what == "engine over full depth" and not case.startswith(BY_DEPTH):
            speeds = {form: numbers[form + RATE] for form in FORMS if form + RATE in numbers}
            data.append([f"{case}, {SHORT.get(row['dtype'], row['dtype'])}", speeds])
            gains.append(row["value"])
    if not data:
        return None
    title = f"The engine: {min(gains):.1f}x to {max(gains):.1f}x the tokens of full depth"
    return title, data, _paint_engine


def _engine_depth(rows: Mapping[str, Rows]) -> Made:
    """Tokens per second of the engine and of static batches, against the mean depth."""
    found = [
        (row["numbers"], row["value"]) for row in rows.get("engine", ())
        if row["name"].startswith(BY_DEPTH)
    ]  # fmt: skip
    if not found:
        return None
    lines = {
        form: [[numbers["mean_depth"], numbers[form + RATE]] for numbers, _ in found]
        for form in FORMS if form + RATE in found[0][0]
    }  # fmt: skip
    ends = (
        f"{gain:.1f}x at {numbers['mean_depth']:.0f} loops"
        for numbers, gain in (found[0], found[-1])
    )
    title = f"The engine over full depth (16 loops): {', '.join(ends)}"
    return title, lines, _paint_engine_depth


def _paint_engine_depth(axes: Any, lines: Any) -> None:
    names = list(FORMS)
    for form, points in lines.items():
        k = names.index(form)
        axes.plot(*zip(*points, strict=True), f"{MARKS[k]}-", color=COLOURS[k], label=FORMS[form])
    axes.set(xlabel="mean loops per token", ylabel="tokens per second of CPU time", xlim=0, ylim=0)
    axes.legend()


def _paint_engine(axes: Any, data: Any) -> None:
    width = 0.8 / len(FORMS)
    for k, (form, label) in enumerate(FORMS.items()):
        places = [i + (k - 1.5) * width for i, (_, speeds) in enumerate(data) if form in speeds]
        speeds = [speeds[form] for _, speeds in data if form in speeds]
        axes.barh(places, speeds, height=0.9 * width, color=COLOURS[k], label=label)
    axes.set_yticks(range(len(data)), [case for case, _ in data])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tokens per second of CPU time")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2, fontsize=9)
