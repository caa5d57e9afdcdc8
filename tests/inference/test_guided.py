"""Answers that follow a JSON schema: from random models, whose own text would never be JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from helpers import small_model

from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.engine import Engine
from open_mythos.inference.guided import NO_TOKEN_FITS, Guides
from open_mythos.inference.offline import Completion
from open_mythos.inference.oracle import bits, play, random_request, small_engine
from open_mythos.inference.request import Outcome, Request
from open_mythos.model.causal_lm import CausalLM
from open_mythos.ops.sampling import SamplingParams
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema_rs")

WORD = {"type": "string", "maxLength": 3}
SMALL = {"type": "integer", "minimum": -3, "maximum": 12}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    SMALL,
    WORD,
    {"enum": ["red", "grün", 7, None]},
    {"const": {"kind": ["a", 1]}},
    {"type": "string", "pattern": "^[a-f]{2}-[0-9]{3}$"},
    {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [SMALL, WORD], "items": False, "minItems": 2},
    {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"const": 1}, "maxItems": 2}]},
    {
        "type": "object", "required": ["name", "age"], "additionalProperties": False,
        "properties": {"name": WORD, "age": SMALL, "alive": {"type": "boolean"}},
    },
    {
        "type": "object", "required": ["tree"], "additionalProperties": False,
        "properties": {"tree": {"$ref": "#/$defs/node"}},
        "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 1}},
    },
]  # fmt: skip
MOST = 220


def bpe() -> Tokenizer:
    return BPETokenizer.train(['{"name": "red", "age": 12, "tree": [[]]}, [1, 2]'] * 9, 300)


@pytest.fixture(scope="module", params=[ByteTokenizer, bpe], ids=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.param()


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> CausalLM:
    return small_model("mla", vocab_size=tokenizer.vocab_size, max_seq_len=256)


def ask(id: str, schema: Any, tokenizer: Tokenizer, **more: Any) -> Request:
    values = {
        "max_tokens": MOST, "ends": (tokenizer.eos_id,), "key": 5, "max_loops": 2, "logprobs": 1,
        "schema": schema if isinstance(schema, str) else json.dumps(schema), **more,
    }  # fmt: skip
    return Request(id, (104, 105, 106), **values)


def requests_of_all(tokenizer: Tokenizer, temperatures: tuple[float, ...]) -> list[Request]:
    return [
        ask(f"{i} at {temperature}", schema, tokenizer, temperature=temperature, key=i)
        for i, schema in enumerate(SCHEMAS)
        for temperature in temperatures
    ]


def run(model: CausalLM, tokenizer: Tokenizer, *requests: Request) -> dict[str, Completion]:
    engine = small_engine(model, tokenizer=tokenizer, slots=16)
    return play(engine, {0: requests})


def text_of(done: Completion, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(done.tokens)


def test_answers_fit_their_schemas(model, tokenizer):
    requests = requests_of_all(tokenizer, (0.0, 1.9))
    ended = 0
    for request, done in zip(requests, run(model, tokenizer, *requests).values(), strict=True):
        assert request.schema is not None
        if done.outcome is Outcome.LENGTH:
            assert len(done.tokens) == MOST
            continue
        assert done.outcome is Outcome.STOP, done.error
        value = json.loads(text_of(done, tokenizer))
        assert jsonschema.is_valid(json.loads(request.schema), value), (request.schema, value)
        ended += 1
    assert ended >= len(requests) - 4, "bounded texts end, but for one that repeats itself"


def test_other_rows_keep_their_bits(model, tokenizer):
    """With guided rows beside them, in their tiles and edges; and guided rows alone or not."""
    draw = Random(1)
    plain = [random_request(draw, f"plain {i}", model) for i in range(12)]
    guided = requests_of_all(tokenizer, (1.0,))
    alone = play(small_engine(model, slots=16), {0: plain}) | run(model, tokenizer, guided[10])
    together = play(
        small_engine(model, tokenizer=tokenizer, slots=16), {0: plain[:6] + guided, 3: plain[6:]}
    )
    for id, done in alone.items():
        assert bits(done) == bits(together[id]), id


def test_taken_out_and_back(model, tokenizer):
    request = ask("a", SCHEMAS[10], tokenizer, temperature=1.0)
    expected = run(model, tokenizer, request)["a"]
    engine = small_engine(model, tokenizer=tokenizer, overcommit=True)
    taken_out = play(engine, {0: [request]}, preempts={tick: ["a"] for tick in range(2, 60, 5)})
    assert engine.stats()["preemptions"] > 3
    assert bits(taken_out["a"]) == bits(expected)


def test_cut_by_max_tokens(model, tokenizer):
    done = run(model, tokenizer, ask("a", SCHEMAS[10], tokenizer, max_tokens=4))["a"]
    assert (done.outcome, len(done.tokens)) == (Outcome.LENGTH, 4)
    assert text_of(done, tokenizer).startswith("{")


def test_only_ends_of_the_request_end_it(model, tokenizer):
    """The tokenizer's own end token is none of them, whatever the bias."""
    bias = ((tokenizer.eos_id, 1e30),)
    request = ask("a", SCHEMAS[7], tokenizer, ends=(tokenizer.pad_id,), logit_bias=bias)
    done = run(model, tokenizer, request)["a"]
    assert done.outcome is Outcome.STOP
    assert done.tokens[-1] == tokenizer.pad_id
    assert tokenizer.eos_id not in done.tokens
    assert jsonschema.is_valid(SCHEMAS[7], json.loads(text_of(done, tokenizer)))


def test_biases_go_with_masks(model, tokenizer):
    (true,), (f,) = tokenizer.encode("t"), tokenizer.encode("f")
    for token, other in ((true, f), (f, true)):
        bias = ((token, 1e30), (other, -50.0), (0, 1e30))
        request = ask("a", SCHEMAS[0], tokenizer, logit_bias=bias, max_tokens=1)
        done = run(model, tokenizer, request)["a"]
        assert text_of(done, tokenizer)[0] == tokenizer.decode([token])


def test_no_mask_outlives_its_request(model, tokenizer):
    """The slot's next request is one with a bias, which reads the same buffer."""
    engine = small_engine(model, tokenizer=tokenizer, slots=1)
    after = replace(ask("b", "", tokenizer, logit_bias=((1, 0.5),), max_tokens=5), schema=None)
    expected = play(small_engine(model, slots=1), {0: [after]})["b"]
    done = play(engine, {0: [ask("a", SCHEMAS[0], tokenizer), after]})
    assert bits(done["b"]) == bits(expected)
    assert not engine._guides._guides


def test_offline(model, tokenizer):
    params = SamplingParams(40, temperature=1.0, seed=3, eos_token_id=tokenizer.eos_id)
    schema = json.dumps(SCHEMAS[7])
    engine = Engine(model, slots=4, tokenizer=tokenizer)
    for done in engine.generate(["ab", "c"], params, tokenizer=tokenizer, schema=schema):
        assert jsonschema.is_valid(SCHEMAS[7], json.loads(done.text or ""))


@pytest.mark.parametrize(
    ("changes", "options", "text"),
    [
        ({"schema": '{"type": "nonsense"}'}, {}, "nonsense"),
        ({"schema": "[1"}, {}, "JSON"),
        ({"ends": ()}, {}, "no end token"),
        ({}, {"tokenizer": None}, "without a tokenizer"),
        ({}, {"constant_shapes": True}, "constant_shapes=False"),
    ],
)
def test_what_is_refused(model, tokenizer, changes, options, text):
    engine = Engine(model, **{"slots": 2, "tokenizer": tokenizer, **options})
    with pytest.raises(ConfigError, match=text) as caught:
        engine.add(replace(ask("a", SCHEMAS[0], tokenizer), **changes))
    assert caught.value.where == "schema"
    assert not engine.busy


def test_other_tokenizers_are_refused(model):
    class Words:
        eos_id = 0

    with pytest.raises(ConfigError, match="Words"):
        Guides(Words(), 61, True).make(Request("a", (1,), 1, ends=(0,), schema="{}"))  # type: ignore[arg-type]


def test_without_the_package(model, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(EnvironmentError_, match="guided"):
        Engine(model, slots=2, tokenizer=tokenizer).add(ask("a", SCHEMAS[0], tokenizer))


def test_a_text_that_cannot_go_on(model, tokenizer):
    """A model whose vocabulary ends before the letter that must follow."""
    if not isinstance(tokenizer, ByteTokenizer):
        pytest.skip("ids of bytes")
    small = small_model("mla", vocab_size=120, max_seq_len=256)
    end = tokenizer.encode("!")[0]
    request = ask("a", {"enum": ["ay", "by"]}, tokenizer, ends=(end,), logprobs=None)
    done = run(small, tokenizer, request, replace(request, id="b", schema=None, max_tokens=3))
    assert (done["a"].outcome, done["a"].error) == (Outcome.FAILED, NO_TOKEN_FITS)
    assert text_of(done["a"], tokenizer) in ('"a', '"b')
    assert len(done["b"].tokens) == 3
    with pytest.raises(ConfigError, match="no token can begin"):
        run(small, tokenizer, ask("a", {"type": "object"}, tokenizer, ends=(end,)))
