"""The grid of hops and loops beside the dense models, and what each part of the recipe does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.c1_depth.cells import LOOPED
from experiments.c1_depth.recipe import ASKED_HOPS, TRAINED_HOPS
from experiments.claim import Summary
from experiments.figure import COLOURS, lines, log2_ticks, panels


def plot(summary: Summary, path: Path) -> None:
    """Three panels from ``summary.data``."""
    data = summary.data
    with panels(path, 3) as (grid, dense, parts):
        _grid(grid, data)
        lines(dense, data["dense_hops"], data["dense"], "s--", colours=COLOURS[1:], small=True)
        dense.axvspan(0, TRAINED_HOPS, color=COLOURS[0], alpha=0.07, lw=0)
        dense.set(
            title="Dense controls, the same questions", xlabel="hops (shaded: seen in training)",
            ylabel="answered", ylim=(0, 1.03), xlim=(1, max(data["hops"])),
        )  # fmt: skip
        _parts(parts, data)


def _grid(ax: Any, data: dict[str, Any]) -> None:
    """Heat map, hops upwards."""
    image = ax.imshow(data["grid"], origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(len(data["loops"])), [str(n) for n in data["loops"]], fontsize=8)
    ax.set_yticks(range(len(data["hops"])), [str(n) for n in data["hops"]])
    for i, row in enumerate(data["grid"]):
        for j, share in enumerate(row):
            colour = "white" if share > 0.6 else "black"
            ax.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color=colour)
    below = sum(hops <= TRAINED_HOPS for hops in data["hops"])
    ax.axhline(below - 0.5, color=COLOURS[1], lw=1.5)
    ax.set(
        title="Looped: % answered, mean of the seeds", xlabel="loops",
        ylabel="hops (line: longest in training)",
    )  # fmt: skip
    ax.figure.colorbar(image, ax=ax, shrink=0.9)


def _parts(ax: Any, data: dict[str, Any]) -> None:
    colours = iter(COLOURS[1:] * 2)
    for arm, (loops, shares) in data["depths"].items():
        if arm == LOOPED:
            ax.plot(loops, shares, "o-", color=COLOURS[0], ms=4, lw=2.5, label=arm)
        else:
            ax.plot(loops, shares, "-", color=next(colours), lw=1.2, label=arm)
    log2_ticks(ax, [1, 2, 5, 10, 24, 64, 128])
    ax.minorticks_off()
    ax.set(
        title=f"{ASKED_HOPS} hops, without parts of the recipe", xlabel="loops", ylabel="answered",
        ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend(fontsize=7)
