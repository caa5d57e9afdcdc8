"""Least-squares fits of three forms of a loss that falls with loops.

    exponential   L_inf + Z exp(-z T)
    floor_power   L_inf + Z T^-z
    power                 Z T^-z

For a fixed z each form is linear in the other parameters, so a grid search over z with a linear
regression at every point finds the best fit without starting values. Z is never negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_RATES = np.geomspace(1e-4, 10.0, 3000)
"""(R,) grid of z."""


def _exponential(loops: Array, rate: float) -> Array:
    return np.exp(-rate * loops)


def _power(loops: Array, rate: float) -> Array:
    return loops**-rate


FORMS: dict[str, tuple[Callable[[Array, float], Array], bool]] = {
    "exponential": (_exponential, True),
    "floor_power": (_power, True),
    "power": (_power, False),
}
"""Name -> (decay with T, whether a floor is added)."""


@dataclass(frozen=True)
class Fit:
    """A fitted form."""

    form: str
    """A key of :data:`FORMS`."""
    floor: float
    """L_inf; 0 for a form without a floor."""
    scale: float
    """Z."""
    rate: float
    """z."""

    def predict(self, loops: Sequence[int]) -> Array:
        """Return the predicted loss at each number of loops."""
        decay, _ = FORMS[self.form]
        return self.floor + self.scale * decay(np.asarray(loops, float), self.rate)


def fit(form: str, loops: Sequence[int], losses: Sequence[float]) -> Fit:
    """Fit ``form`` to ``losses`` by least squares."""
    decay, has_floor = FORMS[form]
    t, y = np.asarray(loops, float), np.asarray(losses, float)
    x_RT = np.stack([decay(t, rate) for rate in _RATES])
    x_mean_R1 = x_RT.mean(1, keepdims=True) if has_floor else np.zeros((len(_RATES), 1))
    y_mean = float(y.mean()) if has_floor else 0.0
    x_RT = x_RT - x_mean_R1
    scale_R = (x_RT @ (y - y_mean)) / (x_RT**2).sum(1)
    error_R = ((scale_R[:, None] * x_RT + y_mean - y) ** 2).sum(1)
    best = int(np.where(scale_R >= 0, error_R, np.inf).argmin())
    scale = max(0.0, float(scale_R[best]))
    return Fit(form, y_mean - scale * float(x_mean_R1[best, 0]), scale, float(_RATES[best]))
