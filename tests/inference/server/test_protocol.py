"""Bodies of requests: what is refused, with which field, and every bound at its edge."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from open_mythos.errors import ConfigError
from open_mythos.inference.server.depth import DepthChoice, DepthPolicy, check_default
from open_mythos.inference.server.errors import MOST_BYTES, ApiError, to_json
from open_mythos.inference.server.limits import Limits
from open_mythos.inference.server.protocol import ChatRequest, CompletionRequest, parse_body
from tests.inference.server.fake_host import FACTS

LIMITS = Limits()
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}


def completion(limits: Limits = LIMITS, **fields: Any) -> CompletionRequest:
    body = {"model": "m", "prompt": "a", **fields}
    return parse_body(CompletionRequest, json.dumps(body).encode(), limits)


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], **fields}
    return parse_body(ChatRequest, json.dumps(body).encode(), LIMITS)


def refused(make: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", [1, True, []]),
        ("prompt", [None, 5, [], [[]], [[1], []], {}]),
        ("max_tokens", [0, -1, 1.5, "3", True, 2.0, 1e9, []]),
        ("temperature", [-0.1, 2.1, "1", True, 1e-5]),
        ("top_p", [0, 1.1, -1, False]),
        ("top_k", [-1, 1.0, 2**31, True]),
        ("min_p", [-0.1, 1.1]),
        ("repetition_penalty", [0, -1, 101]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("seed", [1.0, "1", True, 2**63, -(2**63) - 1]),
        ("n", [0, 9, 1.0, True]),
        ("best_of", [2, 0]),
        ("stop", [5, [""], ["a"] * 5, "", "x" * 257]),
        ("logprobs", [-1, 21, True]),
        ("stream", ["true", 1]),
        ("logit_bias", [{"1": 101}, {"1": True}, [], {str(i): 1 for i in range(301)}]),
        ("stream_options", [{"include_usage": True}]),
        ("response_format", [{"type": "json_schema"}, {**JSON_SCHEMA, "type": "text"}]),
        ("n_loops", [0, -1, 2.5, True, "8", 1e9, 8.0]),
        ("max_loops", [0, True, "8"]),
        ("min_loops", [0, 2.5]),
        ("exit_threshold", [True, "0.5"]),
        ("return_loops", [1, "yes"]),
        ("cache_salt", ["x" * 257, 1]),
        ("timeout", [0, -1, 300.1, True]),
        *((name, [None, [], "x"]) for name in ("tools", "functions", "suffix", "audio", "x" * 300)),
    ],
)
def test_a_bad_value_names_its_field(field: str, values: list[Any]) -> None:
    for value in values:
        error = refused(completion, **{field: value})
        assert error.param is not None
        assert error.param.partition("[")[0].partition(".")[0][:90] == field[:90], value
        assert len(to_json(error.content())) <= MOST_BYTES
        assert "x" * 101 not in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ["a"] * 32}, {"prompt": [0]}, {"prompt": [[1], [2]]}, {"max_tokens": 1},
        {"max_tokens": 0, "echo": True}, {"temperature": 0}, {"temperature": 1e-4},
        {"temperature": 2}, {"top_p": 1e-9}, {"n": 8, "best_of": 8}, {"stop": ["x" * 256] * 4},
        {"stop": None}, {"logprobs": 20}, {"logit_bias": {str(i): -100 for i in range(300)}},
        {"seed": 2**63 - 1}, {"seed": -(2**63)}, {"timeout": 300}, {"cache_salt": "x" * 256},
        {"user": "somebody", "metadata": {"a": "b"}}, {"response_format": {"type": "text"}},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)  # fmt: skip
def test_the_bounds_themselves_are_accepted(fields: dict[str, Any]) -> None:
    completion(**fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": []}]},
         "messages[0].tool_calls"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_completion_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": []}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
    ],
)  # fmt: skip
def test_chats(fields: dict[str, Any], param: str) -> None:
    assert refused(chat, **fields).param == param


def test_parts_of_a_message_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].plain() == {
        "role": "user", "content": "ab",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "low", "field"),
    [
        ("prompts", 2, lambda n: {"prompt": ["a"] * n}),
        ("choices", 2, lambda n: {"n": n}),
        ("stops", 2, lambda n: {"stop": ["a"] * n}),
        ("stop_characters", 2, lambda n: {"stop": "a" * n}),
        ("alternatives", 2, lambda n: {"logprobs": n}),
        ("biases", 2, lambda n: {"logit_bias": {str(i): 1 for i in range(n)}}),
        ("salt_characters", 2, lambda n: {"cache_salt": "a" * n}),
        ("timeout_seconds", 2, lambda n: {"timeout": n}),
    ],
)
def test_every_limit_of_a_body(name: str, low: int, field: Any) -> None:
    limits = replace(LIMITS, **{name: low})
    completion(limits, **field(low))
    assert refused(completion, limits=limits, **field(low + 1)).param == next(iter(field(1)))


def test_a_limit_must_make_sense() -> None:
    with pytest.raises(ConfigError, match=r"limits\.choices"):
        Limits(choices=0)


RAW = [
    b"", b"{", b"[]", b"null", b"5", b'"x"', b'{"model":"m","prompt":"a","temperature":NaN}',
    b'{"model":"m","prompt":"a","temperature":Infinity}',
    b'{"model":"m","prompt":"a","temperature":1e999}', b'{"model":"m","prompt":"\\ud800"}',
    b'{"model":"m","prompt":"\xff"}', b'\xef\xbb\xbf{"model":"m","prompt":"a"}',
    b'{"model":"m","prompt":"a","n":' + b"9" * 5000 + b"}",
    b'{"model":"m","prompt":' + b"[" * 5000 + b"]" * 5000 + b"}",
    b'{"model":"m","prompt":"a","logit_bias":' + b'{"a":' * 5000 + b"1" + b"}" * 5001,
    b"{" + b",".join(b'"x%d":0' % i for i in range(100_000)) + b"}",
    b'{"model":"m","prompt":[' + b"true," * 100_000 + b"1]}",
    b'{"model":"m","prompt":"a"}x', b"\0", b'{"model":"m"\0,"prompt":"a"}',
]  # fmt: skip


@pytest.mark.parametrize("body", RAW, ids=range(len(RAW)))
def test_raw_bodies(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_body(CompletionRequest, body, LIMITS)
    assert caught.value.status == 400
    assert len(to_json(caught.value.content())) <= MOST_BYTES


def test_repeated_names_take_the_last() -> None:
    body = b'{"model":"m","prompt":"a","prompt":"b"}'
    assert parse_body(CompletionRequest, body, LIMITS).prompt == "b"


def test_biases() -> None:
    assert completion(logit_bias={"10": 1, "9": -1}).biases(320) == ((9, -1), (10, 1))
    for names in ({"x": 1}, {"320": 1}, {"-1": 1}, {"1": 1, "01": 1}, {"\u0661": 1}):
        with pytest.raises(ApiError) as caught:
            completion(logit_bias=names).biases(320)
        assert caught.value.param == "logit_bias"


POLICY = DepthPolicy()


def test_depths() -> None:
    """Trained at 8, validated from 2 to 12, 16 at most."""

    def depth(policy: DepthPolicy = POLICY, **fields: Any) -> DepthChoice:
        return policy.resolve(completion(**fields), FACTS)

    assert depth() == DepthChoice(8, 8)
    assert depth(n_loops=2) == DepthChoice(2, 2)
    assert depth(max_loops=12) == DepthChoice(12, 12)
    assert depth(exit_rule="fixed:4") == DepthChoice(4, 4)
    assert depth(exit_rule="fixed:9", max_loops=5) == DepthChoice(5, 5)
    assert depth(exit_rule="gate") == DepthChoice(8, 1, "gate", (0.8,))
    assert depth(exit_rule="gate:0.5", min_loops=3) == DepthChoice(8, 3, "gate", (0.5,))
    assert depth(exit_rule="gate", exit_threshold=0.25).numbers == (0.25,)
    assert depth(exit_rule="change").numbers == (0.05,)
    assert depth(exit_rule="acceleration:0.1").numbers == (0.1, 2)
    assert depth(exit_rule="acceleration:0.1,3", exit_threshold=0.2).numbers == (0.2, 3)
    loose = DepthPolicy(allow_unvalidated=True)
    assert depth(loose, n_loops=16) == DepthChoice(16, 16)
    assert depth(loose, n_loops=1) == DepthChoice(1, 1)
    assert depth(DepthPolicy("change:0.5")) == DepthChoice(8, 1, "change", (0.5,))
    assert depth(DepthPolicy("change:0.5"), exit_rule="none").rule == "none"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n_loops": 1}, "n_loops"),
        ({"n_loops": 13}, "n_loops"),
        ({"max_loops": 13}, "max_loops"),
        ({"n_loops": 4, "max_loops": 4}, "n_loops"),
        ({"n_loops": 4, "exit_rule": "gate"}, "n_loops"),
        ({"min_loops": 9}, "min_loops"),
        ({"exit_rule": "kl"}, "exit_rule"),
        ({"exit_rule": "stable:3"}, "exit_rule"),
        ({"exit_rule": "fixed"}, "exit_rule"),
        ({"exit_rule": "fixed:13"}, "exit_rule"),
        ({"exit_rule": "fixed:1.5"}, "exit_rule"),
        ({"exit_rule": "gate:0"}, "exit_rule"),
        ({"exit_rule": "gate:1.1"}, "exit_rule"),
        ({"exit_rule": "gate:nan"}, "exit_rule"),
        ({"exit_rule": "gate:"}, "exit_rule"),
        ({"exit_rule": "gate:0.1,2"}, "exit_rule"),
        ({"exit_rule": "acceleration:0.1,0"}, "exit_rule"),
        ({"exit_rule": "x" * 500}, "exit_rule"),
        ({"exit_rule": ""}, "exit_rule"),
        ({"exit_threshold": 0.5}, "exit_threshold"),
        ({"exit_rule": "gate", "exit_threshold": 1.5}, "exit_threshold"),
        ({"exit_rule": "fixed:4", "exit_threshold": 0.5}, "exit_threshold"),
    ],
)
def test_refused_depths(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        POLICY.resolve(completion(**fields), FACTS)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "x" * 101 not in caught.value.message


def test_depths_of_other_models() -> None:
    dense = {**FACTS, "dense": True, "trained_depth": None}
    assert POLICY.resolve(completion(n_loops=1), dense) == DepthChoice(0, 0)
    unknown = {**FACTS, "validated_depth": None}
    assert POLICY.resolve(completion(n_loops=8), unknown).max_loops == 8
    for fields, facts, param in (
        ({"n_loops": 2}, dense, "n_loops"),
        ({"exit_rule": "gate"}, dense, "exit_rule"),
        ({"n_loops": 9}, unknown, "n_loops"),
        ({"exit_rule": "gate"}, {**FACTS, "gate_threshold": None}, "exit_rule"),
        ({"exit_rule": "gate"}, {**FACTS, "rules": ["none", "change"]}, "exit_rule"),
    ):
        with pytest.raises(ApiError) as caught:
            POLICY.resolve(completion(**fields), facts)
        assert caught.value.param == param
    loose = DepthPolicy(allow_unvalidated=True, most=10)
    for facts in (FACTS, {**FACTS, "max_loops": 10}):
        with pytest.raises(ApiError, match="at most 10 loops"):
            loose.resolve(completion(n_loops=11), facts)


def test_the_default_rule_of_a_server() -> None:
    for rule in ("none", "gate", "fixed:3"):
        check_default(rule)
    for rule in ("kl", "stable", "other", "gate:2"):
        with pytest.raises(ConfigError):
            check_default(rule)
