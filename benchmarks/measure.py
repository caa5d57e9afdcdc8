"""Interleaved timing of implementations, behind a correctness gate."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.clock import clocked, device, release, shares_text, synchronize, where_time_goes
from benchmarks.roofline import Floor, Work

FLOAT32_TOLERANCE = 1e-5
BFLOAT16_SLACK = 1.5


class GateError(AssertionError):
    """Raised when the fast and the plain implementation disagree."""


@dataclass(frozen=True)
class Row:
    """Comparison of a fast with a plain implementation."""

    name: str
    dtype: str
    fast_seconds: float
    """Time of one call."""
    plain_seconds: float
    ratio: float
    """Median plain time over median fast time."""
    cpu_ratio: float
    """The same in CPU seconds of this process, which are less sensitive to other load."""
    goal: float | None
    """Target ratio; None where plain and fast share nearly all work."""
    error: float
    """Relative error of the fast results against plain float32."""
    plain_error: float
    """The same of the plain results; 0 in float32, where they are the reference."""
    threads: int = 1
    dense_seconds: float | None = None
    """Time of a dense model of equal FLOPs, interleaved with the others."""
    rest_seconds: float | None = None
    """Time of the parts that both implementations share, interleaved with the others."""
    rest: str = ""
    """Description of those parts."""
    floor: Floor | None = None
    """Roofline bound."""
    why: str = ""
    """Profile of the fast implementation, for a missed goal."""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return "met", "MISSED" or "no goal"."""
        if self.goal is None:
            return "no goal"
        return "met" if self.ratio >= self.goal else "MISSED"

    @property
    def share(self) -> float | None:
        """Fraction of the roofline that the fast implementation reaches."""
        return None if self.floor is None else self.floor.seconds / self.fast_seconds

    @property
    def reason(self) -> str:
        """Explain why the ratio is not larger, from measurements."""
        found = []
        if self.rest_seconds is not None:
            most = self.plain_seconds / self.rest_seconds
            found.append(
                f"{self.rest} take {time_text(self.rest_seconds)}, "
                f"{self.rest_seconds / self.fast_seconds:.0%} of the fast time and "
                f"{self.rest_seconds / self.plain_seconds:.0%} of the plain time: "
                f"at most {most:.1f}x if all else were free"
            )
        if self.floor is not None and self.share is not None:
            plain = self.floor.seconds / self.plain_seconds
            found.append(
                f"of the roofline ({self.floor.bound}) fast reaches "
                f"{self.share:.0%}, plain {plain:.0%}"
            )
        return "; ".join([*found, self.why] if self.why else found)


@dataclass(frozen=True)
class Finding:
    """Measurement that is not a ratio to the plain implementation."""

    name: str
    dtype: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper limit."""
    why: str = ""
    """Breakdown of the value."""
    threads: int = 1
    error: float | None = None
    """Error found by the gate."""
    seconds: float | None = None
    floor: Floor | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Return "met", "MISSED" or "no goal"."""
        if self.goal is None:
            return "no goal"
        met = self.value <= self.goal if self.at_most else self.value >= self.goal
        return "met" if met else "MISSED"

    @property
    def share(self) -> float | None:
        """Fraction of the roofline that is reached."""
        if self.floor is None or not self.seconds:
            return None
        return self.floor.seconds / self.seconds

    @property
    def reason(self) -> str:
        """Explain the value, from measurements."""
        found = [self.why] if self.why else []
        if self.floor is not None and self.share is not None:
            found.append(f"{self.share:.0%} of the roofline ({self.floor.bound})")
        return "; ".join(found)


@dataclass(frozen=True)
class Absent:
    """Measurement that could not be taken, and why."""

    name: str
    dtype: str
    reason: str
    verdict: str = "no figure"


Measured = Row | Finding | Absent


@dataclass(frozen=True)
class Times:
    """Median seconds of one implementation."""

    wall: float
    cpu: float


def alternate(
    forms: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    repeats: int | Mapping[str, int] = 1,
    untimed: int = 0,
) -> dict[str, Times]:
    """Time all implementations interleaved, so that noise affects all of them alike.

    Args:
        forms: Name -> call.
        turns: Rounds over all implementations; medians are over these.
        repeats: Timed calls per round, one number or one per name.
        untimed: Warm-up calls per round, for caches and compiled kernels that the other
            implementations have evicted.
    """
    wall: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    if device().type == "cuda":
        for call in forms.values():  # the first call loads and selects kernels
            call()
        synchronize()
    for _ in range(turns):
        for name, call in forms.items():
            for _ in range(untimed):
                call()
            n = repeats if isinstance(repeats, int) else repeats[name]
            seconds = clocked(call, n)
            wall[name].append(seconds[0])
            cpu[name].append(seconds[1])
    return {name: Times(statistics.median(wall[name]), statistics.median(cpu[name]))
            for name in forms}  # fmt: skip


def distances(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return ||actual - expected|| / ||expected|| of every tensor that is not zero."""
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
    """Return the errors of fast and plain against ``reference``, the plain float32 results.

    In float32 the worst tensor counts. In bfloat16 plain has errors too: the median tensor of fast
    may be 1.5 times as far off as that of plain. (The worst is unsuitable: rounding sometimes flips
    a token's choice between two experts of nearly equal score.)

    Raises:
        GateError: The fast implementation is further off.
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
        raise GateError(
            f"{name}: the fast implementation is off by {error:.2e}, allowed {allowed:.2e}"
        )
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
    repeats: int | Mapping[str, int] = 1,
    untimed: int = 0,
    dense: Callable[[], object] | None = None,
    rest: tuple[str, Callable[[], object]] | None = None,
    work: Work | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Row:
    """Time fast against plain, a dense model, the shared parts and the roofline.

    Args:
        name: Name of the row.
        dtype: Dtype of the matmuls.
        fast: Call of the fast implementation.
        plain: Call of the plain implementation.
        alternations: Rounds of the interleaved timing.
        goal: Target ratio, or None.
        errors: Result of :func:`gate`.
        repeats: Timed calls per round, one number or one for each of "fast", "plain", "dense",
            "rest".
        untimed: Warm-up calls per round.
        dense: Call of a dense model of equal FLOPs.
        rest: Description and call of the parts that both implementations share.
        work: Lower bounds on the work of a call.
        numbers: More numbers for the record.
    """
    forms = {"fast": fast, "plain": plain}
    if dense is not None:
        forms["dense"] = dense
    if rest is not None:
        forms["rest"] = rest[1]
    times = alternate(forms, turns=alternations, repeats=repeats, untimed=untimed)
    seconds = {form: each.wall for form, each in times.items()}
    row = Row(
        name=name,
        dtype=dtype_name(dtype),
        fast_seconds=seconds["fast"],
        plain_seconds=seconds["plain"],
        ratio=seconds["plain"] / seconds["fast"],
        cpu_ratio=times["plain"].cpu / max(times["fast"].cpu, 1e-9),
        goal=goal,
        error=errors[0],
        plain_error=errors[1],
        threads=torch.get_num_threads(),
        dense_seconds=seconds.get("dense"),
        rest_seconds=seconds.get("rest"),
        rest="" if rest is None else rest[0],
        floor=floor(work, dtype),
        numbers=dict(numbers or {}),
    )
    if row.verdict != "MISSED":
        return row
    return replace(row, why=f"time of fast: {shares_text(where_time_goes(fast))}")


def floor(work: Work | None, dtype: torch.dtype) -> Floor | None:
    """Return the roofline bound of ``work`` on the device under test."""
    return None if work is None else roofline.floor(work, dtype, device())


def attempt(name: str, dtype: torch.dtype, take: Callable[[], Measured]) -> Measured:
    """Run ``take``; out of memory returns an :class:`Absent` row."""
    try:
        return take()
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {str(error).splitlines()[0]}"
    # the traceback's frames hold tensors until the error is released
    release()
    return Absent(name, dtype_name(dtype), reason)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def time_text(seconds: float) -> str:
    """Format with three digits and a unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
