"""What a claim consists of: words, cells to run, records of what came, a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

HOLDS = "holds"
HOLDS_IN_PART = "holds in part"
DOES_NOT_HOLD = "does not hold here"
UNCLEAR = "unclear"
QUICK = "quick"
"""The scale of a shortened form that only shows that everything works; never recorded."""


def unclear(what_would_settle_it: str) -> str:
    """The verdict of results that allow none."""
    return f"{UNCLEAR}: {what_would_settle_it}"


@dataclass(frozen=True)
class Claim:
    """A claim in words; all of it is written down before the run."""

    id: str
    """Short name, as on the command line: "c2"."""
    title: str
    """A few words."""
    statement: str
    """What is claimed, as one sentence."""
    source: str
    """Who claims it, with arXiv numbers."""
    literature: str
    """What published experiments found."""
    expected: str
    """What we expect, and why."""
    method: str
    """Task, arms, what is measured, and what all arms have in common."""
    pass_mark: str
    """When the claim holds, holds in part, or does not; the experiment's code decides by it."""
    limits: str
    """What an experiment of this size can show and what it cannot."""
    hardware: dict[str, str]
    """Scale ("cpu", "gpu") -> what it is sized for."""
    minutes: dict[str, float] = field(default_factory=dict)
    """Scale -> minutes it takes on that hardware; absent where it was never timed."""

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
    """Of weights, data order and depths; arms are compared at equal seeds."""
    settings: dict[str, Any]
    """All else the run depends on, JSON-ready; a finished cell counts only while they are equal."""

    @property
    def name(self) -> str:
        """Unique within a scale; the name of its file."""
        return f"{self.arm}-seed{self.seed}"


@dataclass(frozen=True)
class Place:
    """Where a cell may write."""

    shared: Path
    """Kept between cells and claims: prepared text."""
    own: Path
    """This cell's alone, kept until it is finished: checkpoints."""


@dataclass(frozen=True)
class Record:
    """A finished cell."""

    claim: str
    """Its claim's id."""
    scale: str
    """Its scale."""
    arm: str
    """Of the cell."""
    seed: int
    """Of the cell."""
    settings: dict[str, Any]
    """Of the cell."""
    figures: dict[str, Any]
    """What came; None where a number was not finite."""
    seconds: float
    """Wall clock of the cell."""
    machine: str
    """What it ran on."""
    versions: str
    """Of Python and PyTorch."""
    commit: str
    """Of the source; "" outside of a repository."""


@dataclass(frozen=True)
class Summary:
    """What all cells of a scale say together."""

    verdict: str
    """HOLDS, HOLDS_IN_PART, DOES_NOT_HOLD, or what :func:`unclear` gives."""
    sentence: str
    """The finding in one sentence, with its figures."""
    key: str
    """The figures that decided, as short as a table cell."""
    head: Sequence[str]
    """Headings of the table."""
    rows: Sequence[Sequence[str]]
    """Its rows; spread over seeds included."""
    data: dict[str, Any] = field(default_factory=dict)
    """What the plot shows."""


class Experiment(Protocol):
    """What the module of a claim offers (a module serves as well as an object)."""

    CLAIM: Claim

    def cells(self, scale: str) -> list[Cell]:
        """All runs of a scale; "quick" gives one or two of a few seconds."""

    def run_cell(self, cell: Cell, place: Place) -> dict[str, Any]:
        """Run one cell: a function of the cell alone, JSON-ready.

        Devices, dtypes and sizes come from ``cell.settings``. What was interrupted may go on from
        ``place.own``.
        """

    def summarise(self, records: Sequence[Record]) -> Summary:
        """The verdict on all cells of a scale, by the claim's pass mark."""

    def plot(self, summary: Summary, path: Path) -> None:
        """Draw ``summary.data`` into ``path``."""
