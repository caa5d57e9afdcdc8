"""Batches and their loader, progress of a run, result of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from open_mythos.checks import is_int
from open_mythos.devices import HostCopy
from open_mythos.model.trace import LoopTrace


class TokenBatch(Protocol):
    """Interface of a batch; implemented by :class:`open_mythos.data.Batch`."""

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
    """Interface of a loader; implemented by :class:`open_mythos.data.Loader`."""

    step: int
    """Position: the number of batches used, set by the trainer."""

    def next_batch(self, step: int) -> TokenBatch:
        """Return the batch of ``step``, in host memory; a pure function of ``step``."""

    def state_dict(self) -> dict[str, Any]:
        """Return position and identity of the data, JSON-ready."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; raise DataError if it belongs to other data."""


@dataclass(frozen=True)
class StepCounts:
    """Targets and loops of a step over all processes."""

    tokens: int
    min_depth: int
    """Minimum loops of a sequence; 0 for a dense model."""
    max_depth: int


@dataclass
class TrainState:
    """Progress of a run, stored in its checkpoints."""

    step: int = 0
    """Optimizer steps done, including skipped ones; the number of the next step."""
    tokens: int = 0
    """Targets trained on."""
    skips: int = 0
    """Consecutive non-finite steps up to now."""
    min_depth: int = 0
    """Minimum loops of any sequence; 0 before the first step and for a dense model."""
    max_depth: int = 0
    """Maximum loops of any sequence."""
    rewinds: int = 0
    """Rollbacks to a checkpoint so far."""
    left_out: int = 0
    """Batches skipped by rollbacks; the data position is ahead of ``step`` by this many."""

    @classmethod
    def of(cls, stored: Mapping[str, Any], step: int) -> TrainState:
        """Return the progress in a checkpoint of step ``step``.

        Raises:
            ValueError: A number is unknown, negative, no integer, or of another step.
        """
        names = {each.name for each in fields(cls)}
        counts = all(is_int(value) and value >= 0 for value in stored.values())
        if not (counts and stored.keys() <= names and stored["step"] == step):
            raise ValueError(f"progress {dict(stored)} of step {step}")
        return cls(**stored)

    @property
    def data_step(self) -> int:
        """Number of the next batch."""
        return self.step + self.left_out

    def count(self, result: StepResult) -> None:
        """Add the outcome of a step; ``step`` was incremented when it was queued."""
        if result.skipped:
            self.skips += not result.rescaled
            return
        self.skips, self.tokens = 0, self.tokens + result.counts.tokens
        low, high = result.counts.min_depth, result.counts.max_depth
        self.min_depth = min(low, self.min_depth) if self.min_depth else low
        self.max_depth = max(high, self.max_depth)


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step, which the device may still be computing.

    Reading ``loss``, ``balance``, ``grad_norm``, ``skipped`` or ``rescaled`` waits for this step,
    but not for steps that were queued after it.
    """

    step: int
    """Number of the step, from 0."""
    batch: TokenBatch
    """This process's part of the batch."""
    lr: float
    counts: StepCounts
    depths: Tensor | None
    """(B,) loops of each sequence, on the host; None for a dense model."""
    trace: LoopTrace
    """State norms and expert loads over all micro-batches, on the device."""
    values: HostCopy
    """Created by :meth:`pack`."""

    @staticmethod
    def pack(*values: Tensor) -> HostCopy:
        """Start copying loss, balance, grad_norm, skipped and rescaled to the host."""
        return HostCopy(torch.stack([value.detach().float() for value in values]))

    @cached_property
    def _read(self) -> list[float]:
        return self.values.read().tolist()

    def wait(self) -> None:
        """Block until the device has done the step."""
        _ = self._read

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self._read[0]

    @property
    def balance(self) -> float:
        """Sequence-wise balance loss; 0 where it is off."""
        return self._read[1]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return self._read[2]

    @property
    def skipped(self) -> bool:
        """Whether nothing was changed, because loss or gradient was not finite."""
        return bool(self._read[3])

    @property
    def rescaled(self) -> bool:
        """Whether the step was skipped for a float16 overflow that lowered the loss scale."""
        return bool(self._read[4])
