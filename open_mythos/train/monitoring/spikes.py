"""Loss-spike detection from recent losses alone. This module loads no torch.

A spike is several consecutive steps whose loss is far above the recent ones:

    center   = median of the window
    residual = window minus its trend, the line through the medians of its two halves
    spread   = max(1.4826 median |residual|, 95th percentile of residual / 1.6449), the residual
               centered at its median
    high     = loss > center + max(threshold spread, min_rise)

Both terms of the spread estimate the standard deviation of Gaussian noise; the second also covers
steps that are harder by design, such as those with extra loops. The center is not detrended: while
the loss falls it is above the present loss, which favors silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation of a Gaussian."""
_TAIL_TO_DEVIATION = 1 / 1.6449
"""Standard deviation over the distance from median to 95th percentile of a Gaussian."""


@dataclass(frozen=True)
class Spike:
    """A detected spike."""

    step: int
    """The last of ``patience`` high steps."""
    loss: float
    """Loss of that step, nats per token."""
    center: float
    """Median of the window."""
    limit: float
    """The loss above which a step is high."""

    def __str__(self) -> str:
        return (
            f"the loss rose to {self.loss:.4f} at step {self.step}; the median of recent steps is "
            f"{self.center:.4f}, the limit {self.limit:.4f}"
        )


class SpikeDetector:
    """Observes one loss per step.

    Losses that are not finite are ignored: the trainer skips such steps. After a spike the window
    is cleared, so that a loss that stays at a new level is reported once.

    Args:
        window: Recent finite losses to compare with; detection starts at a quarter of them.
        threshold: Number of spreads above the center from which a loss is high.
        patience: Consecutive high steps that make a spike.
        min_rise: Nats; a smaller rise is never high, however quiet the window.
    """

    def __init__(
        self, window: int = 128, threshold: float = 6.0, patience: int = 4, min_rise: float = 0.1
    ) -> None:
        self.window, self.threshold = window, threshold
        self.patience, self.min_rise = patience, min_rise
        self._losses: list[float] = []
        self._high = 0

    def observe(self, step: int, loss: float) -> Spike | None:
        """Add the loss of a step; return the :class:`Spike` that it completes, if any.

        Under data parallelism every rank passes the loss of the global batch, so that all ranks
        reach the same verdict.
        """
        if not math.isfinite(loss):
            return None
        if 4 * (len(self._losses) - self._high) >= self.window:
            center, limit = self._limit()
            self._high = self._high + 1 if loss > limit else 0
            if self._high == self.patience:
                self._losses, self._high = [], 0
                return Spike(step, loss, center, limit)
        self._losses = [*self._losses[-(self.window - 1) :], loss]
        return None

    def _limit(self) -> tuple[float, float]:
        """Return the center of the window, and the loss above which a step is high."""
        # exclude the high steps of a spike that may be starting
        losses = self._losses[: len(self._losses) - self._high]
        half = len(losses) // 2
        slope = (median(losses[-half:]) - median(losses[:half])) / (len(losses) - half)
        level = [loss - slope * i for i, loss in enumerate(losses)]
        middle = median(level)
        residual = sorted(each - middle for each in level)
        deviation = median(abs(each) for each in residual)
        tail = residual[math.ceil(0.95 * (len(residual) - 1))]
        spread = max(_MAD_TO_DEVIATION * deviation, _TAIL_TO_DEVIATION * tail)
        center = median(losses)
        return center, center + max(self.threshold * spread, self.min_rise)

    def state_dict(self) -> dict[str, Any]:
        """Return the window and the count of high steps; exact after a JSON round trip."""
        return {"losses": list(self._losses), "high": self._high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, truncated to this window."""
        self._losses = [float(loss) for loss in state["losses"]][-self.window :]
        self._high = int(state["high"])
