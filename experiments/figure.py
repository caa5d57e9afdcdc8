"""Shared plotting helpers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#64748b", "#db2777")
MUTED = "#94a3b8"


@contextmanager
def panels(
    path: Path, columns: int, rows: int = 1, size: tuple[float, float] = (6, 4), dpi: int = 110
) -> Iterator[list[Any]]:
    """Yield axes in row-major order; save the figure to ``path`` on exit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        whole = (size[0] * columns, size[1] * rows)
        figure, axes = plt.subplots(rows, columns, figsize=whole, layout="constrained")
        try:
            yield list(axes.flat) if columns * rows > 1 else [axes]
            path.parent.mkdir(parents=True, exist_ok=True)
            # no date and no version: equal data produce an equal file
            figure.savefig(path, dpi=dpi, metadata={"Software": None})
        finally:
            plt.close(figure)


def lines(
    ax: Any,
    x: Sequence[float],
    curves: Mapping[Any, Sequence[float]],
    style: str = "o-",
    *,
    colours: Sequence[str] = COLOURS,
    label: str = "{}",
    small: bool = False,
) -> None:
    """Plot ``curves`` (name -> y) over a common ``x``, with a legend that formats names."""
    for (name, y), colour in zip(curves.items(), colours, strict=False):
        ax.plot(x, y, style, color=colour, ms=4, label=label.format(name))
    ax.legend(fontsize=8 if small else None)


def log2_ticks(ax: Any, ticks: Sequence[int]) -> None:
    """Use a base-2 logarithmic x axis with exactly these ticks; labels do not overlap."""
    ax.set_xscale("log", base=2)
    labels, last = [], 0.0
    for n in ticks:
        labels.append(str(n) if n > 1.2 * last else "")
        last = n if labels[-1] else last
    ax.set_xticks(ticks, labels)
