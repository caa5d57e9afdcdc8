"""The look that the plots of all claims share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#64748b", "#db2777")
MUTED = "#94a3b8"


@contextmanager
def panels(path: Path, columns: int, rows: int = 1) -> Iterator[list[Any]]:
    """Axes to draw in, row by row; the picture is written to ``path`` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    }  # fmt: skip
    with plt.rc_context(style):
        size = (6 * columns, 4 * rows)
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
        try:
            yield list(axes.flat) if columns * rows > 1 else [axes]
            path.parent.mkdir(parents=True, exist_ok=True)
            # no date and no version: the same figures give the same file
            figure.savefig(path, dpi=110, metadata={"Software": None})
        finally:
            plt.close(figure)
