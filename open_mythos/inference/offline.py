"""Offline generation: a list of prompts in, a list of completions out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from rich.progress import Progress

from open_mythos.checks import checked
from open_mythos.errors import ConfigError
from open_mythos.inference.request import Event, Finished, Outcome, Request, Started, Token
from open_mythos.inference.slot_rules import describe_rule
from open_mythos.inference.text import TextStream
from open_mythos.model.depth import Depth
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import Tokenizer


class Source(Protocol):
    """What offline generation uses of an engine."""

    max_loops: int

    @property
    def slots(self) -> int: ...
    @property
    def queued(self) -> int: ...
    @property
    def busy(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def cancel(self, id: str, outcome: Outcome = ...) -> None: ...
    def step(self) -> list[Event]: ...


Prompts = Sequence[Sequence[int]] | Sequence[str]
"""Token ids or texts."""


@dataclass
class Completion:
    """What a prompt was continued with."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    """New tokens, an EOS token and those of a stop string included."""
    loops: list[int] = field(default_factory=list)
    """Loops that chose each token."""
    logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each token under the raw logits, in nats, if requested."""
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """Most likely tokens at each position and their log-probabilities, if requested."""
    outcome: Outcome | None = None
    """Why it ended."""
    error: str = ""
    cached_tokens: int = 0
    """Prompt tokens whose entries another prompt had left in the prefix cache."""
    text: str | None = None
    """The new text, without a stop string, if a tokenizer was passed."""

    def take(self, event: Event) -> None:
        """Record an event of the request."""
        if isinstance(event, Token):
            self.tokens.append(event.token)
            self.loops.append(event.loops)
            self.logprobs.append(event.logprob)
            self.top.append(event.top)
        elif isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, Finished):
            self.outcome, self.error = event.outcome, event.error


@checked
def generate_all(
    engine: Source,
    prompts: Prompts,
    params: SamplingParams | None = None,
    depth: Depth | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    logprobs: int | None = None,
    schema: str | None = None,
    progress: bool = False,
) -> list[Completion]:
    """Continue all prompts; see ``Engine.generate``."""
    if engine.busy:
        raise ConfigError(
            "the engine runs other requests", where="generate", value=f"{engine.queued} queued",
            allowed="an idle engine", fix="wait for them, or add() these requests to them",
        )  # fmt: skip
    ids = [_ids(prompt, tokenizer) for prompt in prompts]
    params = params or SamplingParams()
    if params.stop and tokenizer is None:
        raise ConfigError(
            "stop strings require a tokenizer", where="stop", value=params.stop,
            allowed="stop strings together with tokenizer=",
            fix="pass tokenizer=, or use eos_token_id",
        )  # fmt: skip
    requests = requests_of(ids, params, depth or Depth(), engine.max_loops, logprobs, schema)
    done = {request.id: Completion(request.prompt) for request in requests}
    streams = {}
    if tokenizer is not None:
        streams = {id: TextStream(tokenizer, params.stop) for id in done}
    with Progress(disable=not progress) as bar:
        task = bar.add_task("generating", total=len(requests))
        for event in _events(engine, requests):
            _take(engine, event, done[event.id], streams.get(event.id))
            bar.advance(task, int(isinstance(event, Finished)))
    return list(done.values())


def requests_of(
    ids: Sequence[Sequence[int]], params: SamplingParams, depth: Depth, max_loops: int,
    logprobs: int | None = None, schema: str | None = None,
) -> list[Request]:  # fmt: skip
    """Return the requests of a batch of prompts; rows draw as in ``generate`` of the batch."""
    rule, numbers, least, most = describe_rule(depth.exit_rule)
    loops = depth.of_rows(len(ids), max_loops)
    keys = params.row_keys(len(ids)).tolist() if ids else []
    return [
        Request(
            id=str(row), prompt=tuple(prompt), max_tokens=params.max_new_tokens,
            temperature=params.temperature, top_p=params.top_p, top_k=params.top_k or 0,
            min_p=params.min_p, repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple(dict(params.logit_bias).items()), key=keys[row],
            ends=params.ends,
            max_loops=loops[row] if most is None else min(loops[row], most),
            min_loops=min(least, max(loops[row], 1)), rule=rule, numbers=numbers,
            logprobs=logprobs, schema=schema,
        )
        for row, prompt in enumerate(ids)
    ]  # fmt: skip


def _events(engine: Source, requests: Sequence[Request]) -> Iterator[Event]:
    """Run the requests; no more are queued than the engine can soon admit, and none is left."""
    try:
        for request in requests:
            engine.add(request)
            while engine.busy and engine.queued >= engine.slots:
                yield from engine.step()
        while engine.busy:
            yield from engine.step()
    except BaseException:
        for request in requests:
            engine.cancel(request.id)
        with suppress(Exception):  # an engine that failed may fail again
            engine.step()
        raise


def _take(engine: Source, event: Event, completion: Completion, stream: TextStream | None) -> None:
    if isinstance(event, Token) and stream is not None:
        if stream.stopped_by is not None:
            return  # chosen before the cancellation took effect
        completion.take(event)
        completion.text = (completion.text or "") + stream.push(event).text
        if stream.stopped_by is not None:
            engine.cancel(event.id, Outcome.STOP_STRING)
        return
    completion.take(event)
    if isinstance(event, Finished) and stream is not None:
        completion.text = (completion.text or "") + stream.finish().text
        if stream.stopped_by is not None:
            completion.outcome = Outcome.STOP_STRING


def _ids(prompt: Sequence[int] | str, tokenizer: Tokenizer | None) -> Sequence[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ConfigError(
            "prompts of text require a tokenizer", where="prompts", value=prompt,
            allowed="token ids, or text together with tokenizer=", fix="pass tokenizer=",
        )  # fmt: skip
    return tokenizer.encode(prompt) or [tokenizer.eos_id]  # it stands between documents
