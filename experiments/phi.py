"""How many parameters is a loop worth? The exponent phi of the iso-depth law.

A looped model of N_once + N_rec parameters at R loops has the loss of a dense model of
N_once + R^phi N_rec parameters (arXiv 2604.21106).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_GRID = np.linspace(-1, 2, 3001)
"""Values of phi that are tried."""


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that holds 95% of its bootstrap samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Runs:
    """The runs of one arm."""

    losses: Sequence[float]
    """One for every seed."""
    recurrent: float
    """Parameters inside the loop; of a dense model all."""
    once: float = 0
    """Parameters outside the loop."""
    loops: int = 1


def phi(arms: Sequence[Runs], seed: int = 0) -> Estimate:
    """Fit loss = a + b log(N_once + R^phi N_rec) to the means of the arms by least squares.

    At least two arms of one loop and one of more are needed; all have seen the same tokens. The
    seeds of every arm are resampled for the interval.
    """
    log_n = np.log([arm.once + arm.loops**_GRID * arm.recurrent for arm in arms])
    rng = np.random.default_rng(seed)
    value = _best(log_n, [np.mean(arm.losses) for arm in arms])
    found = [
        _best(log_n, [np.mean(rng.choice(arm.losses, len(arm.losses))) for arm in arms])
        for _ in range(RESAMPLES)
    ]
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(value, float(low), float(high))


def _best(log_n: NDArray[np.float64], losses: Sequence[np.floating]) -> float:
    """Return the phi at which a line through (log_n, losses) leaves the least squares.

    ``log_n``: (arms, values of phi).
    """
    x = log_n - log_n.mean(0)
    y = np.array(losses) - np.mean(losses)
    explained = (y @ x) ** 2 / (x**2).sum(0)
    return float(_GRID[np.argmax(explained)])
