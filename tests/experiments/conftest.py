"""A claim that takes no time, records made up at will, and text that is prepared once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import table
from experiments.claim import HOLDS, Cell, Claim, Place, Record, Summary

WORDS = {
    "title": "a toy", "statement": "numbers double", "source": "nobody", "literature": "nothing",
    "expected": "doubling", "method": "multiplying", "pass_mark": "all doubled", "limits": "none",
}  # fmt: skip


class Toy(SimpleNamespace):
    """An experiment whose cells double a number; ``misbehave`` may raise instead."""

    def __init__(self) -> None:
        super().__init__(ran=[], factor=2, misbehave=lambda cell: None)
        self.CLAIM = Claim(id="toy", hardware={"cpu": "anything"}, minutes={"cpu": 0.1}, **WORDS)

    def cells(self, scale: str) -> list[Cell]:
        return [Cell("double", seed, {"factor": self.factor}) for seed in range(3)]

    def run_cell(self, cell: Cell, place: Place) -> dict[str, Any]:
        place.own.mkdir(parents=True)
        self.ran.append(cell.seed)
        self.misbehave(cell)
        return {"doubled": cell.settings["factor"] * cell.seed, "infinite": float("inf")}

    def summarise(self, records: Sequence[Record]) -> Summary:
        doubled = [str(record.figures["doubled"]) for record in records]
        return Summary(
            HOLDS, "They did.", "0|2|4", ("seed", "doubled"), [("all", " ".join(doubled))]
        )

    def plot(self, summary: Summary, path: Path) -> None:
        path.write_bytes(b"a picture")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """The toy, as the claim "toy" of the table."""
    experiment = Toy()
    monkeypatch.setitem(table.CLAIMS, "toy", "toy")
    monkeypatch.setitem(sys.modules, "experiments.toy", experiment)
    return experiment


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where quick cells run; the text is prepared by the first that needs it."""
    folder = tmp_path_factory.mktemp("experiments")
    return Place(folder, folder / "models", folder / "own")


Recorder = Callable[..., Record]


@pytest.fixture
def recorded() -> Recorder:
    """``recorded(cell, **figures)``: the record of a cell that nobody ran."""

    def record(cell: Cell, **figures: Any) -> Record:
        return Record(
            "made-up", "cpu", cell.arm, cell.seed, cell.settings, figures, 1.0, "paper", "ink", ""
        )

    return record
