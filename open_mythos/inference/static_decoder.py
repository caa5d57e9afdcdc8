"""Static-shape decoding: one step, captured or compiled once and replayed for every token.

The reference, :func:`open_mythos.model.generation.generate`, attends to one more column per token,
so Python dispatches every operation of every loop again. Here the rows of a batch are slots of a
:class:`~open_mythos.inference.runner.Runner` that move in step: position, loop and draw number are
device tensors, and no shape depends on the number of tokens. The tokens equal those of the
reference.

**Pieces.** A step is *enter* (embedding and prelude), *loop*, once per loop, and *leave* (coda,
head, sampling). The loop index is a tensor too, so that one graph serves all loops.

**Buckets.** A graph reads a fixed number of pages: 1, 2, 3, 4, 6, 8, 12, ..., at most half more
than are in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from open_mythos.checks import check_count, checked, pick
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.batch import Batch, Choice, Needs, few_sizes, runs
from open_mythos.inference.cuda_graphs import Graphs, capture_problem
from open_mythos.inference.levels import layout_of
from open_mythos.inference.offline import requests_of
from open_mythos.inference.pages import PAGE
from open_mythos.inference.runner import Runner
from open_mythos.inference.slots import FREE, WAITING
from open_mythos.model.cache import KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import SamplingParams

MODES = ("static", "graph", "compile")
"""How a step runs: eagerly, as CUDA graphs, or compiled (and captured on CUDA)."""


class StaticDecoder:
    """Static-shape decoder for a batch of rows.

    :meth:`start` reads the prompts and chooses the first token, every :meth:`step` the next one.
    Cache, buffers and graphs are kept for later calls of :meth:`start`, unless one is deeper than
    all before. Weights may change in place, but must not be moved, replaced or cast. The model must
    be in evaluation mode. With an exit rule, a row that has stopped keeps its state while the
    deepest row runs.

    Args:
        model: Any :class:`CausalLM`; rows of a looped one may differ in depth.
        batch: Number of rows.
        capacity: Maximum positions of a row, prompt and new tokens together.
        mode: "static" (eager, the reference of the others), "graph" (CUDA graphs) or "compile"
            (``torch.compile``, and CUDA graphs on CUDA).
        page: Positions of a page, a power of two: the least that a step reads.

    Raises:
        ConfigError: Unknown mode, sizes out of range, or an unsupported model or exit rule.
        EnvironmentError_: "graph" for a model that is not on a CUDA device.
    """

    running_B: Tensor
    """(B,) boolean: rows that have not ended. Set one to false in place to end the row."""
    finite_B: Tensor
    """(B,) boolean: rows whose logits were all finite until they ended."""

    @checked
    def __init__(
        self, model: CausalLM, batch: int, capacity: int, *, mode: str = "static", page: int = PAGE
    ) -> None:
        device = model.final_norm.weight.device
        pick(MODES, mode, "mode", what="decoding mode", fix='"static" runs everywhere')
        if mode == "graph" and device.type != "cuda":
            raise EnvironmentError_(
                "CUDA graphs need a CUDA device", where="mode", value=f"graph, on {device}",
                allowed="static, or a model on a CUDA device",
                fix='move the model to a CUDA device, or use "static" or "compile"',
            )  # fmt: skip
        captured = device.type == "cuda" and mode != "static"
        if captured and (problem := capture_problem(model)) is not None:
            reject(f"{mode} decoding does not support this model", problem)
        self.batch = check_count("batch", batch)
        self.capacity = check_count("capacity", capacity)
        self.model, self.mode = model, mode
        self._layout = layout_of(model, page)
        self._graphs = Graphs(device) if captured else None
        self._runner: Runner | None = None
        self._pieces: dict[str, Callable[[Batch], Any]] = {}
        self._most = self._held = self._end = 0
        self._needs = Needs.of(())
        self._lengths = [0] * batch
        self.running_B = torch.ones(batch, dtype=torch.bool, device=device)
        self.finite_B = torch.ones_like(self.running_B)
        self._token_B = torch.zeros(batch, dtype=torch.long, device=device)
        self._rows_B = torch.arange(batch, device=device)

    def start(
        self,
        input_ids: Tensor,
        params: SamplingParams,
        depth: Depth,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Reset, read the prompts and choose the first token of every row.

        Args:
            input_ids: (B, T) prompts, left-padded if ragged.
            params: Sampling parameters; ``stop`` is left to the caller (see ``running_B``).
            depth: Loops of a looped model, for all rows or per row, and an exit rule.
            attention_mask: (B, T), false on padding.

        Returns:
            (B,) tokens, in a buffer that the next step overwrites.

        Raises:
            ConfigError: The prompts do not fit the decoder, the exit rule uses predictions,
                autocast is on, or the model is in training mode.
        """
        self._check_start(input_ids)
        n_prompt = input_ids.shape[1]
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        real_B = mask_BT.sum(1).tolist()
        prompts = [row[n_prompt - n :] for row, n in zip(input_ids.tolist(), real_B, strict=True)]
        whole = replace(params, max_new_tokens=self.capacity, stop=())
        loops = self.model.cfg.max_loop_iters if hasattr(self.model, "recurrent") else 0
        requests = requests_of(prompts, whole, depth, loops)
        self._most = max(request.max_loops for request in requests)
        runner = self._runner_of(self._most)
        with torch.no_grad():
            cache = KVCache(n_prompt, self.model.cfg.kv_share == "last")
            ctx = self.model.context(input_ids, cache, attention_mask=attention_mask)
            trace = None if depth.exit_rule is None else LoopTrace()
            hidden_BTD = self.model.hidden(input_ids, ctx, depth, trace)
            for row, request in enumerate(requests):
                runner.place_request(row, request)
                runner.cache.store(
                    row, cache, 0, len(request.prompt), self._most, row, n_prompt - real_B[row]
                )
            self._held, self._needs = max(real_B), Needs.of(requests)
            self._end = params.filler
            self._lengths = real_B
            self.running_B.fill_(True)
            self.finite_B.fill_(True)
            runner.slots.phase[:-1] = WAITING
            if trace is not None and trace.exits is not None:
                runner.slots.t[:-1] = trace.exits[:, -1]
            batch = self._batch()
            self._finish(runner.choose(batch, self.model.head(hidden_BTD[:, -1])))
        return self._token_B

    def step(self) -> Tensor:
        """Return the next token (B,) of every row, in a buffer that the next step overwrites.

        There is no host-device sync.

        Raises:
            ConfigError: The capacity is used up, or :meth:`start` was not called.
        """
        if not 0 < self._held < self.capacity - 1:
            reject(
                "there is no next step", f"{self._held} of {self.capacity} positions used",
                "after start(), until the capacity is used up", where="StaticDecoder.step",
            )  # fmt: skip
        self._held += 1
        self._lengths = [length + 1 for length in self._lengths]
        batch = self._batch()
        with torch.no_grad():
            self._run("enter", batch)
            for _ in range(self._most):
                self._run("loop", batch)
            self._run("leave", batch)
        return self._token_B

    def _enter(self, batch: Batch) -> None:
        assert self._runner is not None
        phase = self._runner.slots.phase
        phase[:-1] = torch.where(self.running_B, phase[:-1], FREE)
        self._runner.enter_rows(batch)

    def _leave(self, batch: Batch) -> None:
        assert self._runner is not None
        self._finish(self._runner.leave_rows(batch))

    def _finish(self, choice: Choice) -> None:
        """Keep the tokens; rows that have ended are filled."""
        assert self._runner is not None
        self.finite_B.logical_and_(choice.finite_R | ~self.running_B)
        self._token_B.copy_(choice.token_R.masked_fill(~self.running_B, self._end))
        self.running_B.logical_and_(self._runner.slots.phase[:-1] == WAITING)

    def _run(self, name: str, batch: Batch) -> None:
        piece = self._pieces[name]
        if self._graphs is None:
            piece(batch)
        else:
            self._graphs.run((name, batch.n_blocks, batch.needs), lambda: piece(batch))

    def _batch(self) -> Batch:
        """Return all rows, over as many pages as they need."""
        if self._graphs is None and self.mode == "static" and self._rows_B.device.type == "cpu":
            pages = [self._layout.rows(length) for length in self._lengths]
            return Batch(self._rows_B, self._needs, groups=tuple(runs(pages)))
        return Batch(self._rows_B, self._needs, n_blocks=self._blocks(self._held))

    def _blocks(self, positions: int) -> int:
        """Return the pages that a step reads: few and wide ones where each costs a capture."""
        needed, most = self._layout.rows(positions), self._layout.rows(self.capacity)
        if self._graphs is None:
            return needed
        return min(most, few_sizes(needed))

    def _runner_of(self, most: int) -> Runner:
        """Return the runner, a new one if ``most`` loops are more than ever before."""
        if self._runner is None or self._runner.max_loops < most:
            layout, pages = self._layout, self._layout.rows(self.capacity)
            levels = layout.levels(most)
            runner = Runner(
                self.model, layout, n_slots=self.batch, n_pages=self.batch * levels * pages,
                context=self.capacity, max_loops=most, exact=False,
            )  # fmt: skip
            numbers = torch.arange(1, self.batch * levels * pages + 1)
            table_BLM = numbers.view(self.batch, levels, pages)
            for row in range(self.batch):
                runner.cache.assign(row, table_BLM[row].tolist())
            self._runner = runner
            pieces: dict[str, Callable[[Batch], Any]] = {
                "enter": self._enter, "loop": runner.loop_rows, "leave": self._leave,
            }  # fmt: skip
            if self.mode == "compile":
                pieces = {name: torch.compile(piece) for name, piece in pieces.items()}
            self._pieces = pieces
            if self._graphs is not None:
                self._graphs.clear()  # of the last runner
        return self._runner

    def _check_start(self, input_ids: Tensor) -> None:
        self.model.check_ids(input_ids)
        batch, n_prompt = input_ids.shape
        if batch != self.batch or n_prompt >= self.capacity:
            reject(
                "the prompts do not fit the decoder", f"{batch} rows of {n_prompt} tokens",
                f"{self.batch} rows of fewer than {self.capacity} tokens", where="input_ids",
            )  # fmt: skip
        device = self._token_B.device
        if not input_ids.device == self.model.final_norm.weight.device == device:
            reject(
                "decoder, model and prompts are on different devices",
                [str(x.device) for x in (self._token_B, self.model.final_norm.weight, input_ids)],
                "one device", where="input_ids",
            )  # fmt: skip
        if self.model.training:
            reject(
                "static-shape decoding needs evaluation mode", "training mode", "evaluation mode",
                where="model.training",
            )  # fmt: skip
        check_no_autocast(device)


def check_no_autocast(device: torch.device) -> None:
    """Raise a ConfigError under autocast, which the buffers do not follow."""
    if torch.is_autocast_enabled(device.type):
        reject(
            "static-shape decoding does not support autocast", "autocast is on",
            "a model converted to its dtype, such as model.to(torch.bfloat16)",
        )  # fmt: skip


def reject(
    what: str, value: object, allowed: str = "models of static shape, without host syncs",
    where: str = "mode",
) -> NoReturn:  # fmt: skip
    """Raise the ConfigError of a call that needs mode="eager"."""
    raise ConfigError(
        what, where=where, value=value, allowed=allowed,
        fix='use mode="eager", which supports every call',
    )  # fmt: skip
