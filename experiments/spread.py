"""Statistics of metrics over seeds, and their formatting."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import mean, stdev

from experiments.claim import Record

Metric = str | Callable[[Record], float]
"""Key of a metric in ``Record.figures``, or a function of the record."""


def by_arm(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group records by arm, keeping their order; sort each group by seed."""
    arms: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        arms[record.arm].append(record)
    return {arm: sorted(found, key=lambda record: record.seed) for arm, found in arms.items()}


def each(records: Iterable[Record], metric: Metric) -> list[float]:
    """Return the value of a metric for each record."""
    if isinstance(metric, str):
        return [record.figures[metric] for record in records]
    return [metric(record) for record in records]


def over_seeds(records: Iterable[Record], metric: Metric) -> tuple[float, float]:
    """Return mean and sample standard deviation of a metric."""
    return mean_std(each(records, metric))


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and sample standard deviation; the latter is 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def minus(ours: Iterable[float], theirs: Iterable[float]) -> tuple[float, float]:
    """Return mean and deviation of the per-seed differences."""
    return mean_std([a - b for a, b in zip(ours, theirs, strict=True)])


def paired(ours: Sequence[Record], theirs: Sequence[Record], metric: Metric) -> tuple[float, float]:
    """Return mean and deviation of the differences, over the seeds that both have."""
    both = min(len(ours), len(theirs))
    return minus(each(ours[:both], metric), each(theirs[:both], metric))


def at_depth(values: Sequence[float], depths: Sequence[int], n_loops: int) -> float:
    """Return the one of ``values`` that belongs to ``n_loops``; a dense model has a single one."""
    return values[list(depths).index(n_loops)] if len(values) > 1 else values[0]


def columns(rows: Iterable[Sequence[float]]) -> list[float]:
    """Return the mean of each column."""
    return [mean(column) for column in zip(*rows, strict=True)]


def shown(value: tuple[float, float], digits: int = 4) -> str:
    """Format "mean ± deviation", or the mean alone of a single value."""
    return f"{value[0]:.{digits}f}" + (f" ± {value[1]:.{digits}f}" if value[1] else "")


def share(records: Sequence[Record], metric: Metric) -> str:
    """Format a share in percent, with its deviation over seeds in percentage points."""
    middle, spread = over_seeds(records, metric)
    return f"{middle:.1%}" + (f" ± {100 * spread:.1f}" if len(records) > 1 else "")


def span(values: Sequence[float], form: str, between: str = " to ") -> str:
    """Format the smallest and the largest value; a single value if both print alike."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low}{between}{high}"
