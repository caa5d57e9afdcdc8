"""Batches of a synthetic task for the trainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, Protocol

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
