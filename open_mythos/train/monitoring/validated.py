"""Depth range over which a trained model is usable, measured at the end of training.

This module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

TOLERANCE = 0.05
"""Nats per token by which a validated depth may be worse than the best one."""


def depths_to_validate(mean_depth: float) -> list[int]:
    """Return the depths to measure: 1, 2, 3, 4, 6, 8, 12, ... up to four times the mean training
    depth, always including the mean itself and twice the mean."""
    mean = max(1, round(mean_depth))
    most = 4 * mean
    ladder = {n for k in range(most.bit_length()) for n in (1 << k, 3 << k) if n <= most}
    return sorted(ladder | {mean, 2 * mean, most})


def depth_record(
    rows: Iterable[Mapping[str, Any]], mean_depth: float, tolerance: float = TOLERANCE
) -> dict[str, Any] | None:
    """Summarize the losses measured at several depths.

    The validated range is the largest range of measured depths without a gap whose losses are at
    most the best loss + ``tolerance``. It contains the measured depth nearest to the mean training
    depth, or, if that one is worse than the tolerance allows, the best depth.

    Args:
        rows: Mappings with "depth" and "loss", in any order. A loss that is None or not finite
            counts as measured and failed; rows without a depth (dense model) are ignored.
        mean_depth: Mean training depth.
        tolerance: Nats per token.

    Returns:
        None for a model without loops, else JSON-ready: "low" and "high" (the validated range,
        None if no loss is finite), "best_depth" and "best_loss", "mean_depth", "tolerance",
        "holds_at_twice_the_mean" (None if not measured), and "rows" of "depth" and "loss".
    """
    measured = {int(row["depth"]): row["loss"] for row in rows if row["depth"] is not None}
    if not measured:
        return None
    losses = {
        depth: float(loss) if loss is not None and math.isfinite(loss) else math.inf
        for depth, loss in sorted(measured.items())
    }
    best = min(losses, key=lambda depth: losses[depth])
    found = math.isfinite(losses[best])
    limit = losses[best] + tolerance
    low, high = _range(losses, mean_depth, best, limit) if found else (None, None)
    twice = 2 * max(1, round(mean_depth))
    return {
        "low": low,
        "high": high,
        "best_depth": best if found else None,
        "best_loss": losses[best] if found else None,
        "mean_depth": mean_depth,
        "tolerance": tolerance,
        "holds_at_twice_the_mean": found and losses[twice] <= limit if twice in losses else None,
        "rows": [
            {"depth": d, "loss": loss if math.isfinite(loss) else None}
            for d, loss in losses.items()
        ],
    }


def _range(
    losses: Mapping[int, float], mean_depth: float, best: int, limit: float
) -> tuple[int, int]:
    depths = list(losses)
    start = min(depths, key=lambda depth: (abs(depth - mean_depth), depth))
    low = high = depths.index(start if losses[start] <= limit else best)
    while low > 0 and losses[depths[low - 1]] <= limit:
        low -= 1
    while high + 1 < len(depths) and losses[depths[high + 1]] <= limit:
        high += 1
    return depths[low], depths[high]
