"""From the body of a request to running sequences: depth, place in the queue, tokens."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from open_mythos.errors import DataError, EnvironmentError_, MythosError
from open_mythos.inference.request import Request
from open_mythos.inference.server.answers import Prompt, Shape, Words
from open_mythos.inference.server.auth import Keys
from open_mythos.inference.server.chat import ChatTemplate
from open_mythos.inference.server.depth import DepthChoice, DepthPolicy
from open_mythos.inference.server.errors import ApiError, from_mythos, invalid
from open_mythos.inference.server.guided import checked_schema
from open_mythos.inference.server.limits import Admission, Limits, Place
from open_mythos.inference.server.metrics import Metrics
from open_mythos.inference.server.protocol import ChatRequest, Common, CompletionRequest
from open_mythos.inference.server.streams import Answer, Clock, Host, Pace
from open_mythos.inference.text import token_texts
from open_mythos.seeding import derive_seed
from open_mythos.tokenizer import Tokenizer

_LONG_TEXT = 8192
"""Characters from which a text is encoded in a thread, so that streams go on."""
_WORDS_OF_A_TEMPLATE = 64
"""Bytes that a template adds to a message, at a guess; for the estimate of cost alone."""


@dataclass
class Service:
    """Everything the routes share."""

    host: Host
    tokenizer: Tokenizer
    model: str
    """The name that clients use."""
    template: ChatTemplate | None = None
    limits: Limits = field(default_factory=Limits)
    policy: DepthPolicy = field(default_factory=DepthPolicy)
    keys: Keys = field(default_factory=lambda: Keys([]))
    address: str | None = "127.0.0.1"
    """Where the server listens: without keys, requests must name it. None: behind a proxy, which
    may pass on any name."""
    clock: Clock = time.monotonic
    version: str = ""
    draining: bool = False
    first: int | None = None
    """The id that an empty prompt becomes; by default eos, which stands between documents."""

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits, lambda: self.host.facts["loop_tokens_per_s"])
        self.pace = Pace(self.limits, self.clock)
        self.words = Words(self.tokenizer)
        self.created = int(time.time())
        self.metrics = Metrics(
            running=lambda: self.admission.open - self.admission.waiting,
            waiting=lambda: self.admission.waiting,
            is_up=lambda: self.host.state == "ready",
            beat=lambda: {
                **self.host.beat,
                "ledger_violations": self.host.ledger_violations,
            },
            version=self.version,
        )

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self.host.state == "ready" and not self.draining

    @property
    def fingerprint(self) -> str:
        """Names weights and arithmetic: equal ones give equal text for equal seeds."""
        facts = self.host.facts
        return f"{facts['fingerprint'][:16]}-{'exact' if facts['exact'] else 'fast'}"

    def check_open(self, key: str) -> None:
        """Refuse what no body could change.

        Raises:
            ApiError: 503 if the engine is not ready, 429 if the queue is full.
        """
        if not self.is_ready:
            raise self.not_ready()
        self.admission.check_room(key)

    def check_model(self) -> None:
        """Check that model and tokenizer fit.

        Raises:
            DataError: The model may choose tokens that the tokenizer does not have.
        """
        if self.host.facts["vocab_size"] > self.tokenizer.vocab_size:
            raise DataError(
                "the model's vocabulary is larger than the tokenizer's", where="--tokenizer",
                value=self.tokenizer.name, fix="serve the model with its own tokenizer",
                allowed=f"at least {self.host.facts['vocab_size']} ids",
            )  # fmt: skip

    def not_ready(self) -> ApiError:
        """Return the 503."""
        state = "draining" if self.draining else self.host.state
        return ApiError(503, f"the server is not ready ({state})", headers={"Retry-After": "5"})

    async def prepare(self, body: Common, key: str) -> tuple[Answer, Shape]:
        """Take a place in the queue, encode the prompts, and make the sequences.

        Raises:
            ApiError: The request is refused; no place is kept.
        """
        if body.model not in (None, self.model):
            raise ApiError(404, "no such model", param="model", code="model_not_found")
        depth = self.policy.resolve(body, self.host.facts)
        n_prompts = len(body.prompts) if isinstance(body, CompletionRequest) else 1
        place = self.admission.enter(key, self._estimate(body, depth), body.n * n_prompts)
        try:
            return await self._prepare(body, key, depth, place)
        except BaseException:
            place.release()
            raise

    def submit_error(self, error: MythosError) -> ApiError:
        """Return the answer where the engine does not take a request."""
        return (
            self.not_ready() if isinstance(error, EnvironmentError_) else from_mythos(error, None)
        )

    async def _prepare(
        self, body: Common, key: str, depth: DepthChoice, place: Place
    ) -> tuple[Answer, Shape]:
        schema = await checked_schema(body.schema_of_text, self.limits)
        prompts = await self._encode(body)
        most = self._new_tokens(body, prompts)
        loops = max(1, depth.max_loops)
        place.correct(body.n * loops * sum(len(prompt.ids) + most for prompt in prompts))
        seed = secrets.randbits(63) if body.seed is None else body.seed
        seconds = min(body.timeout or self.limits.timeout_seconds, self.limits.timeout_seconds)
        id = f"{'chatcmpl' if isinstance(body, ChatRequest) else 'cmpl'}-{secrets.token_hex(12)}"
        echo = isinstance(body, CompletionRequest) and body.echo
        common = self._sampling(body, depth, key, schema) | {
            "max_tokens": most, "deadline": self.clock() + seconds,
            "prompt_logprobs": echo and (body.alternatives is not None or most == 0),
        }  # fmt: skip
        requests = [
            Request(f"{id}-{i}", ids, key=derive_seed(seed, "sample", i), **common)
            for i, ids in enumerate(prompt.ids for prompt in prompts for _ in range(body.n))
        ]
        answer = Answer(
            self.host, requests, self.tokenizer, body.stops, echo=echo, place=place,
            seconds=seconds, limits=self.limits, metrics=self.metrics, pace=self.pace,
            clock=self.clock,
        )  # fmt: skip
        shape = Shape(
            id, body, self.model, int(time.time()), self.fingerprint, seed, self.words, prompts,
        )  # fmt: skip
        return answer, shape

    def _sampling(
        self, body: Common, depth: DepthChoice, key: str, schema: str | None
    ) -> dict[str, Any]:
        vocab_size = self.host.facts["vocab_size"]
        end = self.tokenizer.eos_id
        salt = f"{key}/{body.cache_salt}" if len(self.keys) > 1 else body.cache_salt
        names = (
            "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
            "frequency_penalty",
        )  # fmt: skip
        return {
            **{name: getattr(body, name) for name in names},
            "logit_bias": body.biases(vocab_size), "ends": (end,) if end < vocab_size else (),
            "max_loops": depth.max_loops, "min_loops": depth.min_loops, "rule": depth.rule,
            "numbers": depth.numbers, "logprobs": body.alternatives, "salt": salt,
            "schema": schema,
        }  # fmt: skip

    def _estimate(self, body: Common, depth: DepthChoice) -> int:
        """Return the loop-tokens of a request from its bytes: a token is at least one byte.

        More than the context is refused after encoding, so it is not counted.
        """
        context = self.host.facts["context"]
        if isinstance(body, ChatRequest):
            parts = [len(message.plain()["content"].encode()) for message in body.messages]
            sizes = [sum(parts) + _WORDS_OF_A_TEMPLATE * len(parts)]
        else:
            assert isinstance(body, CompletionRequest)
            sizes = [len(x.encode() if isinstance(x, str) else x) for x in body.prompts]
        new = context if body.most_tokens is None else body.most_tokens
        return body.n * max(1, depth.max_loops) * sum(min(size + new, context) for size in sizes)

    async def _encode(self, body: Common) -> list[Prompt]:
        if isinstance(body, ChatRequest):
            return [await self._encode_chat(body)]
        assert isinstance(body, CompletionRequest)
        found: list[Prompt] = []
        for prompt in body.prompts:
            ids = await self._encode_text(prompt) if isinstance(prompt, str) else prompt
            self._check_ids("prompt", ids)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(ids)
            offsets: Sequence[int] = ()
            if body.echo and body.logprobs is not None:
                _, offsets = await asyncio.to_thread(token_texts, self.tokenizer, ids)
            found.append(Prompt(text, tuple(ids), offsets))
        return found

    async def _encode_text(self, text: str) -> list[int]:
        # a lone surrogate is an error of the tokenizer's
        self._check_size("prompt", len(text.encode(errors="replace")))
        try:
            ids = await _in_thread_if_long(text, self.tokenizer.encode)
        except DataError as error:
            raise from_mythos(error, "prompt") from None
        return ids or [self.tokenizer.eos_id if self.first is None else self.first]

    async def _encode_chat(self, body: ChatRequest) -> Prompt:
        if self.template is None:
            raise invalid(
                "messages", "this model has no chat template",
                "put chat_template.jinja beside the checkpoint, or start the server with "
                "--chat-template FILE; /v1/completions needs none",
            )  # fmt: skip
        try:
            text = await self.template.render([message.plain() for message in body.messages])
            self._check_size("messages", self.template.n_bytes(text))
            ids = await _in_thread_if_long(text, self.template.ids)
        except DataError as error:
            raise from_mythos(error, "messages") from None
        self._check_ids("messages", ids)
        return Prompt("", tuple(ids))

    def _check_size(self, param: str, size: int) -> None:
        """Refuse a text that is too long however it is divided into tokens, before dividing it."""
        per_token, context = self.tokenizer.most_token_bytes, self.host.facts["context"]
        if per_token is not None and size > per_token * context:
            raise ApiError(
                400, f"{param}: {size} bytes do not fit into the context of {context} tokens",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    def _check_ids(self, param: str, ids: Sequence[int]) -> None:
        vocab_size = self.host.facts["vocab_size"]
        if not ids:
            raise invalid(param, "has no tokens")
        if max(ids) >= vocab_size:
            raise invalid(param, f"token ids must be below {vocab_size}, the model's vocabulary")

    def _new_tokens(self, body: Common, prompts: list[Prompt]) -> int:
        """Return the limit of new tokens, checked against the context."""
        context, longest = self.host.facts["context"], max(len(prompt.ids) for prompt in prompts)
        field_of_prompt = "messages" if isinstance(body, ChatRequest) else "prompt"
        most = context - longest if body.most_tokens is None else body.most_tokens
        if longest + (most > 0) > context:
            what = f"{longest} tokens leave no room in the context of {context}"
            raise ApiError(
                400, f"{field_of_prompt}: {what}", param=field_of_prompt,
                code="context_length_exceeded",
            )  # fmt: skip
        if longest + most > context:
            named = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
            named = named if isinstance(body, ChatRequest) else "max_tokens"
            raise ApiError(
                400, f"{named}: {longest} prompt tokens and {most} new ones exceed the context of "
                f"{context}", param=named, code="context_length_exceeded",
            )  # fmt: skip
        return most


async def _in_thread_if_long(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    """Return ``encode(text)``; meanwhile streams go on."""
    return encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(encode, text)
