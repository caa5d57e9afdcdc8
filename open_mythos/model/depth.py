"""Depth of a forward call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from open_mythos.checks import MAX_LOOPS, check_count, plain, whole
from open_mythos.errors import ConfigError
from open_mythos.model.exit_rules import ExitRule, FixedDepth


@dataclass(frozen=True)
class Depth:
    """Number of loops, early exit and gradient window of a call.

    Raises:
        ConfigError: A number of loops is zero, negative or not an integer.
    """

    n_loops: int | Sequence[int] | Tensor | None = None
    """Loops for all rows, or per row; None means ``max_loop_iters``. Stored as an integer, a tuple
    of integers, or None."""
    exit_rule: ExitRule | None = None
    """Early exit before ``n_loops``; the call then runs without autograd. A fixed depth is the
    default of ``n_loops``."""
    grad_loops: int | None = None
    """Truncated backpropagation: number of final loops of each row that carry gradient; None means
    all."""
    min_loops: int = 0
    """Minimum number of loops, run with an empty batch if necessary, so that collectives inside
    the loop match across ranks."""

    def __post_init__(self) -> None:
        fixed = self.exit_rule.loops if isinstance(self.exit_rule, FixedDepth) else None
        if self.n_loops is None and isinstance(fixed, int):
            object.__setattr__(self, "n_loops", fixed)
        given: Any = (
            self.n_loops.tolist() if isinstance(self.n_loops, Tensor) else plain(self.n_loops)
        )
        several = isinstance(given, Sequence) and not isinstance(given, str | bytes)
        loops = [whole(each) or 0 for each in (given if several else [given])]
        if given is not None:
            if min(loops, default=0) < 1 or max(loops) > MAX_LOOPS:
                allowed = (
                    f"integers in 1 .. {MAX_LOOPS:,}, one for all rows or one per row, or None"
                )
                self._reject(f"{allowed} for max_loop_iters")
            object.__setattr__(self, "n_loops", tuple(loops) if several else loops[0])
        if self.grad_loops is not None:
            check_count("grad_loops", self.grad_loops)
            if self.exit_rule is not None:
                raise ConfigError(
                    "a call with an exit rule has no gradients", where="grad_loops",
                    value=self.grad_loops, allowed="None with an exit_rule",
                    fix="leave out one of them",
                )  # fmt: skip
        check_count("min_loops", self.min_loops, least=0)
        if self.exit_rule is not None and not callable(self.exit_rule):
            raise ConfigError(
                "not an exit rule", where="exit_rule", value=self.exit_rule,
                allowed="a rule, such as exit_rule(\"kl\", model), or None",
                fix="make one with open_mythos.exit_rule",
            )  # fmt: skip

    def of_rows(self, batch: int, trained: int) -> list[int]:
        """Return the loops of each of ``batch`` rows; ``trained`` by default."""
        if self.n_loops is None:
            return [trained] * batch
        if isinstance(self.n_loops, int):
            return [self.n_loops] * batch
        self.check_rows(batch)
        return [int(loops) for loops in self.n_loops]

    def most(self, trained: int) -> int:
        """Return the most loops of any row; ``trained`` by default."""
        loops = self.n_loops
        return trained if loops is None else loops if isinstance(loops, int) else max(loops)

    def check_rows(self, batch: int) -> None:
        """Check that ``n_loops`` is an integer or has one entry per row.

        Raises:
            ConfigError: It has another number of entries.
        """
        if isinstance(self.n_loops, tuple) and len(self.n_loops) != batch:
            self._reject(f"an integer >= 1, or {batch} of them (one per row)")

    def _reject(self, allowed: str) -> None:
        raise ConfigError(
            "not a number of loops", where="n_loops", value=self.n_loops, allowed=allowed,
            fix="pass n_loops=1 for the shallowest model",
        )  # fmt: skip
