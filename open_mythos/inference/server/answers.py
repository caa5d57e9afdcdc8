"""Answers in the shape of the OpenAI API, whole or in chunks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from open_mythos.inference.server.protocol import ChatRequest, Common
from open_mythos.inference.server.streams import Delta
from open_mythos.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, as reported."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int
    """Where its text begins in the text of the choice."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and ids."""

    text: str
    ids: tuple[int, ...]
    offsets: Sequence[int] = ()
    """Where the text of each token begins; only if the prompt is echoed with log-probabilities."""


class Words:
    """Texts of single tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(maxsize=65_536)(lambda token: tokenizer.decode([token]))

    def chat(self, token: int, logprob: float) -> dict[str, Any]:
        """Return text, bytes (null for a part of a character) and log-probability of a token."""
        text = self.of(token)
        parts = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "bytes": parts, "logprob": finite(logprob)}


def finite(logprob: float) -> float:
    """Return ``logprob``, or a very low number if it is not finite."""
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


@dataclass
class Shape:
    """Builds the answers of one request."""

    id: str
    body: Common
    model: str
    created: int
    fingerprint: str
    seed: int
    words: Words
    prompts: Sequence[Prompt]
    """For echo."""
    spoken: set[int] = field(default_factory=set)
    """Choices whose first chunk has been sent."""

    @property
    def is_chat(self) -> bool:
        """Whether the answer is a message."""
        return isinstance(self.body, ChatRequest)

    def whole(self, deltas: Sequence[Delta], usage: dict[str, Any]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        kind = "chat.completion" if self.is_chat else "text_completion"
        choices = [self.choice(delta, chunk=False) for delta in deltas]
        return {**self._head(kind), "choices": choices, "usage": usage}

    def chunks(self, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
        """Return the chunks of a stream for new deltas."""
        found = []
        for delta in deltas:
            is_first = self.is_chat and delta.index not in self.spoken
            if is_first:
                self.spoken.add(delta.index)
            if is_first or self._is_shown(delta):
                choice = self.choice(delta, chunk=True, role=is_first)
                found.append(self._chunk([choice]))
        return found

    def last_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk that ends a stream with its usage."""
        return {**self._chunk([]), "usage": usage}

    def choice(self, delta: Delta, *, chunk: bool, role: bool = False) -> dict[str, Any]:
        """Return an element of ``choices``."""
        text, prompt = delta.piece.text, self.prompts[delta.index // self.body.n]
        if delta.echo:
            text = prompt.text + text
        found: dict[str, Any] = {"index": delta.index}
        if not self.is_chat:
            found["text"] = text
        elif chunk:
            found["delta"] = {"role": "assistant", "content": text} if role else {"content": text}
        else:
            found["message"] = {"role": "assistant", "content": text, "refusal": None}
        found["logprobs"] = self._logprobs(delta, prompt)
        found["finish_reason"] = delta.finish_reason
        found["stop_reason"] = delta.stop_reason
        if self.body.return_loops:
            found["loops"] = [token.loops for token in delta.piece.tokens]
        if self.body.return_token_ids:
            found["token_ids"] = [token.token for token in delta.piece.tokens]
        return found

    def _is_shown(self, delta: Delta) -> bool:
        """Return whether a delta holds anything that the client asked for."""
        body = self.body
        details = body.return_loops or body.return_token_ids or body.alternatives is not None
        return bool(
            delta.piece.text or delta.echo or delta.finish_reason
            or (details and delta.piece.tokens)
        )  # fmt: skip

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint, "seed": self.seed,
        }  # fmt: skip

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        usage = {"usage": None} if self.body.wants_usage else {}
        return {**self._head(kind), "choices": choices, **usage}

    def _logprobs(self, delta: Delta, prompt: Prompt) -> Any:
        if self.body.alternatives is None:
            return None
        before = len(prompt.text) if getattr(self.body, "echo", False) else 0
        scored = self._scored_prompt(delta, prompt) if delta.echo else []
        scored += [
            Scored(token.token, token.logprob, token.top, before + offset)
            for token, offset in zip(delta.piece.tokens, delta.piece.offsets, strict=True)
        ]
        return self._chat_logprobs(scored) if self.is_chat else self._text_logprobs(scored)

    def _scored_prompt(self, delta: Delta, prompt: Prompt) -> list[Scored]:
        if delta.scored is None:
            return []
        logprobs, tops = delta.scored.logprobs, delta.scored.top or [()] * len(prompt.ids)
        found = zip(prompt.ids, logprobs, tops, prompt.offsets, strict=True)
        return [Scored(*each) for each in found]

    def _text_logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Return log-probabilities as ``/v1/completions`` has them."""
        tops: list[dict[str, float] | None] = []
        for each in scored:
            named = {} if each.logprob is None else {each.token: each.logprob}
            top: dict[str, float] = {}
            for token, logprob in (*each.top, *named.items()):
                top.setdefault(self.words.of(token), finite(logprob))
            tops.append(top if each.logprob is not None else None)
        return {
            "tokens": [self.words.of(each.token) for each in scored],
            "token_logprobs": [None if x.logprob is None else finite(x.logprob) for x in scored],
            "top_logprobs": tops if self.body.alternatives else None,
            "text_offset": [each.offset for each in scored],
        }

    def _chat_logprobs(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """Return log-probabilities as ``/v1/chat/completions`` has them."""
        content = [
            {
                **self.words.chat(each.token, each.logprob or 0.0),
                "top_logprobs": [self.words.chat(*pair) for pair in each.top],
            }
            for each in scored
        ]
        return {"content": content, "refusal": None}
