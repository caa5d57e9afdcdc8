"""Continuous batching at the granularity of loops.

Rows at different loops, of different requests, share every tick; a row that exits frees its place
at once. A tick is plan -> run -> commit: the scheduler decides without torch, the runner computes
without policy, and nothing but :meth:`Engine.step` changes their state.

Every request gets the tokens, finish reason and loops that plain ``generate`` gives its prompt
alone. In exact mode its log-probabilities do not depend, in any bit, on what else is running.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from open_mythos.checks import check_count
from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.batch import Chosen, Needs, few_sizes
from open_mythos.inference.cuda_graphs import capture_problem
from open_mythos.inference.device_ticks import DeviceTicks, Launched
from open_mythos.inference.guided import NO_TOKEN_FITS, Guides
from open_mythos.inference.levels import layout_of, pages_in_memory
from open_mythos.inference.offline import Completion, Prompts, generate_all
from open_mythos.inference.pages import PAGE
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
from open_mythos.inference.scheduler import CHUNK_LOOP_TOKENS, Scheduler
from open_mythos.inference.sequence import Chunk, Phase, Sequence, Work
from open_mythos.inference.weights import weights_mark
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.mythos import OpenMythos
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import Tokenizer


class Engine:
    """Generates for many requests at once.

    Args:
        model: Any :class:`CausalLM`, in evaluation mode. Its weights may change in place, but not
            while requests run; it must not be moved or cast.
        slots: Sequences that run at the same time.
        context: Most positions of a request; the model's ``max_seq_len`` by default and at most.
        max_loops: Deepest request; the model's ``max_loop_iters`` by default.
        exact: Make a request's bits independent of the others; by default on a CPU only.
        kv_memory: Bytes of the cache if above 1, else the part of the free memory that it may take.
            At most what all slots need at their full length is allocated.
        overcommit: Admit more than fits at full length; requests are swapped to host memory if the
            pages run out.
        prefill_exits: Apply a request's exit rule to its prompt too, as ``generate`` does.
        chunk_loop_tokens: Positions times loops of a prompt chunk; smaller chunks stall others
            less.
        ticks_per_chunk: Ticks between two chunks while rows loop.
        edge_fraction: Part of the rows that must wait before coda and head run.
        max_queued: Requests that may wait for admission.
        page: Positions of a page, a power of two.
        constant_shapes: Let the device decide which rows run, so that a tick needs no values on the
            host; by default on CUDA only, where a tick is a CUDA graph.
        tokenizer: For texts, and for requests with a JSON schema.
        clock: Seconds, for deadlines and statistics.

    Raises:
        ConfigError: An argument is out of range, or the model is in training mode.
    """

    def __init__(
        self, model: CausalLM, *, slots: int = 16, context: int | None = None,
        max_loops: int | None = None, exact: bool | None = None, kv_memory: float = 0.8,
        overcommit: bool = False, prefill_exits: bool = True,
        chunk_loop_tokens: int = CHUNK_LOOP_TOKENS, ticks_per_chunk: int = 4,
        edge_fraction: float = 0.5, max_queued: int = 256, page: int = PAGE,
        constant_shapes: bool | None = None, tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        if model.training:
            raise ConfigError(
                "the engine needs a model in evaluation mode", where="model.training", value=True,
                allowed="False", fix="call model.eval() first",
            )  # fmt: skip
        cfg, weight = model.cfg, model.final_norm.weight
        looped = isinstance(model, OpenMythos)
        self.model, self.tokenizer, self._clock = model, tokenizer, clock
        most = cfg.max_seq_len if context is None else check_count("context", context)
        self.context = min(most, cfg.max_seq_len)
        deepest = cfg.max_loop_iters if max_loops is None else check_count("max_loops", max_loops)
        self.max_loops = deepest if looped else 0
        self.exact = weight.device.type == "cpu" if exact is None else exact
        self.layout = layout_of(model, page)
        needed = check_count("slots", slots) * self.layout.pages(self.max_loops, self.context)
        n_pages = pages_in_memory(self.layout, needed, cfg.cache_width, weight, kv_memory)
        facts = (str(weight.dtype), self.exact, prefill_exits)
        self.scheduler = Scheduler(
            self.layout, slots, n_pages, self.context, chunk_loop_tokens=chunk_loop_tokens,
            ticks_per_chunk=ticks_per_chunk, edge_fraction=edge_fraction, overcommit=overcommit,
            max_queued=max_queued, facts=facts,
        )  # fmt: skip
        self.runner = Runner(
            model, self.layout, n_slots=slots, n_pages=n_pages, context=self.context,
            max_loops=self.max_loops, exact=self.exact, prefill_exits=prefill_exits,
        )  # fmt: skip
        self._ticks: DeviceTicks | None = None
        on_device = weight.device.type == "cuda" if constant_shapes is None else constant_shapes
        if on_device:
            if weight.is_cuda and (problem := capture_problem(model)) is not None:
                raise ConfigError(
                    "steps of this model cannot be captured", where="constant_shapes",
                    value=problem, allowed="models whose steps read no value on the host",
                    fix="pass constant_shapes=False, or use a bfloat16 model",
                )  # fmt: skip
            self._ticks = DeviceTicks(self.runner, slots, max(1, slots // 8) if looped else slots)
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
        self._guides.start(self.scheduler.add(request, self._clock()), guide)

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
        if not self.busy:
            self.scheduler.check()
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
        if not self.busy:
            self.scheduler.check()
        return events

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
        outcome = take(sequence, chosen.token, chosen.loops, self._clock())
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
            self, prompts, params, depth, tokenizer=tokenizer or self.tokenizer, logprobs=logprobs,
            schema=schema, progress=progress,
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

    def self_check(self, n_tokens: int = 8) -> None:
        """Run a prompt alone and among others.

        Raises:
            EnvironmentError_: In exact mode, the two runs differ in a bit on this machine.
        """
        length = max(1, min(self.context // 2, 24))
        ids = [i * 7919 % self.model.cfg.vocab_size for i in range(length)]
        params = SamplingParams(min(n_tokens, self.context - length), temperature=0.0)
        crowd = [ids[: 1 + i % length] for i in range(self.slots)]
        (alone,) = self.generate([ids], params, logprobs=1)
        among = self.generate([ids, *crowd], params, logprobs=1)[0]
        if self.exact and (among.logprobs, among.top) != (alone.logprobs, alone.top):
            raise EnvironmentError_(
                "log-probabilities depend on other requests on this machine", where="exact",
                value=[alone.logprobs, among.logprobs], allowed="equal bits",
                fix="start the engine with exact=False (--fast)",
            )  # fmt: skip

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] += time.perf_counter() - start
