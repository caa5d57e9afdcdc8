"""Requests of every kind."""

from __future__ import annotations

import string
from random import Random
from typing import Any

from chaos.serving.server import MODEL

PATHS = ("/v1/completions", "/v1/chat/completions")
CONTEXT = 256
_LOOPS: tuple[dict[str, Any], ...] = (
    {}, {"n_loops": 1}, {"n_loops": 3}, {"n_loops": 6}, {"max_loops": 4, "exit_rule": "change"},
    {"exit_rule": "gate", "exit_threshold": 0.5}, {"exit_rule": "acceleration", "min_loops": 2},
)  # fmt: skip
_OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"n": 2}, {"stop": ["a", "xyz"]}, {"temperature": 0}, {"top_p": 0.9, "top_k": 40},
    {"seed": 5}, {"presence_penalty": 0.5, "repetition_penalty": 1.1}, {"return_loops": True},
    {"logit_bias": {"65": 5}}, {"return_token_ids": True},
)  # fmt: skip


def words(draw: Random, length: int) -> str:
    """Return a text of ``length`` characters."""
    return "".join(draw.choices(string.ascii_lowercase + "   ", k=length))


def any_request(
    draw: Random, longest: int = 120, most_tokens: int = 40
) -> tuple[str, dict[str, Any]]:
    """Return path and body of a valid request."""
    body: dict[str, Any] = {"model": MODEL, "max_tokens": draw.randint(1, most_tokens)}
    body |= draw.choice(_LOOPS) | draw.choice(_OPTIONS)
    if draw.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    text = words(draw, draw.choice([5, 20, draw.randint(1, longest)]))
    if draw.random() < 0.25:
        return PATHS[1], body | {"messages": [{"role": "user", "content": text}]}
    if draw.random() < 0.2:
        body |= {"logprobs": draw.randint(0, 5)}
        body["echo"] = draw.random() < 0.3
    prompt: Any = text
    if draw.random() < 0.2:
        prompt = draw.choice([list(text.encode()), [text, "two"], [[65, 66], [67]]])
    return PATHS[0], body | {"prompt": prompt}
