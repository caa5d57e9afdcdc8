"""Rank correlation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.ArrayLike


def spearman(x: Numbers, y: Numbers) -> float:
    """Return Spearman's rho with mean ranks for ties, and 0 if one side is constant."""
    a, b = _ranks(x), _ranks(y)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def _ranks(values: Numbers) -> npt.NDArray[np.float64]:
    _, place, count = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (count.cumsum() - (count - 1) / 2)[place.reshape(-1)]
