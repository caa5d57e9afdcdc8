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


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """||actual - expected|| / ||expected|| of every tensor that is not zero."""
    pairs = ((a.float(), b.float()) for a, b in zip(actual, expected, strict=True))
    return [float((a - b).norm() / b.norm()) for a, b in pairs if b.any()]


def gate(
    name: str,
    fast: Sequence[Tensor],
    plain: Sequence[Tensor],
    *,
    reference: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Distances of fast and plain from ``reference``, the plain float32 results.

    In float32 the worst tensor counts. In bfloat16 the plain form is wrong too: its median tensor
    sets the scale, and the fast form's may be 1.5 times as far off. (Not the worst: rounding turns
    a token's choice between two experts of nearly equal score, in either form, here and there.)

    Raises:
        GateError: The fast form is further off.
    """
    if dtype == torch.float32:
        error, plain_error = max(distances(fast, reference)), 0.0
        allowed = FLOAT32_TOLERANCE
    else:
        error, plain_error = (
            statistics.median(distances(results, reference)) for results in (fast, plain)
        )
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
