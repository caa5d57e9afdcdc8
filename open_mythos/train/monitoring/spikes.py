"""Is the loss jumping up? A decision from recent losses alone; what follows is the trainer's.

A spike is a run of steps whose loss lies far above the recent ones. Far is measured by the window's
own spread, which its worst steps cannot move much:

    centre = median of the window
    rest   = the window without its trend, the line through the medians of its two halves
    spread = max(1.4826 median |rest|, 95th percentile of rest / 1.6449), rest less its median
    high   = loss > centre + max(threshold spread, min_rise)

Both terms of the spread estimate the standard deviation of Gaussian noise. The second one also sees
that some steps are harder by nature, such as those for which a depth plan draws further loops. The
centre keeps the trend: while the loss falls it lies higher than the loss is now, which errs on the
side of silence. One high step is a bad batch; ``patience`` of them in a row are a spike.

This module loads no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError

_MAD_TO_DEVIATION = 1.4826
"""Standard deviation over median absolute deviation of a Gaussian."""
_TAIL_TO_DEVIATION = 1 / 1.6449
"""Standard deviation over the distance from median to 95th percentile of a Gaussian."""


@dataclass(frozen=True)
class Spike:
    """The verdict on one step."""

    step: int
    """The step whose loss made it one: the last of ``patience`` high ones."""
    loss: float
    """Its loss, nats per token."""
    centre: float
    """Median of the window."""
    limit: float
    """The loss above which a step is high."""

    def __str__(self) -> str:
        return (
            f"the loss rose to {self.loss:.4f} at step {self.step}: recent steps lie around "
            f"{self.centre:.4f}, and {self.limit:.4f} is where a spike begins"
        )


class SpikeDetector:
    """Watches one loss per step.

    Losses that are not finite say nothing here: such steps are skipped by the trainer. After a
    spike the window begins anew, so that a loss that stays at another level is reported once.

    Args:
        window: Recent finite losses that are compared with; judging begins with a quarter of them.
        threshold: How many spreads above the centre is high.
        patience: High steps in a row that are a spike.
        min_rise: Nats; a smaller rise is never high, however quiet the window.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        window: int = 128,
        threshold: float = 6.0,
        patience: int = 4,
        min_rise: float = 0.1,
    ) -> None:
        check_count("window", window, least=8)
        check_count("patience", patience)
        for name, value in (("threshold", threshold), ("min_rise", min_rise)):
            if not 0 < value < math.inf:
                raise ConfigError("out of range", where=name, value=value, allowed="finite and > 0")
        self.window, self.threshold = window, float(threshold)
        self.patience, self.min_rise = patience, float(min_rise)
        self._losses: list[float] = []
        self._high = 0

    def observe(self, step: int, loss: float) -> Spike | None:
        """Take in the loss of a step; a :class:`Spike` if it completes one.

        Under data parallelism every rank must give the same loss, that of the whole batch, so that
        all come to the same verdict.
        """
        if not math.isfinite(loss):
            return None
        verdict = None
        if 4 * (len(self._losses) - self._high) >= self.window:
            centre, limit = self._limit()
            self._high = self._high + 1 if loss > limit else 0
            if self._high == self.patience:
                verdict = Spike(step, loss, centre, limit)
        self._losses = [*self._losses[-(self.window - 1) :], loss]
        if verdict is not None:
            self.reset()
        return verdict

    def reset(self) -> None:
        """Forget the window, as after a rewind without a stored state."""
        self._losses, self._high = [], 0

    def _limit(self) -> tuple[float, float]:
        """Centre of the window, and the loss above which a step is high."""
        # the high steps of a run that has begun are no part of what they are compared with
        losses = self._losses[: len(self._losses) - self._high]
        half = len(losses) // 2
        slope = (median(losses[-half:]) - median(losses[:half])) / (len(losses) - half)
        level = [loss - slope * i for i, loss in enumerate(losses)]
        middle = median(level)
        rest = sorted(each - middle for each in level)
        deviation = median(abs(each) for each in rest)
        tail = rest[math.ceil(0.95 * (len(rest) - 1))]
        spread = max(_MAD_TO_DEVIATION * deviation, _TAIL_TO_DEVIATION * tail)
        centre = median(losses)
        return centre, centre + max(self.threshold * spread, self.min_rise)

    def state_dict(self) -> dict[str, Any]:
        """The window and the count of high steps; JSON gives them back exactly."""
        return {"losses": list(self._losses), "high": self._high}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a stored state, cut to this window; what follows is as if never interrupted."""
        self._losses = [float(loss) for loss in state["losses"]][-self.window :]
        self._high = int(state["high"])
