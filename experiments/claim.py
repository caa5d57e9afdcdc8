"""Types shared by all claims: description, cells, records, summary, verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

HOLDS = "holds"
HOLDS_IN_PART = "holds in part"
DOES_NOT_HOLD = "does not hold here"
UNCLEAR = "unclear"
QUICK = "quick"
"""Scale of a smoke test; never recorded."""


def verdict(holds: bool, in_part: bool = False, *, unclear: str = "") -> str:
    """Return the verdict for the full and the partial pass mark.

    ``unclear`` takes precedence: it says what would settle the claim if these results cannot.
    """
    if unclear:
        return f"{UNCLEAR}: {unclear}"
    return HOLDS if holds else HOLDS_IN_PART if in_part else DOES_NOT_HOLD


@dataclass(frozen=True)
class Claim:
    """The description of a claim, written in ``claim.yaml`` before the run."""

    id: str
    title: str
    statement: str
    source: str
    """Authors or paper, with arXiv numbers."""
    literature: str
    """Published findings."""
    expected: str
    """Expected result and reasons."""
    method: str
    """Task, arms, metrics and shared settings."""
    pass_mark: str
    """Criterion for each verdict; ``summarise`` applies it."""
    limits: str
    """What an experiment of this size cannot show."""
    hardware: dict[str, str]
    """Scale ("cpu", "gpu") -> hardware it is sized for."""
    minutes: dict[str, float] = field(default_factory=dict)
    """Scale -> wall-clock minutes on that hardware, if timed."""

    @classmethod
    def read(cls, module: str, constants: Mapping[str, Any]) -> Claim:
        """Read ``claim.yaml`` next to ``module``; ``{NAME}`` inserts a constant."""
        text = Path(module).with_name("claim.yaml").read_text(encoding="utf-8")
        values: dict[str, Any] = yaml.safe_load(text)
        for key, value in values.items():
            values[key] = value.format_map(constants) if isinstance(value, str) else value
        return cls(**values)

    @property
    def scales(self) -> tuple[str, ...]:
        """Return the scales that can be recorded."""
        return tuple(self.hardware)


@dataclass(frozen=True)
class Cell:
    """One run: an arm with one seed."""

    arm: str
    """Compared variant, such as "dense-lr0.001"."""
    seed: int
    """Seed of weights, data order and depths."""
    settings: dict[str, Any]
    """All other inputs, JSON-ready; a record is valid only for equal settings."""

    @property
    def name(self) -> str:
        """Return the name of the record file, unique within a scale."""
        return f"{self.arm}-seed{self.seed}"


def sweep(arms: Mapping[str, dict[str, Any]], seeds: Iterable[int] = range(3)) -> list[Cell]:
    """Return a cell for every arm (name -> settings) and seed, grouped by arm."""
    return [Cell(arm, seed, settings) for arm, settings in arms.items() for seed in seeds]


def arms_by_seed(
    arms: Mapping[str, Mapping[str, Any]], settings: Callable[..., dict[str, Any]]
) -> list[Cell]:
    """Return the cells of all arms, one seed after the other.

    Args:
        arms: Arm -> arguments of ``settings``, and "seeds" (1 by default).
        settings: Returns the settings of a cell.
    """
    found = list[Cell]()
    for arm, about in arms.items():
        changes = {key: value for key, value in about.items() if key != "seeds"}
        found += sweep({arm: settings(**changes)}, range(about.get("seeds", 1)))
    return sorted(found, key=lambda cell: cell.seed)


@dataclass(frozen=True)
class Place:
    """Folders a cell may write to."""

    shared: Path
    """Prepared text, shared by all cells."""
    models: Path
    """Models that the cells of a claim keep."""
    own: Path
    """Checkpoints of this cell, deleted when it finishes."""


@dataclass(frozen=True)
class Record:
    """The result of a finished cell."""

    claim: str
    scale: str
    arm: str
    seed: int
    settings: dict[str, Any]
    figures: dict[str, Any]
    """Metrics; None for a non-finite number."""
    seconds: float
    """Wall-clock time of the cell."""
    machine: str
    versions: str
    """Versions of Python and PyTorch."""
    commit: str
    """Commit of the source; "" outside a repository."""


@dataclass(frozen=True)
class Summary:
    """Aggregated results of all cells of a scale."""

    verdict: str
    sentence: str
    """The finding in a few sentences with numbers."""
    key: str
    """The deciding metrics, short enough for a table cell."""
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Table rows, with the spread over seeds."""
    data: dict[str, Any] = field(default_factory=dict)
    """Input of ``plot``."""


class Experiment(Protocol):
    """Interface of the package of a claim."""

    CLAIM: Claim

    def cells(self, scale: str) -> list[Cell]:
        """Return all cells of a scale; "quick" has one or two that take seconds."""

    def run_cell(self, cell: Cell, place: Place) -> dict[str, Any]:
        """Run one cell and return JSON-ready metrics that depend on the cell alone."""

    def summarise(self, records: Sequence[Record]) -> Summary:
        """Apply the pass mark to the records of a scale."""

    def plot(self, summary: Summary, path: Path) -> None:
        """Plot ``summary.data`` to ``path``."""
