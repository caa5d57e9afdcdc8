"""R23: every limit, just reached and just exceeded, on the running server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chaos.serving.mix import CONTEXT
from chaos.serving.server import MODEL

CHAT = "/v1/chat/completions"
LOOPS = 6


def biases(n: int) -> dict[str, float]:
    return {str(i): 0.5 for i in range(n)}


def messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": ""}] * (n - 1) + [{"role": "user", "content": "x"}]


def schema(size: int) -> dict[str, Any]:
    text = {"type": "string", "description": "x"}
    room = size - len(json.dumps({"type": "string", "description": ""}, separators=(",", ":")))
    return {"type": "json_schema", "json_schema": {"schema": text | {"description": "x" * room}}}


CAPS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("prompt", {"prompt": "x" * 255, "max_tokens": 1}, {"prompt": "x" * 256, "max_tokens": 1}),
    ("max_tokens", {"prompt": [65], "max_tokens": 255}, {"prompt": [65], "max_tokens": 256}),
    ("max_tokens", {"max_tokens": 1}, {"max_tokens": 0}),
    ("prompt", {"prompt": [[65]] * 32}, {"prompt": [[65]] * 33}),
    ("prompt", {"prompt": [319]}, {"prompt": [320]}),
    ("n", {"n": 8}, {"n": 9}),
    ("stop", {"stop": ["a", "b", "c", "d"]}, {"stop": ["a", "b", "c", "d", "e"]}),
    ("stop", {"stop": "x" * 256}, {"stop": "x" * 257}),
    ("logprobs", {"logprobs": 20}, {"logprobs": 21}),
    ("logit_bias", {"logit_bias": biases(300)}, {"logit_bias": biases(301)}),
    ("logit_bias", {"logit_bias": {"319": 100}}, {"logit_bias": {"320": 100}}),
    ("logit_bias.1", {"logit_bias": {"1": -100}}, {"logit_bias": {"1": -100.01}}),
    ("n_loops", {"n_loops": LOOPS}, {"n_loops": LOOPS + 1}),
    ("n_loops", {"n_loops": 1}, {"n_loops": 0}),
    ("max_loops", {"max_loops": LOOPS}, {"max_loops": LOOPS + 1}),
    ("min_loops", {"max_loops": 3, "min_loops": 3, "exit_rule": "change"},
     {"max_loops": 3, "min_loops": 4, "exit_rule": "change"}),
    ("temperature", {"temperature": 2}, {"temperature": 2.0001}),
    ("temperature", {"temperature": 1e-4}, {"temperature": 0.9e-4}),
    ("top_p", {"top_p": 1}, {"top_p": 1.0001}),
    ("top_k", {"top_k": 2**31 - 1}, {"top_k": 2**31}),
    ("min_p", {"min_p": 1}, {"min_p": 1.01}),
    ("repetition_penalty", {"repetition_penalty": 100}, {"repetition_penalty": 100.1}),
    ("presence_penalty", {"presence_penalty": 2}, {"presence_penalty": 2.01}),
    ("frequency_penalty", {"frequency_penalty": -2}, {"frequency_penalty": -2.01}),
    ("seed", {"seed": 2**63 - 1}, {"seed": 2**63}),
    ("cache_salt", {"cache_salt": "x" * 256}, {"cache_salt": "x" * 257}),
    ("timeout", {"timeout": 300}, {"timeout": 300.1}),
)  # fmt: skip
CHAT_CAPS: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("top_logprobs", {"logprobs": True, "top_logprobs": 20},
     {"logprobs": True, "top_logprobs": 21}),
    ("messages", {"messages": messages(12)}, {"messages": messages(1025)}),
)  # fmt: skip


@pytest.mark.goal("R23", "every limit of a request, reached and exceeded")
def test_caps_of_requests(server, row):
    for path, caps in (("/v1/completions", CAPS), (CHAT, CHAT_CAPS)):
        for param, within, beyond in caps:
            answer = server.ask(path, **{"max_tokens": 1, **within})
            assert answer.status_code == 200, (within, answer.text)
            answer = server.ask(path, **{"max_tokens": 1, **beyond})
            assert answer.status_code == 400, (beyond, answer.text)
            assert answer.json()["error"]["param"] == param
            row.count(2)
    row.outcome = f"{row.times // 2} limits: accepted, and 400 with the field's name"


@pytest.mark.goal("R23", "the longest body and headers, and one byte more")
def test_caps_of_bytes(server, row):
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1}).encode()
    for size, status in ((2_000_000, 200), (2_000_001, 413)):
        reply = server.http.post(
            "/v1/completions",
            content=body.ljust(size),
            headers={"Content-Type": "application/json"},
        )
        assert reply.status_code == status
    chunked = (b"x" * 1000 for _ in range(2001))
    head = {"Content-Type": "application/json"}
    assert server.http.post("/v1/completions", content=chunked, headers=head).status_code == 413
    low, high = 60_000, 66_000
    while high - low > 1:  # where a longer header is refused
        middle = (low + high) // 2
        status = server.http.get("/health/live", headers={"X": "y" * middle}).status_code
        assert status in (200, 431)
        low, high = (middle, high) if status == 200 else (low, middle)
    assert 65_000 < high < 65_536
    row.count(4)
    row.outcome = "413 and 431, and the connection goes on or is closed"


@pytest.mark.goal("R23", "the longest JSON schema, and one byte more")
def test_caps_of_schemas(server, row):
    pytest.importorskip("llguidance")
    for size, status in ((65_536, 200), (65_537, 400)):
        answer = server.ask(response_format=schema(size), max_tokens=1)
        assert answer.status_code == status, answer.text
    row.count(2)
    row.outcome = "accepted, and 400"


def test_the_context_is_filled_exactly(server):
    """To its last position, at the greatest depth."""
    answer = server.ask(prompt=[65] * 200, max_tokens=CONTEXT - 200, n_loops=LOOPS,
                        logit_bias={"257": -100})  # fmt: skip
    assert answer.json()["usage"]["total_tokens"] == CONTEXT
