"""Recorded depths, replayed in the engine."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import GateError
from benchmarks.static_batch import Job
from benchmarks.stopwatch import Stopwatch
from open_mythos.inference.engine import Engine
from open_mythos.inference.request import Request, Token
from open_mythos.inference.slot_rules import SlotRules
from open_mythos.model.exit_rules import Look
from open_mythos.model.mythos import OpenMythos


class RecordedDepths(SlotRules):
    """Stops every row at the recorded depth of its token.

    A request's random key, which greedy choice does not use, is its index in ``jobs``; the number
    of its draws is the index of the token.
    """

    def __init__(self, engine: Engine, jobs: Sequence[Job]) -> None:
        model, self._slots = engine.model, engine.runner.slots
        device = self._slots.key.device
        super().__init__(model, engine.slots + 1, model.cfg.dim, device)
        longest = max(len(job.depths) for job in jobs)
        rows = [[*job.depths, *[1] * (longest - len(job.depths))] for job in jobs]
        self._depth_JT = torch.tensor(rows, device=device)

    def stops(
        self, kinds: Collection[str], slots_R: Tensor, rule_R: Tensor, numbers_R2: Tensor,
        look: Look,
    ) -> Tensor:  # fmt: skip
        """Return (R,) true where a row has run the loops of its token."""
        key_R, draw_R = self._slots.key[slots_R], self._slots.draw[slots_R]
        assert isinstance(look.t, Tensor)
        return look.t[:, 0] + 1 >= self._depth_JT[key_R, draw_R]

    def of(self, request: Request) -> None:
        """Prompts run all loops."""


class EngineForm:
    """The engine on jobs whose depths are given.

    Args:
        model: The model.
        jobs: The requests; the first token's depth is ``n_loops``, that of the prompt.
        n_loops: All loops.
        slots: Rows at a time.
        options: Further arguments of the engine.
    """

    def __init__(
        self, model: OpenMythos, jobs: Sequence[Job], n_loops: int, slots: int, **options: Any
    ) -> None:
        self._jobs, self._n_loops, self.runs = jobs, n_loops, 0
        context = max(len(job.prompt) + len(job.depths) for job in jobs)
        self.engine = Engine(
            model, slots=slots, context=context, max_loops=n_loops, ticks_per_chunk=1,
            max_queued=len(jobs), **options,
        )  # fmt: skip
        self.engine.runner.rules = RecordedDepths(self.engine, jobs)
        self.prompts = Stopwatch()
        self.engine.runner.prefill = self.prompts.around(self.engine.runner.prefill)  # type: ignore[method-assign]

    def run(self) -> list[list[int]]:
        """Return the tokens of every job.

        Raises:
            GateError: A token ran other loops than recorded.
        """
        self.runs += 1
        for i, job in enumerate(self._jobs):
            self.engine.add(
                Request(
                    str(i), job.prompt, len(job.depths), temperature=0.0, key=i,
                    max_loops=self._n_loops, rule="change", numbers=(1.0,),
                )
            )  # fmt: skip
        found: list[list[int]] = [[] for _ in self._jobs]
        while self.engine.busy:
            for event in self.engine.step():
                if isinstance(event, Token):
                    tokens, depths = found[int(event.id)], self._jobs[int(event.id)].depths
                    if event.loops != depths[len(tokens)]:
                        raise GateError(f"a token ran {event.loops} loops, not as recorded")
                    tokens.append(event.token)
        return found
