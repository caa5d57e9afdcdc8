"""Static batches: rows that start together and are decoded token by token, to compare an engine to.

The depth of every token is given. Whatever is computed, a token's state is that after its own
depth, so all forms choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.stopwatch import Stopwatch
from open_mythos.model.active import Active
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import forward_call
from open_mythos.model.context import Context
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos

FULL, LOCKSTEP, COMPACT = "full", "lockstep", "compact"
"""Every token runs all loops; as many as the deepest of its rows; or rows leave at their depth."""


@dataclass(frozen=True)
class Job:
    """A prompt, and the loops of each token that continues it."""

    prompt: tuple[int, ...]
    depths: tuple[int, ...]
    """Loops that choose each token; those of the first are the prompt's."""


class StaticBatch:
    """Continues prompts of equal length; a row that has ended is computed until all have.

    Args:
        model: The model.
        jobs: The rows.
        n_loops: All loops.
        form: "full", "lockstep" or "compact".
        stages: Add up the time of "prelude", "loop" and "coda", if given; not in "compact".
    """

    def __init__(
        self, model: OpenMythos, jobs: Sequence[Job], n_loops: int, form: str,
        stages: Mapping[str, Stopwatch] | None = None,
    ) -> None:  # fmt: skip
        self._stages = stages or {}
        self._model, self._jobs, self._n_loops, self._form = model, jobs, n_loops, form
        self._n_tokens = max(len(job.depths) for job in jobs)
        self._cache = _KeptCache(len(jobs[0].prompt) + self._n_tokens)
        self._tokens: list[Tensor] = []

    @torch.no_grad()
    def start(self) -> None:
        """Run the prompts and choose the first token of every row."""
        ids_BT = torch.tensor([job.prompt for job in self._jobs])
        first = Depth([job.depths[0] for job in self._jobs])
        ctx = self._model.context(ids_BT, self._cache)
        hidden_BTD = self._model.hidden(ids_BT, ctx, first)
        self._tokens = [self._model.head(hidden_BTD[:, -1]).argmax(-1)]

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        """Choose the other tokens; return those of every row."""
        for i in range(1, self._n_tokens):
            depths = [job.depths[i] if i < len(job.depths) else 1 for job in self._jobs]
            self._tokens.append(self._step(self._tokens[-1].unsqueeze(1), depths))
        rows = torch.stack(self._tokens, dim=1).tolist()
        return [row[: len(job.depths)] for row, job in zip(rows, self._jobs, strict=True)]

    def _step(self, ids_B1: Tensor, depths: list[int]) -> Tensor:
        ctx = self._model.context(ids_B1, self._cache, self._cache.length)
        if self._form == COMPACT:
            hidden_B1D = self._model.hidden(ids_B1, ctx, Depth(depths))
        else:
            n_loops = self._n_loops if self._form == FULL else max(depths)
            embed, finish = (
                self._timed(name, call) for name, call in
                (("prelude", self._model.embed), ("coda", self._finish))
            )  # fmt: skip
            with forward_call(ids_B1, ctx, Depth(n_loops)):
                h_B1D = self._loops(embed(ids_B1, ctx), ctx, depths, n_loops)
                return finish(h_B1D, ctx)
        return self._model.head(hidden_B1D[:, -1]).argmax(-1)

    def _finish(self, h_B1D: Tensor, ctx: Context) -> Tensor:
        return self._model.head(self._model.final_hidden(h_B1D, ctx)[:, -1]).argmax(-1)

    def _timed(self, name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return self._stages[name].around(call) if name in self._stages else call

    def _loops(self, e_B1D: Tensor, ctx: Context, depths: list[int], n_loops: int) -> Tensor:
        """Run all rows through ``n_loops`` loops; return each row's state at its own depth."""
        recurrent = self._model.recurrent
        h_B1D, drive_B1D = recurrent.initial_state(e_B1D, ctx), recurrent.injection.drive(e_B1D)
        ctx, depth_B1 = recurrent.sharing(ctx), torch.tensor(depths).unsqueeze(1)
        step = self._timed("loop", recurrent.step)
        for t in range(n_loops):
            if t < min(depths):
                h_B1D = step(h_B1D, drive_B1D, t, ctx)
                continue
            real_B1 = depth_B1 > t
            next_B1D = recurrent.step(
                h_B1D, drive_B1D, t, replace(ctx, active=Active(real=real_B1))
            )
            h_B1D = torch.where(real_B1.unsqueeze(-1), next_B1D, h_B1D)
        return h_B1D


class _KeptCache(KVCache):
    """A cache to which rows beyond their depth write the entry of their last loop again."""

    def write(
        self, layer: int, loop: int | Tensor, entry_BTW: Tensor, active: Active | None = None
    ) -> Tensor:
        if active is not None and active.rows is None and active.real is not None:
            assert isinstance(loop, int)
            last_B1W = self._slots[layer, loop - 1][:, self.length : self.length + 1]
            entry_BTW = torch.where(active.real.unsqueeze(-1), entry_BTW, last_B1W)
        return super().write(layer, loop, entry_BTW, active)
