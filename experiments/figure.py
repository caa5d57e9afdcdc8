"""What the plots of all claims share."""

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
    """Yield axes to draw in, row by row; write the picture to ``path`` at the end."""
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
            # no date and no version: the same figures give the same file
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
    """Draw a line of each of ``curves``, given as name -> y, and their legend.

    Args:
        ax: Axes.
        x: Common to all lines.
        curves: The lines; ``label`` formats their names.
        style: Of matplotlib.
        colours: One for each line.
        label: Format of a name.
        small: Small print in the legend.
    """
    for (name, y), colour in zip(curves.items(), colours, strict=False):
        ax.plot(x, y, style, color=colour, ms=4, label=label.format(name))
    ax.legend(fontsize=8 if small else None)


def log2_ticks(ax: Any, ticks: Sequence[int]) -> None:
    """Make the x axis logarithmic, with these ticks alone."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [str(n) for n in ticks])
