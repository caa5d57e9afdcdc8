"""Results of the demo, from which it is printed, plotted and reported."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Curve:
    """One training run."""

    label: str
    parameters: int
    training_flops: float
    """Training FLOPs per token at the mean depth."""
    steps: list[int]
    """Optimizer steps at which the loss was logged."""
    loss: list[float]
    """Training loss at these steps, nats per target."""
    seconds: float


@dataclass(frozen=True)
class ChainResults:
    """Chains of relations, longer than in training."""

    hops: list[int]
    """Evaluated chain lengths."""
    entities: int
    """Entities of the chains; chance is 1 / entities."""
    loops: list[int]
    """Evaluated numbers of loops."""
    chosen_loops: int
    """Loops reported in the summary, chosen before the run."""
    trained_hops: int
    """Longest chain in training."""
    accuracy: list[list[float]]
    """(hops, loops) accuracy of the looped model on held-out chains."""
    dense_accuracy: list[float]
    """(hops,) accuracy of the dense model."""
    exit_rule: str
    """Early-exit rule that was also evaluated."""
    exit_loops: list[float]
    """(hops,) mean loops under the exit rule."""
    exit_accuracy: list[float]
    """(hops,) accuracy under the exit rule."""
    looped: Curve
    dense: Curve

    def accuracy_at(self, loops: int) -> list[float]:
        """Return the accuracy (hops,) of the looped model at ``loops``."""
        column = self.loops.index(loops)
        return [row[column] for row in self.accuracy]

    @property
    def asked_hops(self) -> int:
        """Return twice the longest chain in training, which the summary reports."""
        return 2 * self.trained_hops


@dataclass(frozen=True)
class SudokuResults:
    """6 x 6 Sudokus by difficulty."""

    levels: list[str]
    """Difficulty: rounds of elimination that a solver needs, or "guess"."""
    asked: list[int]
    """(levels,) puzzles."""
    loops: list[int]
    """Evaluated numbers of loops."""
    trained_loops: int
    """Loops of most training rows."""
    solved: list[list[float]]
    """(levels, loops) share of puzzles that the looped model solves in every cell."""
    dense_solved: list[float]
    """(levels,) share that the dense model solves."""
    shape: tuple[int, int]
    """Rows and columns of a box."""
    clues: list[int]
    """Cells of one puzzle that needs a guess, 0 if empty."""
    solution: list[int]
    boards: dict[int, list[int]]
    """Loops -> what the looped model fills in."""
    looped: Curve
    dense: Curve


@dataclass(frozen=True)
class TextResults:
    """Language models of source text."""

    depths: list[int]
    """Evaluated numbers of loops."""
    looped_bits: list[float]
    """(depths,) validation bits per byte of the looped model."""
    dense_bits: float
    """Of the dense model with equal parameters."""
    flops_bits: float
    """Of the dense model with equal training FLOPs."""
    trained_depth: int
    """Loops in training."""
    rho: float
    """Spectral radius of A after training."""
    looped: Curve
    dense: Curve
    flops: Curve
    """The dense model with equal training FLOPs."""
    samples: dict[int, str]
    """Loops -> text generated from the prompt."""
    dense_sample: str
    prompt: str
    train_bytes: int
    val_bytes: int

    def bits_at(self, depth: int) -> float:
        """Return the bits per byte of the looped model at ``depth``."""
        return self.looped_bits[self.depths.index(depth)]


@dataclass(frozen=True)
class DemoResults:
    """All results of the demo."""

    chains: ChainResults
    sudoku: SudokuResults
    text: TextResults
    seed: int
    machine: str
    versions: str
    seconds: float
    """Of the whole demo."""

    @classmethod
    def load(cls, path: Path) -> DemoResults:
        """Read results written by :meth:`save`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        parts = {"chains": ChainResults, "sudoku": SudokuResults, "text": TextResults}
        for name, kind in parts.items():
            values[name] = kind(**{key: _loaded(key, each) for key, each in values[name].items()})
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the results as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def _loaded(name: str, value: Any) -> Any:
    """Return a field as it was before JSON."""
    if name in ("looped", "dense", "flops"):
        return Curve(**value)
    if name in ("samples", "boards"):
        return {int(loops): each for loops, each in value.items()}
    return tuple(value) if name == "shape" else value
