"""Metrics of benchmark tasks against depth, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.evaluation.harness import TaskRow
from open_mythos.files import replacing

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Distinguishable without colour vision (Okabe and Ito, 2008)."""
_FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: str) -> None:
    """Check, before anything is computed, that a picture can be written there.

    Raises:
        ConfigError: The format is not known.
        EnvironmentError_: The folder does not exist.
    """
    if Path(path).suffix not in _FORMATS:
        raise ConfigError(
            "not a picture", where="--plot", value=path, allowed=", ".join(_FORMATS),
            fix="name a file such as tasks.png",
        )  # fmt: skip
    if not Path(path).resolve().parent.is_dir():
        raise EnvironmentError_(
            "the folder of the picture does not exist", where="--plot", value=path,
            allowed="a file in an existing folder",
            fix="name a file in an existing folder",
        )  # fmt: skip


def plot_tasks(rows: Sequence[TaskRow], path: str) -> None:
    """Draw a panel for each metric, a line for each task, and one standard error around it.

    Args:
        rows: All metrics.
        path: File to write, in one of the formats of :func:`check_plot`.
    """
    metrics = list(dict.fromkeys(row.metric for row in rows))
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(1 + 4.5 * len(metrics), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for task in tasks:
            own = [row for row in rows if (row.task, row.metric) == (task, metric)]
            if not own:
                continue
            colour = _COLOURS[tasks.index(task) % len(_COLOURS)]
            depths = [row.depth or 1 for row in own]
            errors = [row.stderr or 0.0 for row in own]
            panel.errorbar(
                depths,
                [row.value for row in own],
                errors,
                fmt="o-",
                color=colour,
                capsize=3,
                label=task,
            )
        panel.set_xscale("log", base=2)
        every = sorted({row.depth or 1 for row in rows})
        panel.set_xticks(every, [str(depth) for depth in every])
        panel.minorticks_off()
        panel.set(xlabel="loops", ylabel=metric)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(frameon=False)
    with replacing(Path(path), "the picture cannot be written") as new:
        figure.savefig(new, dpi=150, format=Path(path).suffix[1:])
