"""Batches of a synthetic task for the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

from open_mythos.checks import check_count
from open_mythos.data import Batch
from open_mythos.errors import DataError


class Task(Protocol):
    """A synthetic task: a dataclass that draws batches."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def batch(self) -> Callable[..., Batch]:
        """``batch(step, global_batch=B, ...)`` draws the rows of ``step``, a pure function."""


class TaskLoader:
    """Draw fresh rows of a task at every step (a ``BatchLoader`` of the trainer).

    ``asked`` are further arguments of its ``batch``, such as ``hops``.
    """

    def __init__(self, task: Task, *, global_batch: int, **asked: Any) -> None:
        self.step = 0
        self._task, self._global_batch, self._asked = task, global_batch, asked

    def next_batch(self, step: int) -> Batch:
        """Draw the rows of ``step``."""
        return self._task.batch(step, global_batch=self._global_batch, **self._asked)

    def state_dict(self) -> dict[str, Any]:
        """Return position and identity, JSON-ready."""
        return {"step": self.step, "task": asdict(self._task), **self._asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position; raise DataError if the task or its settings differ."""
        own = self.state_dict()
        if {**state, "step": 0} != {**own, "step": 0}:
            raise DataError(
                "the position belongs to other rows", where=type(self).__name__, value=state,
                allowed=str(own), fix="build the loader with the same task and settings",
            )  # fmt: skip
        self.step = state["step"]


class ChainLoader(TaskLoader):
    """Draw fresh chains at every step, and rows of several from step ``pair_from`` on.

    Single chains come first because they are learned faster. The later chains of a row stand at
    positions, and after tokens, that a single chain never has: without them attention fails on
    chains longer than in training.
    """

    def __init__(
        self, task: Task, *, global_batch: int, pair_from: int | None = None, chains: int = 2,
        **asked: Any,
    ) -> None:  # fmt: skip
        super().__init__(task, global_batch=global_batch, **asked)
        self._pair_from, self._chains = pair_from, check_count("chains", chains)

    def next_batch(self, step: int) -> Batch:
        """Draw the rows of ``step``."""
        several = self._pair_from is not None and step >= self._pair_from
        return self._task.batch(
            step, global_batch=self._global_batch, chains=self._chains if several else 1,
            **self._asked,
        )  # fmt: skip

    def drawn(self, steps: int) -> int:
        """Return the number of chains in the batches of the first ``steps`` steps."""
        several = 0 if self._pair_from is None else max(0, steps - self._pair_from)
        return self._global_batch * (steps + (self._chains - 1) * several)

    def state_dict(self) -> dict[str, Any]:
        """Return position and identity, JSON-ready."""
        own = {"pair_from": self._pair_from, "chains": self._chains}
        return super().state_dict() | own
