"""How many parameters is a loop worth? The exponent phi of the iso-depth law.

A looped model of N_once + N_rec parameters at R loops has the loss of one without loops of
N = N_once + R^phi N_rec parameters, and that loss is E + A N^-alpha (arXiv 2604.21106).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
_ROUNDING = 1e-9
_AT_ONCE = 100
"""Refits that are searched together, so that they fit in memory."""
_PHI, _ALPHA = np.linspace(-1, 2, 601), np.linspace(0, 3, 31)
"""Values that are tried; with alpha = 0 the loss falls with log N."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval; NaN if larger models are not surely better."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "not determined"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Runs:
    """The runs of one arm."""

    losses: Sequence[float]
    """One for every seed."""
    recurrent: float
    """Parameters applied at every loop; of a model without loops, all."""
    once: float = 0
    """Parameters applied once."""
    loops: int = 1


def phi(arms: Sequence[Runs], seed: int = 0) -> Estimate:
    """Fit E, A, alpha and phi to the losses of the arms by least squares.

    At least three arms of one loop and one of more are needed; all saw the same tokens. What a
    seed adds to every arm, such as the order of the data, is removed first, as arms may have
    different numbers of seeds. The interval is that of refits to losses with noise: its deviation
    is what arms and seeds leave unexplained, redrawn for every refit, as few runs leave it
    uncertain.
    """
    log_n = np.log([arm.once + arm.loops**_PHI * arm.recurrent for arm in arms])
    losses, spread, free = _of_arms(arms)
    rng = np.random.default_rng(seed)
    chi2 = rng.chisquare(free, (RESAMPLES, 1)) if free else np.ones((RESAMPLES, 1))
    noise = rng.standard_normal((RESAMPLES, len(arms))) @ spread.T / np.sqrt(chi2)
    refits = _best(log_n, losses + noise)
    if np.isnan(refits).mean() > 0.025:
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.nanquantile(refits, (0.025, 0.975))
    return Estimate(float(_best(log_n, losses[None])[0]), float(low), float(high))


def _of_arms(arms: Sequence[Runs]) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Fit loss = arm + seed; return the arms' parts, a root of their covariance, and its degrees
    of freedom, by which the covariance is not divided yet.
    """
    places = [(i, j) for i, arm in enumerate(arms) for j in range(len(arm.losses))]
    seeds = max(len(arm.losses) for arm in arms)
    design = np.zeros((len(places), len(arms) + seeds - 1))
    for row, (i, j) in enumerate(places):
        design[row, i] = 1
        if j:
            design[row, len(arms) + j - 1] = 1
    y = np.concatenate([arm.losses for arm in arms])
    inverse = np.linalg.inv(design.T @ design)
    fitted = inverse @ design.T @ y
    squares = float(((y - design @ fitted) ** 2).sum())
    root = np.linalg.cholesky(inverse[: len(arms), : len(arms)]) * np.sqrt(squares)
    return fitted[: len(arms)], root, len(places) - design.shape[1]


def _best(log_n: NDArray[np.float64], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the phi of the fit that leaves the least squares.

    ``log_n``: (arms, values of phi); ``losses``: (fits, arms). NaN where no loss falls with N.
    """
    log_n = log_n - log_n[:, :1].mean()
    x = np.concatenate([log_n if a == 0 else -np.expm1(-a * log_n) / a for a in _ALPHA], axis=1)
    x -= x.mean(0)
    x /= np.sqrt((x**2).sum(0))
    found = list[NDArray[np.float64]]()
    for first in range(0, len(losses), _AT_ONCE):
        explained = -np.minimum(losses[first : first + _AT_ONCE] @ x, 0)
        best = _PHI[explained.argmax(1) % len(_PHI)]
        found.append(np.where(explained.max(1) > _ROUNDING, best, np.nan))
    return np.concatenate(found)
