"""Timing two ways side by side, and the gate that both must pass first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_TOLERANCE = 1e-5
BFLOAT16_SLACK = 1.5


class GateError(AssertionError):
    """Fast and plain disagree: there is nothing to time."""


@dataclass(frozen=True)
class Row:
    """One comparison; ``dataclasses.asdict`` makes it JSON."""

    name: str
    dtype: str
    fast_seconds: float
    """Wall time of one call."""
    plain_seconds: float
    ratio: float
    """Wall time, plain over fast: median against median."""
    cpu_ratio: float
    """The same in CPU seconds of this process, which neighbours on the machine disturb less."""
    goal: float | None
    """The ratio aimed at; None where plain and fast share nearly all work."""
    error: float
    """Relative distance of the fast results from plain float32 ones."""
    plain_error: float
    """The same for the plain results; 0 in float32, where they are the reference."""

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return "no goal"
        return "met" if self.ratio >= self.goal else "MISSED"


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """||actual - expected|| / ||expected|| over all tensors together."""
    gaps = [(a.float() - b.float()).norm() for a, b in zip(actual, expected, strict=True)]
    norms = [b.float().norm() for b in expected]
    return float(torch.stack(gaps).norm() / torch.stack(norms).norm())


def worst(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative distance of any single tensor."""
    return max(distance([a], [b]) for a, b in zip(actual, expected, strict=True) if b.any())


def gate(
    name: str,
    fast: Sequence[Tensor],
    plain: Sequence[Tensor],
    *,
    reference: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Distances of fast and plain from ``reference``, the plain float32 results.

    In float32 every single tensor must agree. In bfloat16 the plain form is wrong too (rounding
    changes some choices of experts): there the fast form may be at most 1.5 times as far off.

    Raises:
        GateError: The fast form is further off.
    """
    if dtype == torch.float32:
        error, plain_error, allowed = worst(fast, reference), 0.0, FLOAT32_TOLERANCE
    else:
        error, plain_error = distance(fast, reference), distance(plain, reference)
        allowed = BFLOAT16_SLACK * plain_error
    if not error <= allowed:
        raise GateError(f"{name}: the fast form is off by {error:.2e}, allowed {allowed:.2e}")
    return error, plain_error


def compare(
    name: str,
    dtype: torch.dtype,
    fast: Callable[[], object],
    plain: Callable[[], object],
    *,
    alternations: int,
    goal: float | None,
    errors: tuple[float, float],
    repeats: int = 1,
) -> Row:
    """Time both in turns of ``repeats`` calls: what disturbs the machine then disturbs both."""
    wall: tuple[list[float], list[float]] = ([], [])
    cpu: tuple[list[float], list[float]] = ([], [])
    for _ in range(alternations):
        for i, call in enumerate((fast, plain)):
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                call()
            wall[i].append((time.perf_counter() - wall_start) / repeats)
            cpu[i].append((time.process_time() - cpu_start) / repeats)
    seconds = [statistics.median(times) for times in wall]
    cpu_seconds = [statistics.median(times) for times in cpu]
    return Row(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        fast_seconds=seconds[0],
        plain_seconds=seconds[1],
        ratio=seconds[1] / seconds[0],
        cpu_ratio=cpu_seconds[1] / cpu_seconds[0],
        goal=goal,
        error=errors[0],
        plain_error=errors[1],
    )
