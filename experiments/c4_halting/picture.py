"""Plot quality against mean loops, loops against hops, and loss against loops on text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.claim import Summary
from experiments.figure import COLOURS, MUTED, panels


def plot(summary: Summary, path: Path) -> None:
    """Plot ``summary.data`` to ``path``."""
    data = summary.data
    with panels(path, 3) as (quality, depth, text):
        _curve(quality, list(enumerate(data["static"], start=1)), "static depth", "black", "-")
        for (rule, points), colour in zip(data["rules"].items(), COLOURS, strict=False):
            _curve(quality, points, rule, colour, "o-")
        _curve(quality, data["random"], "the same exits at random", MUTED, "x")
        _curve(quality, data["oracle"], "oracle, delayed", MUTED, "D--")
        quality.set(title="Chains of 1 to 10 hops", xlabel="mean loops", ylabel="answered")
        quality.legend(fontsize=8)
        for (rule, loops), colour in zip(data["by_hop"].items(), COLOURS, strict=False):
            depth.plot(range(1, len(loops) + 1), loops, "o-", ms=3, color=colour, label=rule)
        depth.set(title="Harder questions run deeper", xlabel="hops asked", ylabel="loops run")
        depth.legend(fontsize=8)
        _curve(text, list(enumerate(data["text"]["static"], start=1)), "static depth", "black", "-")
        for (rule, points), colour in zip(
            data["text"]["rules"].items(), (*COLOURS[:2], *COLOURS[3:]), strict=False
        ):
            _curve(text, points, rule, colour, "o-")
        text.set(title="Text", xlabel="mean loops", ylabel="nats per byte")


def _curve(
    axes: Any, points: Sequence[tuple[float, float]], label: str, colour: str, style: str
) -> None:
    loops, quality = zip(*sorted(points), strict=True)
    axes.plot(loops, quality, style, color=colour, label=label, ms=4)
