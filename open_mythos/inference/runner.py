"""Computes the rows of the engine's slots. It holds no policy.

A token of a slot *enters* (embedding, prelude, h_0), runs *loops*, and *leaves* (coda, head, choice
of the next token). Every call computes one batch of rows, each at its own position, loop and depth,
through the model's own ``embed``, ``RecurrentBlock.step`` and ``final_hidden``.

**Exact mode.** A row's bits do not depend on the other rows, because matmuls always have the same
number of rows (:data:`TILE`, filled up with the dummy slot), experts use matmuls of fixed size
(``Context.exact``), and attention reads a width that is the row's own (groups of equal pages).
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from open_mythos.inference.batch import (
    Batch,
    Choice,
    Chosen,
    Needs,
    Saved,
    Scored,
    read_choices,
    runs,
    scored,
)
from open_mythos.inference.levels import LevelCache, LevelRows
from open_mythos.inference.pages import Layout
from open_mythos.inference.request import RULES, Request
from open_mythos.inference.sequence import Chunk, Moved, Sequence
from open_mythos.inference.slot_rules import SlotRules
from open_mythos.inference.slots import FREE, LOOPING, WAITING, Slots
from open_mythos.model.cache import Columns, KVCache
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.context import Context, rope_tables
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import Look
from open_mythos.model.recurrent import RecurrentBlock
from open_mythos.model.trace import LoopTrace
from open_mythos.ops.sampling import log_probabilities

TILE = 16
"""Rows of a batch in exact mode, and granularity of batches in half precision on a CPU, where
every new number of rows compiles a kernel."""


class Runner:
    """Computes prompts and rows on the slots of one model.

    Args:
        model: Any :class:`CausalLM`, in evaluation mode.
        layout: Layers and page size of the cache.
        n_slots: Number of slots.
        n_pages: Pages of the cache.
        context: Most positions of a sequence.
        max_loops: Deepest request; 0 for a dense model.
        exact: See above.
        prefill_exits: Apply a request's exit rule to its prompt too, as ``generate`` does.
    """

    def __init__(
        self, model: CausalLM, layout: Layout, *, n_slots: int, n_pages: int, context: int,
        max_loops: int, exact: bool, prefill_exits: bool = True,
    ) -> None:  # fmt: skip
        cfg, weight = model.cfg, model.final_norm.weight
        self.model, self.layout, self.exact = model, layout, exact
        self.max_loops = max_loops
        self._recurrent: RecurrentBlock | None = getattr(model, "recurrent", None)
        self._prefill_exits = prefill_exits
        self._device, self._dummy = weight.device, n_slots
        dtype = torch.float32 if self._recurrent is not None else weight.dtype
        self.slots = Slots.empty(n_slots, context, cfg.dim, dtype, self._device)
        self.cache = LevelCache(
            layout, n_slots, n_pages, max_loops, context, cfg.cache_width,
            weight.dtype, self._device,
        )  # fmt: skip
        self.rules = SlotRules(model, n_slots + 1, cfg.dim, self._device)
        self._rope_rows = rope_tables(torch.arange(context, device=self._device), cfg.rotaries)
        self._prompts: dict[int, KVCache] = {}
        self._memo: dict[Any, Any] = {}
        """What all loops share, where shapes follow the rows: a captured step computes it."""
        self._bias_BV: Tensor | None = None
        self._needs: dict[int, Needs] = {}
        """Of every sequence that was placed, equal ones as the same object; by serial number."""
        self._whole_tiles = exact or (self._device.type == "cpu" and weight.dtype != torch.float32)

    def place(self, sequence: Sequence) -> None:
        """Give a sequence its slot; its prompt has still to run."""
        assert sequence.slot is not None
        self.cache.assign(sequence.slot, sequence.pages)
        self.place_request(sequence.slot, sequence.request)
        needs = Needs.of([sequence.request])
        self._needs[sequence.serial] = next((n for n in self._needs.values() if n == needs), needs)
        if self._recurrent is not None:
            with torch.no_grad():  # weights may have changed since the last request
                self._memo = {self._recurrent.injection: self._recurrent.injection.decay()}

    def place_request(self, slot: int, request: Request) -> None:
        """Set what a slot's rows depend on besides the cache."""
        self.slots.place(slot, request, RULES.index(request.rule))
        self._place_bias(slot, request)

    def _place_bias(self, slot: int, request: Request) -> None:
        biased = request.logit_bias or request.schema is not None
        if biased and self._bias_BV is None:
            shape = len(self.slots.phase), self.model.cfg.vocab_size
            self._bias_BV = torch.zeros(shape, device=self._device)
        if self._bias_BV is not None:
            self._bias_BV[slot] = 0
            for token, value in request.logit_bias:
                self._bias_BV[slot, token] = value

    def restrict(self, sequence: Sequence, allowed_V: NDArray[np.bool_]) -> None:
        """Let a sequence's next token be one of those where ``allowed_V`` is true."""
        assert sequence.slot is not None
        self._place_bias(sequence.slot, sequence.request)
        assert self._bias_BV is not None
        self._bias_BV[sequence.slot].masked_fill_(
            ~torch.from_numpy(allowed_V).to(self._device), -torch.inf
        )

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended: its slot is computed no longer."""
        self._prompts.pop(sequence.serial, None)
        self._needs.pop(sequence.serial, None)
        if sequence.slot is not None:
            self.slots.phase[sequence.slot] = FREE

    def take_out(self, moved: Moved) -> Saved:
        """Return the state of a slot and the content of its pages, in host memory."""
        flat = torch.tensor([page for own in moved.pages for page in own], device=self._device)
        saved = [x[moved.slot].to("cpu", copy=True) for x in self._state()]
        self.slots.phase[moved.slot] = FREE
        self._prompts.pop(moved.sequence.serial, None)
        return Saved(saved, [len(own) for own in moved.pages], self.cache.pool_NPW[flat].cpu())

    def put_back(self, sequence: Sequence, saved: Saved) -> None:
        """Give a sequence a slot and pages again, with what :meth:`take_out` saved."""
        assert sequence.slot is not None
        self.cache.assign(sequence.slot, sequence.pages)
        kept = zip(sequence.pages, saved.counts, strict=True)
        flat = [page for own, count in kept for page in own[:count]]
        self.cache.pool_NPW[torch.tensor(flat, device=self._device)] = saved.entries.to(
            self._device
        )
        for tensor, value in zip(self._state(), saved.state, strict=True):
            tensor[sequence.slot] = value.to(self._device)
        self._place_bias(sequence.slot, sequence.request)

    def _state(self) -> list[Tensor]:
        """Return all tensors with a row per slot."""
        return [*self.slots.tensors(), *self.rules.tensors()]

    @torch.inference_mode()
    def prefill(self, chunk: Chunk) -> tuple[Chosen | None, list[Scored]]:
        """Run a chunk of a prompt.

        Returns:
            The first token, after the last chunk; and the scores of the tokens that follow the
            chunk's positions in the prompt, if the request wants them.
        """
        sequence, request = chunk.sequence, chunk.sequence.request
        slot, serial = sequence.slot, sequence.serial
        assert slot is not None
        if serial not in self._prompts:
            n_prompt = len(request.prompt)
            self._prompts[serial] = self.cache.restore(
                slot, chunk.start, request.max_loops, n_prompt
            )
        cache = self._prompts[serial]
        ids_1T = self.slots.ids[slot : slot + 1, chunk.start : chunk.stop]
        rule = self.rules.of(request) if self._prefill_exits else None
        trace = None if rule is None else LoopTrace()
        ctx = self.model.context(ids_1T, cache, chunk.start)
        hidden_1TD = self.model.hidden(ids_1T, ctx, Depth(request.max_loops or None, rule), trace)
        self.cache.store(slot, cache, chunk.start, chunk.stop, request.max_loops)
        scores = self._score(request, chunk, hidden_1TD) if request.prompt_logprobs else []
        if not chunk.last:
            return None, scores
        del self._prompts[serial]
        loops = request.max_loops
        if trace is not None and trace.exits is not None:
            loops = int(trace.exits[0, -1])
        slots_1 = torch.tensor([slot], device=self._device)
        self.slots.t[slot], self.slots.phase[slot] = loops, WAITING
        batch = Batch(slots_1, Needs.of([request]), [sequence])
        (chosen,) = read_choices(batch, self.choose(batch, self.model.head(hidden_1TD[:, -1])))
        return chosen, scores

    def _score(self, request: Request, chunk: Chunk, hidden_1TD: Tensor) -> list[Scored]:
        """Return the log-probabilities of the prompt's tokens that follow the chunk's positions."""
        target = torch.tensor(request.prompt[chunk.start + 1 : chunk.stop + 1], dtype=torch.long)
        if not len(target):
            return []
        logits_TV = self.model.head(hidden_1TD[0, : len(target)])
        n_top = request.logprobs or 0
        scores = log_probabilities(logits_TV, target.to(self._device), n_top)
        rows = zip(*(x.tolist() for x in scores), strict=True)
        return [scored(n_top, *row) for row in rows]

    @torch.inference_mode()
    def enter(self, sequences: Rows[Sequence]) -> None:
        """Start the newest token of every sequence: embedding, prelude, h_0."""
        for batch in self._batches(sequences):
            self.enter_rows(batch)

    @torch.inference_mode()
    def loop(self, sequences: Rows[Sequence]) -> list[Sequence]:
        """Run one loop of every sequence; return those that are done with their token's loops."""
        stopped = []
        for batch in self._batches(sequences):
            stops = self.loop_rows(batch)[batch.n_dummies :].tolist()
            stopped += [s for s, stop in zip(batch.sequences, stops, strict=True) if stop]
        return stopped

    @torch.inference_mode()
    def leave(self, sequences: Rows[Sequence]) -> list[tuple[Sequence, Chosen]]:
        """Run coda and head of every sequence and choose its next token."""
        left: list[tuple[Sequence, Chosen]] = []
        for batch in self._batches(sequences):
            left += zip(batch.sequences, read_choices(batch, self.leave_rows(batch)), strict=True)
        return left

    def enter_rows(self, batch: Batch) -> None:
        """Start the newest token of the rows that wait."""
        slots_R, state, real_R = batch.slots_R, self.slots, self._real(batch, WAITING)
        _put(state.position, batch, state.position.index_select(0, slots_R) + 1, real_R)
        position_R, token_R = (x.index_select(0, slots_R) for x in (state.position, state.token))
        kept_R = token_R
        if real_R is not None:
            kept_R = torch.where(real_R, token_R, state.ids[slots_R, position_R])
        state.ids[slots_R, position_R] = kept_R
        ctx = self._context(batch, real_R)
        e_R1D = self.model.embed(token_R.unsqueeze(1), ctx)
        if self._recurrent is None:
            _put(state.h, batch, e_R1D, real_R)
            return
        _put(state.h, batch, self._recurrent.initial_state(e_R1D, ctx), real_R)
        _put(state.drive, batch, self._recurrent.injection(None, e_R1D), real_R)
        _put(state.t, batch, torch.zeros_like(slots_R), real_R)
        _put(state.phase, batch, torch.full_like(slots_R, LOOPING), real_R)
        self.rules.begin(slots_R, batch.needs.kinds, real_R)

    def loop_rows(self, batch: Batch) -> Tensor:
        """Run a loop of the rows that loop; return (R,) true where one is done with its loops."""
        assert self._recurrent is not None
        slots_R, state, real_R = batch.slots_R, self.slots, self._real(batch, LOOPING)
        t_R, before_R1D, drive_R1D, most_R = (
            x.index_select(0, slots_R) for x in (state.t, state.h, state.drive, state.most)
        )
        if real_R is not None:
            t_R = t_R * real_R  # rows that wait may have no level for another loop
        ctx = self._context(batch, real_R)
        after_R1D = self._recurrent.step(before_R1D, drive_R1D, t_R, ctx)
        next_R = t_R + 1
        done_R = next_R >= most_R
        if batch.needs.kinds != ("none",):
            look = Look(t_R.unsqueeze(1), before_R1D, after_R1D, _no_predictions)
            stop_R = self.rules.stops(
                batch.needs.kinds, slots_R, state.rule[slots_R], state.numbers[slots_R], look
            )
            done_R = done_R | (stop_R & (next_R >= state.least[slots_R]))
        _put(state.h, batch, after_R1D, real_R)
        _put(state.t, batch, next_R, real_R)
        _put(state.phase, batch, torch.where(done_R, WAITING, LOOPING), real_R)
        return done_R if real_R is None else done_R & real_R

    def leave_rows(self, batch: Batch) -> Choice:
        """Run the coda of the rows that wait, and choose their next token."""
        slots_R, state = batch.slots_R, self.slots
        ctx = self._context(batch, self._real(batch, WAITING))
        hidden_R1D = self.model.final_hidden(state.h.index_select(0, slots_R), ctx)
        if self._recurrent is not None:
            assert isinstance(ctx.cache, LevelRows)
            self.cache.copy_on_exit(ctx.cache, state.t[slots_R], state.most[slots_R])
        return self.choose(batch, self.model.head(hidden_R1D)[:, 0])

    def choose(self, batch: Batch, logits_RV: Tensor) -> Choice:
        """Choose the next token of the rows that wait; those that end are free."""
        slots_R, state = batch.slots_R, self.slots
        logits_RV = logits_RV.float()
        real_R, draw_R = self._real(batch, WAITING), state.draw[slots_R]
        token_R = self._tokens(batch, logits_RV, draw_R)
        ends_R = (token_R.unsqueeze(1) == state.ends[slots_R]).any(1)
        ends_R = ends_R | (draw_R + 1 >= state.max_tokens[slots_R])
        _put(state.token, batch, token_R, real_R)
        _put(state.draw, batch, draw_R + 1, real_R)
        _put(state.phase, batch, torch.where(ends_R, FREE, WAITING), real_R)
        scores: tuple[Tensor | None, ...] = (None, None, None)
        if batch.needs.n_top is not None:
            scores = log_probabilities(logits_RV, token_R, batch.needs.n_top)
        return Choice(real_R, token_R, state.t[slots_R], logits_RV.isfinite().all(1), *scores)

    def _tokens(self, batch: Batch, logits_RV: Tensor, draw_R: Tensor) -> Tensor:
        """Choose a token (R,) of every row."""
        slots_R, state, stages = batch.slots_R, self.slots, batch.needs.stages
        bias_RV = None
        if batch.needs.biased and self._bias_BV is not None:
            bias_RV = self._bias_BV[slots_R]
        elif stages.plain:
            return logits_RV.argmax(-1)
        return state.sampling(slots_R, stages).choose(
            logits_RV, state.ids[slots_R], state.n_prompt[slots_R], state.key[slots_R], draw_R,
            bias_RV,
        )  # fmt: skip

    def _real(self, batch: Batch, phase: int) -> Tensor | None:
        """Return (R,) true on the rows in a phase; None if they are all rows but the dummies."""
        if batch.sequences and batch.groups is not None:
            return None
        return self.slots.phase[batch.slots_R] == phase

    def _context(self, batch: Batch, real_R: Tensor | None) -> Context:
        """Return positions and cache of the rows' current tokens."""
        position_R = self.slots.position.index_select(0, batch.slots_R)
        values: dict[int, Tensor] = {}
        if len(self.model.value_embeddings):
            token_R = self.slots.token.index_select(0, batch.slots_R)
            values = self.model.token_values(token_R.unsqueeze(1))
        return Context(
            positions=position_R.unsqueeze(1),
            ropes={
                rotary: rows.index_select(1, position_R).unsqueeze(2)
                for rotary, rows in self._rope_rows.items()
            },
            mask=None,
            columns=Columns(0),
            cache=self.cache.at(batch.slots_R, position_R, real_R, batch.groups, batch.n_blocks),
            exact=self.exact,
            values=values,
            memo=dict(self._memo if batch.groups is not None else {}),
        )

    def _batches(self, sequences: Rows[Sequence]) -> Iterator[Batch]:
        """Split sequences into batches of the size that the mode asks for."""
        page = self.layout.page
        rows = sorted(sequences, key=lambda s: s.position // page)
        size = TILE if self.exact else max(1, len(rows))
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            pad = -len(some) % TILE if self._whole_tiles else 0
            slots = [self._dummy] * pad + [s.slot for s in some]
            pages = [1] * pad + [s.position // page + 1 for s in some]
            slots_R = torch.tensor(slots, device=self._device)
            yield Batch(slots_R, self._needs_of(some), some, tuple(runs(pages)))

    def _needs_of(self, sequences: Rows[Sequence]) -> Needs:
        """Return the needs of some sequences; as a rule, all of them have the same."""
        first, *others = (self._needs[s.serial] for s in sequences)
        if all(each is first for each in others):
            return first
        return Needs.of([s.request for s in sequences])


def _put(tensor: Tensor, batch: Batch, new: Tensor, real_R: Tensor | None) -> None:
    """Write the slots of a batch: of the real rows, or (None) of all but the dummies."""
    if real_R is None:
        skip = batch.n_dummies
        tensor.index_copy_(0, batch.slots_R[skip:], new[skip:])
    else:
        real = real_R.view(-1, *[1] * (new.dim() - 1))
        tensor[batch.slots_R] = torch.where(real, new, tensor[batch.slots_R])


def _no_predictions() -> Tensor:
    raise AssertionError("rules of the engine do not predict")
