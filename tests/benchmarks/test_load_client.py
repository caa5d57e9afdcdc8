"""The load client's arrivals, times and percentiles, against a server in the same process."""

import json
import math

import httpx
import pytest

from benchmarks import load_client
from benchmarks.load_client import Load, Sample, closed, percentile, poisson

BODY = {"prompt": [1, 2], "max_tokens": 2, "stream": True}


def stream(*events: dict, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}" for event in events] + ["data: [DONE]"] * done
    return "".join(f"{line}\n\n" for line in [": ping", *lines]).encode()


@pytest.fixture
def served(monkeypatch):
    """Answers of the server, in order; the last one repeats."""
    answers: list[httpx.Response] = []

    def answer(request: httpx.Request) -> httpx.Response:
        assert json.loads(request.content) == BODY
        return answers.pop(0) if len(answers) > 1 else answers[0]

    real = httpx.AsyncClient
    monkeypatch.setattr(
        load_client.httpx, "AsyncClient",
        lambda **options: real(transport=httpx.MockTransport(answer), **options),
    )  # fmt: skip
    return answers


def token(*ids: int) -> dict:
    return {"choices": [{"index": 0, "token_ids": list(ids)}]}


def test_a_stream_is_followed_to_its_end(served):
    usage = {"choices": [], "usage": {"completion_tokens": 2}}
    served += [httpx.Response(200, content=stream(token(5), token(6), usage))]
    load = closed("http://test", [BODY] * 3, streams=2)
    assert len(load.served) == 3
    assert [len(sample.times) for sample in load.samples] == [2, 2, 2]
    assert load.numbers()["served"] == 3
    assert load.tokens_per_second == pytest.approx(6 / load.seconds)


def test_refusals_and_broken_streams_are_not_served(served):
    served += [
        httpx.Response(429, headers={"Retry-After": "7"}, content=b"{}"),
        httpx.Response(200, content=stream(token(5), done=False)),
    ]
    load = poisson("http://test", [BODY] * 2, rate=1e4, seed=1)
    assert load.served == []
    assert [sample.retry_after for sample in load.of_status(429)] == ["7"]
    assert load.numbers()["refused"] == 1
    assert load.goodput == 0


def test_late_tokens_are_not_good():
    in_time = Sample(0.0, 200, 1.0, [0.5, 0.6], complete=True)
    assert in_time.good
    assert not Sample(0.0, 200, 4.0, [3.0, 3.1], complete=True).good
    assert not Sample(0.0, 200, 1.0, [0.5, 0.9], complete=True).good
    assert Load([in_time]).numbers()["ITL p50"] == pytest.approx(0.1)


def test_percentiles():
    assert [percentile(range(1, 101), p) for p in (50, 99, 100)] == [50, 99, 100]
    assert percentile([3.0], 99) == 3.0
    assert math.isnan(percentile([], 50))
