"""Distributions of the loops of a token, with a given mean."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from statistics import NormalDist, fmean

from benchmarks.static_batch import Job

WIDTH = 0.5
"""Standard deviation of the logarithm in the lognormal distribution."""
SHALLOW = 2
"""The smaller one of two depths."""
_NORMAL = NormalDist()


def _geometric(quantile: float, scale: float) -> float:
    return math.log(1 - quantile) / math.log(1 - 1 / (1 + scale))


def _lognormal(quantile: float, scale: float) -> float:
    return scale * math.exp(WIDTH * _NORMAL.inv_cdf(quantile))


def depths(shape: str, n: int, mean: float, deepest: int, seed: int = 0) -> list[int]:
    """Return ``n`` depths in 1 .. ``deepest``, shuffled, with mean ``mean`` after the cut.

    Args:
        shape: "geometric", "lognormal" or "two depths" (2 and the deepest).
        n: Number of depths.
        mean: Mean depth.
        deepest: Largest depth.
        seed: Of the order.
    """
    if shape == "two depths":
        deep = round(n * (mean - SHALLOW) / (deepest - SHALLOW))
        found = [deepest] * deep + [SHALLOW] * (n - deep)
    else:
        inverse = _geometric if shape == "geometric" else _lognormal
        found = _with_mean(inverse, n, mean, deepest)
    random.Random(seed).shuffle(found)
    return found


def _with_mean(
    inverse: Callable[[float, float], float], n: int, mean: float, deepest: int
) -> list[int]:
    """Return the quantiles of a distribution whose scale gives them the mean."""
    low, high, found = 1e-3, 10.0 * deepest, list[int]()
    for _ in range(40):
        scale = (low + high) / 2
        quantiles = ((i + 0.5) / n for i in range(n))
        found = [min(max(math.ceil(inverse(q, scale)), 1), deepest) for q in quantiles]
        low, high = (scale, high) if fmean(found) < mean else (low, scale)
    return found


def jobs(
    lengths: Sequence[int], found: Sequence[int], n_prompt: int, deepest: int, vocabulary: int,
    seed: int = 1,
) -> list[Job]:  # fmt: skip
    """Return a job per length, with random prompts and consecutive depths of ``found``.

    Args:
        lengths: New tokens of every job. The first one's depth is the prompt's, ``deepest``.
        found: Depths, as many as the other tokens or more.
        n_prompt: Tokens of a prompt.
        deepest: All loops.
        vocabulary: Number of token ids.
        seed: Of the prompts.
    """
    generator, given = random.Random(seed), iter(found)
    return [
        Job(
            tuple(generator.randrange(vocabulary) for _ in range(n_prompt)),
            (deepest, *(next(given) for _ in range(length - 1))),
        )
        for length in lengths
    ]  # fmt: skip
