"""At which depths may a trained model be used? Measured at the end of training, and stored with it.

A looped model accepts any number of loops; that it accepts it does not mean that it copes. The
record says which depths were measured and which of them are about as good as the best.

This module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

STATE_KEY = "validated_depths"
"""Name of the record in a checkpoint's ``state.json``."""
TOLERANCE = 0.05
"""Nats per token by which a depth may be worse than the best one."""


def depths_to_validate(mean_depth: float) -> list[int]:
    """The depths to measure: 1, 2, 3, 4, 6, 8, 12, ... to four times the mean training depth, with
    the mean itself and twice the mean among them."""
    mean = max(1, round(mean_depth))
    most = 4 * mean
    ladder = {n for k in range(most.bit_length()) for n in (1 << k, 3 << k) if n <= most}
    return sorted(ladder | {mean, 2 * mean, most})


def validated_depths(
    rows: Iterable[Any], mean_depth: float, tolerance: float = TOLERANCE
) -> tuple[int, int] | None:
    """The largest range of measured depths, without a gap, whose loss is at most best + tolerance.

    It lies around the measured depth nearest to the mean training depth; where that one is worse
    than the tolerance allows, around the best depth.

    Args:
        rows: ``DepthRow`` objects, or mappings with "depth" and "loss", in any order. Those
            without a depth (a dense model) or a finite loss count as measured and failed.
        mean_depth: Mean depth of the training.
        tolerance: Nats per token.

    Returns:
        The smallest and the largest depth of the range; None if no depth has a finite loss.
    """
    losses = _losses(rows)
    finite = {depth: loss for depth, loss in losses.items() if math.isfinite(loss)}
    if not finite:
        return None
    limit = min(finite.values()) + tolerance
    depths = list(losses)
    nearest = min(depths, key=lambda depth: (abs(depth - mean_depth), depth))
    if not losses[nearest] <= limit:
        nearest = min(finite, key=lambda depth: finite[depth])
    low = high = depths.index(nearest)
    while low > 0 and losses[depths[low - 1]] <= limit:
        low -= 1
    while high + 1 < len(depths) and losses[depths[high + 1]] <= limit:
        high += 1
    return depths[low], depths[high]


def depth_record(
    rows: Iterable[Any], mean_depth: float, tolerance: float = TOLERANCE
) -> dict[str, Any] | None:
    """What a checkpoint keeps about its depths, JSON-ready; None for a model without loops.

    Args:
        rows: As of :func:`validated_depths`.
        mean_depth: Mean depth of the training.
        tolerance: Nats per token.

    Returns:
        "low" and "high" (the validated range, None if there is none), "best_depth" and "best_loss",
        "mean_depth", "tolerance", "holds_at_twice_the_mean" (None if that was not measured), and
        "rows" of "depth" and "loss" (None where it was not finite).
    """
    losses = _losses(rows)
    if not losses:
        return None
    found = validated_depths(
        [{"depth": d, "loss": x} for d, x in losses.items()], mean_depth, tolerance
    )
    finite = {depth: loss for depth, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=lambda depth: finite[depth], default=None)
    twice = 2 * max(1, round(mean_depth))
    holds = None
    if twice in losses:
        holds = best is not None and losses[twice] <= finite[best] + tolerance
    return {
        "low": None if found is None else found[0],
        "high": None if found is None else found[1],
        "best_depth": best,
        "best_loss": None if best is None else finite[best],
        "mean_depth": mean_depth,
        "tolerance": tolerance,
        "holds_at_twice_the_mean": holds,
        "rows": [{"depth": d, "loss": finite.get(d)} for d in losses],
    }


def _losses(rows: Iterable[Any]) -> dict[int, float]:
    """Depth -> loss, ascending; NaN where it is missing."""
    found = {}
    for row in rows:
        values: Mapping[str, Any] = (
            asdict(row) if is_dataclass(row) and not isinstance(row, type) else row
        )
        if values["depth"] is not None:
            loss = values["loss"]
            found[int(values["depth"])] = math.nan if loss is None else float(loss)
    return dict(sorted(found.items()))
