"""Requests and events travel as JSON and come back equal; bad values are refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from open_mythos.errors import ConfigError
from open_mythos.inference.request import (
    Finished,
    Outcome,
    PromptScored,
    Request,
    Started,
    Token,
    event_from_json,
    event_to_json,
)
from tests.inference.simulated import request

EVENTS = [
    Started("a", 64),
    Token("a", 5, 3),
    Token("a", 5, 3, -0.5, ((5, -0.5), (6, -1.5))),
    PromptScored("a", (None, -0.25), ((), ((1, -0.25), (2, -3.0)))),
    Finished("a", Outcome.STOP_STRING),
    Finished("a", Outcome.FAILED, "non-finite logits"),
]


def test_a_request_travels():
    sent = Request(
        "a", (1, 2, 3), 7, temperature=0.5, top_k=4, logit_bias=((3, -1.5), (9, 2.0)),
        ends=(1, 2), max_loops=6, min_loops=2, rule="acceleration", numbers=(0.25, 2.0), logprobs=3,
        salt="s", deadline=12.0, schema="{}",
    )  # fmt: skip
    line = json.dumps(sent.to_json(now=10.0))
    assert json.loads(line)["timeout"] == 2.0
    assert Request.from_json(json.loads(line), now=10.0) == sent
    assert Request.from_json(json.loads(line), now=110.0).deadline == 112.0


def test_unknown_fields_are_refused():
    with pytest.raises(ConfigError, match="tempature"):
        Request.from_json(request("a").to_json() | {"tempature": 1.0})


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_events_travel(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("prompt", (0,), ()),
        ("prompt", ((1 << 63) - 1,), (1 << 63,)),
        ("prompt", (5,), (-1,)),
        ("max_tokens", 1, 0),
        ("temperature", 0.0, -0.1),
        ("temperature", 9.0, float("inf")),
        ("top_p", 1.0, 1.01),
        ("top_p", 0.01, 0.0),
        ("top_k", 0, -1),
        ("min_p", 1.0, 1.1),
        ("repetition_penalty", 0.1, 0.0),
        ("presence_penalty", -2.0, float("nan")),
        ("presence_penalty", 9.0, 1e39),
        ("frequency_penalty", 9.0, -1e39),
        ("temperature", 1e9, 1e39),
        ("logit_bias", ((1, 9.0),), ((1, 1e39),)),
        ("ends", (1, 2, 3, 4), (1, 2, 3, 4, 5)),
        ("min_loops", 4, 5),
        ("max_loops", 4, -1),
        ("max_loops", 4, True),
        ("max_loops", 4, 2.5),
        ("rule", "none", "kl"),
        ("logprobs", 20, 21),
        ("logprobs", 0, -1),
        ("deadline", 0.0, float("nan")),
    ],
)
def test_limits(field, good, bad):
    """At the limit and beyond it."""
    request("a", **{field: good}).validate()
    with pytest.raises(ConfigError, match=field):
        request("a", **{field: bad}).validate()


def test_no_tokens_only_to_score_a_prompt():
    request("a", max_tokens=0, prompt_logprobs=True).validate()


def test_no_torch_is_loaded():
    code = "import sys, open_mythos.inference.scheduler; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
