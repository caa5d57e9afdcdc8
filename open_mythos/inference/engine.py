"""Continuous batching at the granularity of loops.

Rows at different loops, of different requests, share every tick; a row that exits frees its place
at once. A tick is plan -> run -> commit: the scheduler decides without torch, the runner computes
without policy, and nothing but :meth:`Engine.step` changes their state.

Every request gets the tokens, finish reason and loops that plain ``generate`` gives its prompt
alone. In exact mode its log-probabilities do not depend, in any bit, on what else is running.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from open_mythos.checks import checked, unknown_key
from open_mythos.errors import ConfigError
from open_mythos.inference.batch import Chosen, Needs, few_sizes
from open_mythos.inference.cuda_graphs import capture_problem
from open_mythos.inference.device_ticks import DeviceTicks, Launched
from open_mythos.inference.guided import NO_TOKEN_FITS, Guides
from open_mythos.inference.levels import layout_of, pages_in_memory
from open_mythos.inference.offline import Completion, Prompts, generate_all
from open_mythos.inference.options import EngineOptions
from open_mythos.inference.quantization import is_quantized
from open_mythos.inference.request import (
    Event,
    Finished,
    Outcome,
    PromptScored,
    Request,
    Started,
    Token,
)
from open_mythos.inference.runner import Runner
from open_mythos.inference.scheduler import Scheduler
from open_mythos.inference.sequence import Chunk, Phase, Sequence, Work
from open_mythos.inference.weights import weights_mark
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import Tokenizer

_TICKS_PER_CHECK = 1024


class Engine:
    """Generates for many requests at once.

    Args:
        model: Any :class:`CausalLM`, in evaluation mode. Its weights may change in place, but not
            while requests run; it must not be moved or cast.
        options: How the engine runs.
        max_queued: Requests that may wait for admission.
        tokenizer: For texts, and for requests with a JSON schema.
        clock: Seconds, for deadlines and statistics.
        changes: Options that differ from ``options``: ``Engine(model, slots=8)``.

    Raises:
        ConfigError: An argument is out of range, or the model is in training mode.
    """

    @checked
    def __init__(
        self, model: CausalLM, options: EngineOptions = EngineOptions(), *,  # noqa: B008 (frozen)
        max_queued: int = 256,
        tokenizer: Tokenizer | None = None, clock: Callable[[], float] = time.monotonic,
        **changes: Any,
    ) -> None:  # fmt: skip
        for name in changes:
            if name not in EngineOptions.__dataclass_fields__:
                raise unknown_key(name, EngineOptions.__dataclass_fields__, "Engine")
        options = replace(options, **changes)
        if model.training:
            raise ConfigError(
                "the engine needs a model in evaluation mode", where="model.training", value=True,
                allowed="False", fix="call model.eval() first",
            )  # fmt: skip
        cfg, weight = model.cfg, model.final_norm.weight
        cfg.require_causal("Engine(model)")
        looped = isinstance(model, OpenMythos)
        self.model, self.tokenizer, self._clock = model, tokenizer, clock
        if options.context is not None and options.context > cfg.max_seq_len:
            raise ConfigError(
                "the model's context is shorter", where="context", value=options.context,
                allowed=f"at most {cfg.max_seq_len}", fix="leave context out for all of it",
            )  # fmt: skip
        self.context = options.context or cfg.max_seq_len
        self.max_loops = (options.max_loops or cfg.max_loop_iters) if looped else 0
        self.exact = exactness(model, options.exact)
        self.layout = layout_of(model, options.page)
        needed = options.slots * self.layout.pages(self.max_loops, self.context)
        n_pages = pages_in_memory(self.layout, needed, cfg.cache_width, weight, options.kv_memory)
        self.scheduler = Scheduler(
            self.layout, options.slots, n_pages, self.context,
            chunk_loop_tokens=options.chunk_loop_tokens, ticks_per_chunk=options.ticks_per_chunk,
            edge_fraction=options.edge_fraction, overcommit=options.overcommit,
            max_queued=max_queued,
            facts=(str(weight.dtype), self.exact, options.prefill_exits),
        )  # fmt: skip
        self.runner = Runner(
            model, self.layout, n_slots=options.slots, n_pages=n_pages, context=self.context,
            max_loops=self.max_loops, exact=self.exact, prefill_exits=options.prefill_exits,
        )  # fmt: skip
        on_device = options.constant_shapes
        if on_device is None:
            on_device = weight.is_cuda and capture_problem(model) is None
        self._ticks = DeviceTicks(self.runner, options.slots) if on_device else None
        self._weights = weights_mark(model)
        self._launched: Launched | None = None
        self._saved: dict[int, Any] = {}
        self._scores: dict[int, list[Any]] = {}
        self._guides = Guides(tokenizer, cfg.vocab_size, follows_rows=not on_device)
        self._loops_per_token: Counter[int] = Counter()
        self._totals: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return self.scheduler.busy

    @property
    def slots(self) -> int:
        """Number of slots."""
        return self.scheduler.counts()["slots"]

    @property
    def queued(self) -> int:
        """Number of requests that wait for admission."""
        return self.scheduler.counts()["queued"]

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ConfigError: It could never run.
            EnvironmentError_: The queue is full.
        """
        vocabulary, deepest = self.model.cfg.vocab_size, self.max_loops
        biased = tuple(token for token, _ in request.logit_bias)
        for where, ids in (("prompt", request.prompt), ("logit_bias", biased)):
            outside = [token for token in ids if not 0 <= token < vocabulary]
            if outside:
                raise ConfigError(
                    "a token id is outside the vocabulary", where=where, value=outside[0],
                    allowed=f"0 .. {vocabulary - 1}",
                    fix="check that the tokenizer matches the model",
                )  # fmt: skip
        if request.max_loops > deepest or (deepest and request.max_loops < 1):
            raise ConfigError(
                "the request is deeper than the engine", where="max_loops",
                value=request.max_loops,
                allowed=f"1 .. {deepest}" if deepest else "0: a dense model has no loops",
                fix="lower max_loops, or start the engine with a larger max_loops",
            )  # fmt: skip
        guide = self._guides.make(request)
        if not self.busy and (weights := weights_mark(self.model)) != self._weights:
            self.scheduler.forget_prefixes()
            self._weights = weights
        self._guides.start(self.scheduler.add(request), guide)

    def cancel(self, id: str, outcome: Outcome = Outcome.CANCELLED) -> None:
        """End a request at the next step; an unknown id is ignored."""
        self.scheduler.cancel(id, outcome)

    def step(self) -> list[Event]:
        """Run one tick and return what happened, in order; [] if there is nothing to do."""
        if not self.busy:
            return []
        if self._ticks is not None:
            return self._device_step(self._ticks)
        work = self.scheduler.plan(self._clock())
        events = self._move(work)
        entering: list[Sequence] = []
        # before the chunk: a dense model's new row would be in the edge without having entered
        rows = self.scheduler.edge()
        if work.chunk is not None:
            with self._timed("prefill"):
                events += self._prefill(work.chunk, entering)
        if rows:
            with self._timed("edge"):
                self._guides.restrict(rows, self.runner.restrict)
                for sequence, chosen in self.runner.leave(rows):
                    events += self._commit(sequence, chosen, self.scheduler.left, entering)
            self._totals["edge_rows"] += len(rows)
            self._totals["edges"] += 1
        if entering:
            with self._timed("edge"):
                self.runner.enter(entering)
        if rows := self.scheduler.looping():
            with self._timed("loop"):
                self.scheduler.stopped(self.runner.loop(rows))
            self._totals["loop_rows"] += len(rows)
            self._totals["loop_ticks"] += 1
        self._check_books()
        return events

    def _device_step(self, ticks: DeviceTicks) -> list[Event]:
        """Launch a tick of constant shape, and take the tokens of the one before."""
        events: list[Event] = []
        if (
            self.scheduler.places.overcommit
        ):  # a sequence that is taken out may not have tokens in flight
            events += self._collect()
        work = self.scheduler.plan(self._clock())
        events += self._move(work)
        entering: list[Sequence] = []
        if work.chunk is not None:
            with self._timed("prefill"):
                events += self._prefill(work.chunk, entering)
        if entering:
            self.runner.enter(entering)
        running = [s for s in self.scheduler.places.running() if s.tokens]
        launched = None
        if running:
            needs = Needs.of([sequence.request for sequence in running])
            # a token may be in flight, which leaves after one loop: the next one enters, too
            longest = max(sequence.position for sequence in running) + 3
            blocks = few_sizes(self.layout.rows(min(longest, self.context)))
            n_blocks = min(blocks, self.layout.rows(self.context))
            launched = ticks.launch(needs, n_blocks)
            self._totals["loop_ticks"] += 1
        events += self._collect()
        self._launched = launched
        self._check_books()
        return events

    def _check_books(self) -> None:
        """Check the ledger when all is done, and now and then on the way."""
        if not self.busy or self.scheduler.tick % _TICKS_PER_CHECK == 0:
            self.scheduler.check()

    def _collect(self) -> list[Event]:
        """Take the tokens of the last tick; those of sequences that have ended are dropped."""
        events: list[Event] = []
        if self._launched is not None:
            launched, self._launched = self._launched, None
            by_serial = {s.serial: s for s in self.scheduler.places.running()}
            for serial, chosen in launched.read():
                if (sequence := by_serial.get(serial)) is not None:
                    if sequence.phase is Phase.LOOPING:
                        self.scheduler.stopped([sequence])
                    n_top = sequence.request.logprobs
                    logprob = None if n_top is None else chosen.logprob
                    chosen = chosen._replace(logprob=logprob, top=chosen.top[: n_top or 0])
                    events += self._commit(sequence, chosen, self.scheduler.left, [])
                    self._totals["edge_rows"] += 1
        return events

    def _move(self, work: Work) -> list[Event]:
        """Follow the scheduler's decisions about slots and pages."""
        events: list[Event] = []
        for sequence, outcome in work.ended:
            events.append(self._end(sequence, outcome))
        for moved in work.swap_out:
            self._saved[moved.sequence.serial] = self.runner.take_out(moved)
        for sequence in work.swap_in:
            self.runner.put_back(sequence, self._saved.pop(sequence.serial))
        for sequence in work.admitted:
            self.runner.place(sequence)
        for sequence in (*work.swap_in, *work.admitted):
            if self._ticks is not None and sequence.slot is not None:
                self._ticks.place(sequence.slot, sequence.serial)
        for sequence in work.changed:
            assert sequence.slot is not None
            self.runner.cache.assign(sequence.slot, sequence.pages)
        return events

    def _prefill(self, chunk: Chunk, entering: list[Sequence]) -> list[Event]:
        sequence, request = chunk.sequence, chunk.sequence.request
        self._guides.restrict([sequence], self.runner.restrict)
        chosen, scores = self.runner.prefill(chunk)
        events: list[Event] = []
        if chunk.start == sequence.n_cached:  # the first one
            events.append(Started(request.id, sequence.n_cached))
        self._totals["prefills"] += 1
        self._totals["prompt_tokens"] += chunk.stop - chunk.start
        self._totals["prefill_loops"] += (chunk.stop - chunk.start) * request.max_loops
        if not all(math.isfinite(own or 0.0) for own, _ in scores):
            self.scheduler.fail(sequence, "nonfinite_logits")
            return [*events, self._end(sequence, Outcome.FAILED, sequence.error)]
        if request.prompt_logprobs:
            scored = self._scores.setdefault(sequence.serial, [(None, ())])
            scored += scores
            if chunk.last:
                logprobs, top = zip(*self._scores.pop(sequence.serial), strict=True)
                events.append(PromptScored(request.id, logprobs, top))
        outcome = self.scheduler.prefilled(chunk)
        if outcome is not None:
            return [*events, self._end(sequence, outcome)]
        if chosen is not None:
            events += self._commit(sequence, chosen, self.scheduler.entered, entering)
        return events

    def _commit(
        self, sequence: Sequence, chosen: Chosen, take: Callable[..., Outcome | None],
        entering: list[Sequence],
    ) -> list[Event]:  # fmt: skip
        """Give a chosen token to the scheduler; sequences that go on are added to ``entering``."""
        id = sequence.request.id
        if not chosen.finite:
            self.scheduler.fail(sequence, "nonfinite_logits")
            return [self._end(sequence, Outcome.FAILED, sequence.error)]
        outcome = take(sequence, chosen.token, chosen.loops)
        events: list[Event] = [
            Token(id, chosen.token, chosen.loops, chosen.logprob, chosen.top),
        ]
        self._totals["generated_tokens"] += 1
        self._totals["decode_loops"] += chosen.loops
        self._loops_per_token[chosen.loops] += 1
        if outcome is None and not self._guides.take(sequence, chosen.token):
            self.scheduler.fail(sequence, NO_TOKEN_FITS)
            outcome = Outcome.FAILED
        if outcome is None:
            entering.append(sequence)
        else:
            events.append(self._end(sequence, outcome, sequence.error))
        return events

    def _end(self, sequence: Sequence, outcome: Outcome, error: str = "") -> Event:
        self._saved.pop(sequence.serial, None)
        self._scores.pop(sequence.serial, None)
        self._guides.end(sequence)
        self.runner.release(sequence)
        return Finished(sequence.request.id, outcome, error)

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | None = None,
        depth: Depth | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        logprobs: int | None = None,
        schema: str | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Continue many prompts, of any number and length.

        Args:
            prompts: Lists of token ids, or texts.
            params: Sampling parameters and stop criteria of all prompts. Row i draws as row i of
                ``generate`` on the whole batch.
            depth: Loops of all prompts or of each, and the exit rule; by default ``max_loops``.
            tokenizer: Required for texts and for stop strings; the engine's by default.
            logprobs: Alternatives whose log-probabilities are returned with each token's own.
            schema: JSON schema that every new text follows; requires ``eos_token_id``.
            progress: Show a progress bar.

        Returns:
            One completion per prompt, in order.

        Raises:
            ConfigError: An argument is out of range, or a prompt does not fit.
        """
        return generate_all(
            self, prompts, params, depth, logprobs=logprobs, schema=schema, progress=progress,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
        )  # fmt: skip

    def stats(self) -> dict[str, Any]:
        """Return the counts of the scheduler and what ticks have done so far (JSON types).

        ``*_seconds`` are seconds spent in loops, edges and prompts; ``loops_per_token`` maps loops
        to tokens that ran so many.
        """
        return {
            **self.scheduler.counts(),
            **self._totals,
            **{f"{stage}_seconds": seconds for stage, seconds in self._seconds.items()},
            "loops_per_token": {str(k): n for k, n in sorted(self._loops_per_token.items())},
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start


def exactness(model: CausalLM, exact: bool | None) -> bool:
    """Return whether to run in exact mode: by default on a CPU, unless weights are quantized.

    Raises:
        ConfigError: Exact mode is asked for, and the model has no exact form.
    """
    on_cpu, quantized = model.final_norm.weight.device.type == "cpu", is_quantized(model)
    if exact and (quantized or not on_cpu):
        raise ConfigError(
            "this model has no exact form", where="exact",
            value="quantized weights" if quantized else "a model on CUDA",
            allowed="float weights on a CPU", fix="leave exact out, or set it to false",
        )  # fmt: skip
    return on_cpu and not quantized if exact is None else exact
