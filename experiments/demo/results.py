"""Results of the demo, from which it is printed, plotted and reported."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One training run."""

    label: str
    parameters: int
    active_parameters: int
    """Parameters used per token."""
    training_flops: float
    """Training FLOPs per token at the mean depth."""
    steps: list[int]
    """Optimizer steps at which the loss was logged."""
    loss: list[float]
    """Training loss at these steps, nats per token."""
    seconds: float


@dataclass(frozen=True)
class DemoResults:
    """All results of the demo."""

    hops: list[int]
    """Evaluated chain lengths."""
    entities: int
    """Entities of the chains; chance is 1 / entities."""
    hop_loops: list[int]
    """Evaluated numbers of loops on chains."""
    chosen_loops: int
    """Loops reported in the summary, chosen before the run."""
    trained_hops: int
    """Longest chain in training."""
    hop_accuracy: list[list[float]]
    """(hops, loops) accuracy of the looped model on held-out chains."""
    hop_dense: list[float]
    """(hops,) accuracy of the dense model."""
    exit_rule: str
    """Early-exit rule that was also evaluated."""
    exit_loops: list[float]
    """(hops,) mean loops under the exit rule."""
    exit_accuracy: list[float]
    """(hops,) accuracy under the exit rule."""
    hop_looped_run: Curve
    hop_dense_run: Curve
    looped: Curve
    dense: Curve
    depths: list[int]
    """Evaluated numbers of loops on text."""
    looped_bits: list[float]
    """(depths,) validation bits per byte of the looped model."""
    dense_bits: float
    mean_depth: int
    """Mean loops in training."""
    max_depth: int
    """Maximum loops in training."""
    rho: float
    """Spectral radius of A after training."""
    state_norm: list[float]
    """Mean norm of the state after each loop."""
    state_change: list[float]
    """Mean norm of the change made by each loop."""
    expert_load: list[list[float]]
    """(loops, experts) share of routed choices."""
    expert_overlap: list[list[float]]
    """(loops, loops) share of a token's experts common to two loops."""
    samples: dict[int, str]
    """Loops -> text generated from the prompt."""
    dense_sample: str
    prompt: str
    train_bytes: int
    val_bytes: int
    seed: int
    machine: str
    versions: str

    def hop_accuracy_at(self, loops: int) -> list[float]:
        """Return the accuracy (hops,) of the looped model at ``loops``."""
        column = self.hop_loops.index(loops)
        return [row[column] for row in self.hop_accuracy]

    @property
    def asked_hops(self) -> int:
        """Return twice the longest chain in training, which the summary reports."""
        return 2 * self.trained_hops

    @property
    def best_depth(self) -> int:
        """Return the number of loops with the fewest bits per byte."""
        return self.depths[self.looped_bits.index(min(self.looped_bits))]

    @classmethod
    def load(cls, path: Path) -> DemoResults:
        """Read results written by :meth:`save`."""
        values = json.loads(path.read_text(encoding="utf-8"))
        for name in ("looped", "dense", "hop_looped_run", "hop_dense_run"):
            values[name] = Curve(**values[name])
        values["samples"] = {int(depth): text for depth, text in values["samples"].items()}
        return cls(**values)

    def save(self, path: Path) -> None:
        """Write the results as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
