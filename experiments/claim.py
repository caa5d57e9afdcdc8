"""The parts of a claim: its words, the cells to run, the records of what came, the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

HOLDS = "holds"
HOLDS_IN_PART = "holds in part"
DOES_NOT_HOLD = "does not hold here"
UNCLEAR = "unclear"
QUICK = "quick"
"""The scale of a smoke test; never recorded."""


def verdict(holds: bool, in_part: bool = False, *, unclear: str = "") -> str:
    """Return the verdict: unclear before everything else, then holds, then in part.

    Args:
        holds: The whole pass mark is met.
        in_part: The weaker mark is met.
        unclear: What would settle the claim, if these results cannot; "" if they can.
    """
    if unclear:
        return f"{UNCLEAR}: {unclear}"
    return HOLDS if holds else HOLDS_IN_PART if in_part else DOES_NOT_HOLD


@dataclass(frozen=True)
class Claim:
    """A claim in words; all of it is written down before the run, in ``claim.yaml``."""

    id: str
    """Short name on the command line: "c2"."""
    title: str
    statement: str
    """The claim in one sentence."""
    source: str
    """Who claims it, with arXiv numbers."""
    literature: str
    """What published experiments found."""
    expected: str
    """What we expect, and why."""
    method: str
    """Task, arms, measurements, and what all arms share."""
    pass_mark: str
    """When the claim holds, holds in part, or does not; ``summarise`` applies it."""
    limits: str
    """What an experiment of this size can show."""
    hardware: dict[str, str]
    """Scale ("cpu", "gpu") -> the hardware it is sized for."""
    minutes: dict[str, float] = field(default_factory=dict)
    """Scale -> wall-clock minutes on that hardware; absent if never timed."""

    @classmethod
    def read(cls, module: str, constants: Mapping[str, Any]) -> Claim:
        """Read ``claim.yaml`` beside the file of ``module``; ``{NAME}`` inserts a constant."""
        text = Path(module).with_name("claim.yaml").read_text(encoding="utf-8")
        values: dict[str, Any] = yaml.safe_load(text)
        for key, value in values.items():
            values[key] = value.format_map(constants) if isinstance(value, str) else value
        return cls(**values)

    @property
    def scales(self) -> tuple[str, ...]:
        """Scales that can be run and recorded."""
        return tuple(self.hardware)


@dataclass(frozen=True)
class Cell:
    """One run: an arm of the experiment with one seed."""

    arm: str
    """What is compared; may hold a learning rate or another coordinate: "dense-lr0.001"."""
    seed: int
    """Seed of weights, data order and depths; arms are compared at equal seeds."""
    settings: dict[str, Any]
    """Everything else the run depends on, JSON-ready; a record is valid for these alone."""

    @property
    def name(self) -> str:
        """Unique within a scale; the name of the record's file."""
        return f"{self.arm}-seed{self.seed}"


def sweep(arms: Mapping[str, dict[str, Any]], seeds: Iterable[int] = range(3)) -> list[Cell]:
    """Cross arms, given as name -> settings, with seeds: all seeds of an arm together."""
    return [Cell(arm, seed, settings) for arm, settings in arms.items() for seed in seeds]


@dataclass(frozen=True)
class Place:
    """Where a cell may write."""

    shared: Path
    """Kept between cells and claims: prepared text."""
    own: Path
    """Of this cell alone, kept until it is finished: checkpoints."""


@dataclass(frozen=True)
class Record:
    """A finished cell."""

    claim: str
    scale: str
    arm: str
    seed: int
    settings: dict[str, Any]
    figures: dict[str, Any]
    """Measurements; None where a number was not finite."""
    seconds: float
    """Wall clock of the cell."""
    machine: str
    versions: str
    """Versions of Python and PyTorch."""
    commit: str
    """Commit of the source; "" outside of a repository."""


@dataclass(frozen=True)
class Summary:
    """What all cells of a scale say together."""

    verdict: str
    """As :func:`verdict` returns it."""
    sentence: str
    """The finding in one sentence, with its numbers."""
    key: str
    """The numbers that decided, short enough for a table cell."""
    head: Sequence[str]
    """Headings of the table."""
    rows: Sequence[Sequence[str]]
    """Rows of the table, with the spread over seeds."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the plot shows."""


class Experiment(Protocol):
    """What the package of a claim exports."""

    CLAIM: Claim

    def cells(self, scale: str) -> list[Cell]:
        """Return all runs of a scale; "quick" gives one or two of a few seconds."""

    def run_cell(self, cell: Cell, place: Place) -> dict[str, Any]:
        """Run one cell: JSON-ready figures, a function of the cell alone.

        Devices, dtypes and sizes come from ``cell.settings``. An interrupted cell may resume from
        ``place.own``.
        """

    def summarise(self, records: Sequence[Record]) -> Summary:
        """Apply the pass mark to all records of a scale."""

    def plot(self, summary: Summary, path: Path) -> None:
        """Draw ``summary.data`` into ``path``."""
