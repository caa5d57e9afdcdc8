"""Random requests: never an error of the server's own, never a hang, never another's answer."""

from __future__ import annotations

import json
import random
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from open_mythos.inference.server.protocol import ChatRequest, CompletionRequest
from tests.inference.server.running import Running

HEAD = {"Content-Type": "application/json"}
CANARY = {"model": "toy", "prompt": "canary ", "max_tokens": 12, "temperature": 0, "logprobs": 2}
VALUES: list[Any] = [
    None, True, 0, -1, 1, 2, 8, 2.5, 1e9, 2**63, -(2**63) - 1, 1e308, "", "8", "toy", "\0",
    "é" * 50, "<|eos|>", [], [[]], [1], [257], ["a", "b"], [[1], [2]], {}, {"1": 5}, {"a": {}},
    [None], "gate", "fixed:3", [{"role": "user", "content": "a"}], {"type": "text"},
    {"include_usage": True},
]  # fmt: skip
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "tools", "x"})
PATHS = ("/v1/completions", "/v1/chat/completions")


def is_sound(answer: httpx.Response) -> bool:
    """A success, or a refusal in the common format."""
    if answer.status_code == 200:
        return True
    body = json.loads(answer.content)
    is_refused = answer.status_code in (400, 404, 405, 413, 415, 429, 431)
    return is_refused and set(body["error"]) == {"message", "type", "param", "code"}


def canary(server: Running) -> Any:
    return server.client.post(PATHS[0], json=CANARY).json()["choices"]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(PATHS),
    st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), max_size=6),
)
def test_fields_of_any_value(shared: Running, path: str, fields: dict[str, Any]) -> None:
    start = {"prompt": "ab"} if path == PATHS[0] else {"messages": VALUES[-3]}
    body = json.dumps({"model": "toy", "max_tokens": 4, **start, **fields}).encode()
    assert is_sound(shared.client.post(path, content=body, headers=HEAD, timeout=5))


def mutated(draw: random.Random) -> bytes:
    """A valid body with some bytes changed, dropped or doubled."""
    data = bytearray(json.dumps({**CANARY, "stop": ["x"], "n_loops": 4}).encode())
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(data))
        match draw.randrange(3):
            case 0:
                data[at] = draw.randrange(256)
            case 1:
                del data[at : at + draw.randint(1, 9)]
            case _:
                data[at:at] = data[: draw.randint(1, 30)]
    return bytes(data)


def test_damaged_bodies(shared: Running) -> None:
    before, draw = canary(shared), random.Random(0)
    for i in range(100):
        body = mutated(draw)
        answer = shared.client.post(PATHS[0], content=body, headers=HEAD, timeout=5)
        assert is_sound(answer), (i, body)
    assert canary(shared) == before


def schema_of_routes() -> dict[str, Any]:
    """An OpenAPI description of both routes, from the models of their bodies."""
    paths, parts = {}, {}
    for path, model in zip(PATHS, (CompletionRequest, ChatRequest), strict=True):
        found = model.model_json_schema(ref_template="#/components/schemas/{model}")
        parts |= found.pop("$defs", {})
        found["properties"]["model"] = {"const": "toy"}
        found["properties"]["timeout"] = {"type": ["number", "string"], "minimum": 10}
        content = {"application/json": {"schema": found}}
        answers = {"200": {"description": "ok"}, "400": {"description": "refused"}}
        body = {"required": True, "content": content}
        paths[path] = {"post": {"requestBody": body, "responses": answers}}
    info = {"title": "t", "version": "1"}
    return {
        "openapi": "3.1.0", "info": info, "paths": paths, "components": {"schemas": parts},
    }  # fmt: skip


@pytest.mark.slow
def test_schemathesis(shared: Running) -> None:
    """Bodies that fit the schema, and bodies that do not."""
    api = schemathesis.openapi.from_dict(schema_of_routes())
    api.config.update(base_url=shared.url)
    before = canary(shared)
    for path in PATHS:
        for mode in schemathesis.GenerationMode:
            cases = api[path]["POST"].as_strategy(generation_mode=mode)

            @settings(
                max_examples=300, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            )
            @given(cases)
            def check(case: Any) -> None:
                assert is_sound(case.call(session=None, timeout=10))

            check()
    assert canary(shared) == before
