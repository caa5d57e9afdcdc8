"""Figures over seeds, as numbers and as words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

from experiments.claim import Record


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Arm -> its records, by seed, in the order in which the arms come."""
    arms: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        arms[record.arm].append(record)
    return {arm: sorted(found, key=lambda record: record.seed) for arm, found in arms.items()}


def over_seeds(records: Sequence[Record], figure: Callable[[Record], float]) -> tuple[float, float]:
    """Mean and standard deviation (0 for a single seed) of a figure."""
    return mean_std([figure(record) for record in records])


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def shown(value: tuple[float, float], digits: int = 4) -> str:
    """ "mean ± deviation"."""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"
