"""Timing several ways side by side, and the gate that they must pass first."""

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
    """Fast and plain disagree: there is nothing to time."""


@dataclass(frozen=True)
class Row:
    """One comparison; ``dataclasses.asdict`` makes it JSON."""

    name: str
    dtype: str
    fast_seconds: float
    """Time of one call."""
    plain_seconds: float
    ratio: float
    """Plain over fast: median against median."""
    cpu_ratio: float
    """The same in CPU seconds of this process, which neighbours on the machine disturb less."""
    goal: float | None
    """The ratio aimed at; None where plain and fast share nearly all work."""
    error: float
    """Relative distance of the fast results from plain float32 ones."""
    plain_error: float
    """The same for the plain results; 0 in float32, where they are the reference."""
    threads: int = 1
    dense_seconds: float | None = None
    """Time of a dense model of as many FLOPs, measured in turns with the others."""
    rest_seconds: float | None = None
    """Time of what no fast form can save, measured in turns with the others."""
    rest: str = ""
    """What ``rest_seconds`` is the time of."""
    floor: Floor | None = None
    """The least time this machine allows, by formula."""
    why: str = ""
    """For a goal that was missed: where the time of the fast form goes."""
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "met", "MISSED" or "no goal"."""
        if self.goal is None:
            return "no goal"
        return "met" if self.ratio >= self.goal else "MISSED"

    @property
    def share(self) -> float | None:
        """Share of the machine's limit that the fast form reaches."""
        return None if self.floor is None else self.floor.seconds / self.fast_seconds

    @property
    def reason(self) -> str:
        """Why the ratio is not larger, in measured figures."""
        found = []
        if self.rest_seconds is not None:
            most = self.plain_seconds / self.rest_seconds
            found.append(
                f"{self.rest} take {time_text(self.rest_seconds)}, "
                f"{self.rest_seconds / self.fast_seconds:.0%} of the fast form's time and "
                f"{self.rest_seconds / self.plain_seconds:.0%} of the plain one's: "
                f"at most {most:.1f}x if the rest were free"
            )
        if self.floor is not None and self.share is not None:
            plain = self.floor.seconds / self.plain_seconds
            found.append(
                f"of the machine's limit ({self.floor.bound}) the fast form reaches "
                f"{self.share:.0%}, the plain one {plain:.0%}"
            )
        return "; ".join([*found, self.why] if self.why else found)


@dataclass(frozen=True)
class Finding:
    """One figure that is not a ratio to the plain form."""

    name: str
    dtype: str
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False
    """Whether the goal is an upper limit."""
    why: str = ""
    """What the figure consists of, in measured figures."""
    threads: int = 1
    error: float | None = None
    """What the gate found."""
    seconds: float | None = None
    floor: Floor | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "met", "MISSED" or "no goal"."""
        if self.goal is None:
            return "no goal"
        met = self.value <= self.goal if self.at_most else self.value >= self.goal
        return "met" if met else "MISSED"

    @property
    def share(self) -> float | None:
        """Share of the machine's limit that is reached."""
        if self.floor is None or not self.seconds:
            return None
        return self.floor.seconds / self.seconds

    @property
    def reason(self) -> str:
        """Why the figure is what it is, in measured figures."""
        found = [self.why] if self.why else []
        if self.floor is not None and self.share is not None:
            found.append(f"{self.share:.0%} of the machine's limit ({self.floor.bound})")
        return "; ".join(found)


@dataclass(frozen=True)
class Absent:
    """A figure that could not be taken, and why."""

    name: str
    dtype: str
    reason: str
    verdict: str = "no figure"


Measured = Row | Finding | Absent


@dataclass(frozen=True)
class Times:
    """Median seconds of one form."""

    wall: float
    cpu: float


def alternate(
    forms: Mapping[str, Callable[[], object]],
    *,
    turns: int,
    repeats: int | Mapping[str, int] = 1,
    untimed: int = 0,
) -> dict[str, Times]:
    """Time all forms in turns: what disturbs the machine then disturbs all of them.

    Args:
        forms: Name -> call.
        turns: How often each has its turn; medians are over these.
        repeats: Calls of a turn, one number or one for each name.
        untimed: Calls before those of a turn: the forms that had theirs in between have displaced
            from caches, and among compiled kernels, what a form alone would find.
    """
    wall: dict[str, list[float]] = {name: [] for name in forms}
    cpu: dict[str, list[float]] = {name: [] for name in forms}
    if device().type == "cuda":
        for call in forms.values():  # kernels are loaded and chosen at their first call
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
    repeats: int | Mapping[str, int] = 1,
    untimed: int = 0,
    dense: Callable[[], object] | None = None,
    rest: tuple[str, Callable[[], object]] | None = None,
    work: Work | None = None,
    numbers: Mapping[str, float] | None = None,
) -> Row:
    """Time the forms in turns and set the fast one beside the others and the machine's limit.

    Args:
        name: Of the row.
        dtype: Of the products.
        fast: One call of the fast form.
        plain: One call of the plain form.
        alternations: Turns of each form.
        goal: The ratio aimed at, or None.
        errors: What :func:`gate` returned.
        repeats: Calls of a turn; one number, or one for each of "fast", "plain", "dense", "rest".
        untimed: Calls before those of a turn.
        dense: One call of a dense model of as many FLOPs.
        rest: What no fast form can save, in words, and one call of it alone.
        work: What one call has to compute and to read at least.
        numbers: More figures for the record.
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
    return replace(row, why=f"time of the fast form: {shares_text(where_time_goes(fast))}")


def floor(work: Work | None, dtype: torch.dtype) -> Floor | None:
    """The least time of ``work`` on the measured device, with the threads in use now."""
    return None if work is None else roofline.floor(work, dtype, device())


def attempt(name: str, dtype: torch.dtype, take: Callable[[], Measured]) -> Measured:
    """What ``take`` measures; a device that is too small for it gives a row that says so."""
    try:
        return take()
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {str(error).splitlines()[0]}"
    # frames of the failed call hold its tensors until the error is gone
    release()
    return Absent(name, dtype_name(dtype), reason)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def time_text(seconds: float) -> str:
    """With three figures and its unit."""
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
