"""What the trainer takes in and keeps: batches and their loader, progress, the result of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.trace import LoopTrace
from open_mythos.train.metrics import Metrics, loop_metrics


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

    def advance(self, tokens: int, depths: Tensor | None, skipped: bool) -> None:
        """Count a step."""
        self.step, self.skips = self.step + 1, self.skips + 1 if skipped else 0
        if skipped:
            return
        self.tokens += tokens
        if depths is not None:
            low, high = int(depths.min()), int(depths.max())
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
    tokens: int
    """Targets in the batch."""
    depths: Tensor | None
    """(B,) loops of each sequence; None for a dense model."""
    trace: LoopTrace
    """State norms and expert loads over all micro-batches."""

    def metrics(self) -> Metrics:
        """The numbers to log."""
        metrics: Metrics = {
            "loss": self.loss, "lr": self.lr, "grad_norm": self.grad_norm,
            "skipped": int(self.skipped),
        }  # fmt: skip
        if self.balance:
            metrics["balance_loss"] = self.balance
        if self.depths is not None:
            metrics |= {"mean_depth": self.depths.double().mean().item()} | loop_metrics(self.trace)
        return metrics
