"""How many loops a forward call runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from open_mythos.checks import check_count, whole
from open_mythos.errors import ConfigError
from open_mythos.model.exit_rules import ExitRule


@dataclass(frozen=True)
class Depth:
    """How many loops a call runs, what may end them early, and which of them carry gradient.

    Raises:
        ConfigError: A number of loops is zero, negative or not an integer.
    """

    n_loops: int | Sequence[int] | Tensor | None = None
    """Loops for all rows, or one number per row; None means the trained depth,
    ``max_loop_iters``. Stored as an integer, a tuple of integers, or None."""
    exit_rule: ExitRule | None = None
    """Stops positions before ``n_loops`` is reached; the call then runs without autograd."""
    grad_loops: int | None = None
    """Truncated backpropagation: only the last ``grad_loops`` loops of each row carry gradient.
    None means all of them."""
    min_loops: int = 0
    """Loops that the call runs at least, with an empty batch if necessary, so that collectives
    inside the loop match across ranks."""

    def __post_init__(self) -> None:
        given: Any = self.n_loops.tolist() if isinstance(self.n_loops, Tensor) else self.n_loops
        several = isinstance(given, Sequence) and not isinstance(given, str)
        loops = [whole(each) or 0 for each in (given if several else [given])]
        if given is not None:
            if min(loops, default=0) < 1:
                self._reject("an integer >= 1, one of them per row, or None for max_loop_iters")
            object.__setattr__(self, "n_loops", tuple(loops) if several else loops[0])
        if self.grad_loops is not None:
            check_count("grad_loops", self.grad_loops)
        check_count("min_loops", self.min_loops, least=0)

    def of_rows(self, batch: int, trained: int) -> list[int]:
        """Return the loops of each of ``batch`` rows; ``trained`` where none were given."""
        if self.n_loops is None:
            return [trained] * batch
        if isinstance(self.n_loops, int):
            return [self.n_loops] * batch
        self.check_rows(batch)
        return [int(loops) for loops in self.n_loops]

    def check_rows(self, batch: int) -> None:
        """Check that the depths fit a batch.

        Raises:
            ConfigError: ``n_loops`` holds another number of depths than ``batch``.
        """
        if isinstance(self.n_loops, tuple) and len(self.n_loops) != batch:
            self._reject(f"an integer >= 1, or {batch} of them (one per row)")

    def _reject(self, allowed: str) -> None:
        raise ConfigError(
            "not a number of loops", where="n_loops", value=self.n_loops, allowed=allowed,
            fix="pass n_loops=1 for the shallowest model",
        )  # fmt: skip
