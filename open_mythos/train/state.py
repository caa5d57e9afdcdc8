"""What the trainer takes in and keeps: batches and their loader, progress, the result of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.model.trace import LoopTrace
from open_mythos.train.monitoring.metrics import LoopFigures, Metrics, depth_metrics


class TokenBatch(Protocol):
    """What the trainer reads of a batch; :class:`open_mythos.data.Batch` is one."""

    @property
    def input_ids(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def document_ids(self) -> Tensor | None: ...
    @property
    def sample_index(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def split(self, n: int) -> Sequence[TokenBatch]: ...
    def to(self, device: torch.device) -> TokenBatch: ...


class BatchLoader(Protocol):
    """Where batches come from; :class:`open_mythos.data.Loader` is one."""

    step: int
    """Position: the trainer sets it to the steps done."""

    def next_batch(self, step: int) -> TokenBatch:
        """The batch of ``step``, a pure function of it."""

    def state_dict(self) -> dict[str, Any]:
        """Position and identity of the data, JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position; refuses that of other data."""


@dataclass(frozen=True)
class StepCounts:
    """A step in all processes together."""

    tokens: int
    """Targets."""
    min_depth: int
    """Fewest loops of a sequence; 0 for a dense model."""
    max_depth: int
    """Most loops of a sequence."""


@dataclass
class TrainState:
    """How far a run has come: what resuming needs beside weights, moments and configuration."""

    step: int = 0
    """Optimizer steps done, skipped ones included; the number of the next step."""
    tokens: int = 0
    """Targets learnt from."""
    skips: int = 0
    """Non-finite steps in a row up to now."""
    min_depth: int = 0
    """Fewest loops that any sequence ran; 0 before the first step, and for a dense model."""
    max_depth: int = 0
    """Most loops that any sequence ran."""
    rewinds: int = 0
    """How often the run went back to a checkpoint because something was wrong."""
    left_out: int = 0
    """Batches that rewinds have left out: the data is so much further than the steps."""

    @property
    def data_step(self) -> int:
        """Number of the next batch."""
        return self.step + self.left_out

    def advance(self, result: StepResult) -> None:
        """Count a step."""
        self.step += 1
        if result.skipped:
            self.skips += not result.rescaled
            return
        self.skips, self.tokens = 0, self.tokens + result.counts.tokens
        low, high = result.counts.min_depth, result.counts.max_depth
        self.min_depth = min(low, self.min_depth) if self.min_depth else low
        self.max_depth = max(high, self.max_depth)


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Nats per target."""
    balance: float
    """Sequence-wise balance loss; 0 where it is off."""
    lr: float
    """Learning rate."""
    grad_norm: float
    """Norm of the gradient before it was clipped."""
    skipped: bool
    """Whether the weights stayed as they were, because loss or gradient was not finite."""
    rescaled: bool
    """Whether it was float16 that overflowed, and the loss scale has given way."""
    counts: StepCounts
    """Of all processes."""
    length: int
    """Tokens T of its sequences."""
    depths: Tensor | None
    """(B,) loops of each sequence; None for a dense model."""
    trace: LoopTrace
    """State norms and expert loads over all micro-batches."""

    @cached_property
    def figures(self) -> LoopFigures:
        """What the loops did; reading it waits for the device, once."""
        return LoopFigures.of(self.trace)

    def metrics(self, detail: bool = False) -> Metrics:
        """The numbers to log; ``detail`` adds the share of every expert at every loop."""
        metrics: Metrics = {
            "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm,
            "skipped": int(self.skipped),
        }  # fmt: skip
        if self.balance:
            metrics["balance_loss"] = self.balance
        if self.depths is not None:
            metrics |= depth_metrics(self.depths) | self.figures.metrics(detail)
        return metrics
