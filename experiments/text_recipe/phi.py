"""How many parameters is a loop worth? The exponent phi of the iso-depth law.

A looped model of N_once + N_rec parameters at R loops has the loss of a dense model of
N_once + R^phi N_rec parameters (arXiv 2604.21106). Here N_once is 0: the whole stack is looped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A value with the interval that holds 95% of its bootstrap samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


Runs = Sequence[tuple[float, Sequence[float]]]
"""(parameters, bits per byte of every seed) of each arm."""


def phi(
    dense: Runs, looped: tuple[float, Sequence[float]], n_loops: int, seed: int = 0
) -> Estimate:
    """Estimate phi of one looped arm against dense arms of rising size on the same tokens.

    The dense losses are fitted by a line in the logarithm of the parameters, which is read at the
    looped loss. The seeds of every arm are resampled for the interval.
    """
    rng = np.random.default_rng(seed)
    value = _phi([(n, np.mean(bits)) for n, bits in dense], looped[0], np.mean(looped[1]), n_loops)
    found = []
    for _ in range(RESAMPLES):
        points = [(n, np.mean(rng.choice(bits, len(bits)))) for n, bits in dense]
        at = np.mean(rng.choice(looped[1], len(looped[1])))
        found.append(_phi(points, looped[0], at, n_loops))
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


def _phi(
    dense: Sequence[tuple[float, np.floating]], parameters: float, bits: np.floating, n_loops: int
) -> float:
    slope, offset = np.polyfit([math.log(n) for n, _ in dense], [b for _, b in dense], 1)
    log_equivalent = (bits - offset) / slope
    return float((log_equivalent - math.log(parameters)) / math.log(n_loops))
