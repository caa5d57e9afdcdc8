"""The official client, unmodified, against the server."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.inference.server.running import Running


@pytest.fixture
def client(shared: Running) -> openai.OpenAI:
    return shared.openai()


def asked(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "temperature": 0, **more}


USER_X = [{"role": "user", "content": "x"}]


def test_completion(client: openai.OpenAI) -> None:
    done = client.completions.create(**asked(prompt="hello ", max_tokens=8))
    choice = done.choices[0]
    assert (choice.text, choice.finish_reason) == ("hello he", "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 8)
    assert done.usage.completion_tokens_details.model_dump()["loops"] == 8 * 8
    assert done.usage.prompt_tokens_details.cached_tokens == 3
    assert done.system_fingerprint == "ab" * 8 + "-exact"


def test_stream_equals_the_whole(client: openai.OpenAI) -> None:
    fields = asked(prompt="naïve € ", max_tokens=20)
    whole = client.completions.create(**fields)
    usage = {"include_usage": True}
    chunks = list(client.completions.create(**fields, stream=True, stream_options=usage))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_chat(client: openai.OpenAI) -> None:
    fields = asked(messages=USER_X)
    whole = client.chat.completions.create(**fields, max_tokens=9)
    assert whole.choices[0].message.content == "user: x\n"  # bos has no text
    chunks = list(client.chat.completions.create(**fields, max_completion_tokens=9, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "user: x\n"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_chat_runs_to_the_end_of_the_context(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(**asked(messages=USER_X))
    assert done.usage.total_tokens == 256


def test_choices_and_seeds(client: openai.OpenAI) -> None:
    fields = asked(prompt="abcdefgh", max_tokens=12, n=3, temperature=1)
    first = client.completions.create(**fields, seed=5)
    again = client.completions.create(**fields, seed=5)
    other = client.completions.create(**fields, seed=6)
    texts = [c.text for c in first.choices]
    assert texts == [c.text for c in again.choices]
    assert texts != [c.text for c in other.choices]
    assert len(set(texts)) == 3
    assert first.usage.prompt_tokens == 8, "a prompt counts once"
    drawn = client.completions.create(**fields)
    repeated = client.completions.create(**fields, seed=drawn.model_dump()["seed"])
    assert [c.text for c in drawn.choices] == [c.text for c in repeated.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_across_tokens(client: openai.OpenAI, stream: bool) -> None:
    fields = asked(prompt="the cat sat. ", max_tokens=40, stop=["sat", "t. t"])
    done = client.completions.create(**fields, stream=stream)
    chunks = list(done) if stream else [done]
    assert "".join(c.choices[0].text for c in chunks) == "the cat "
    last = chunks[-1].choices[0]
    assert (last.finish_reason, last.model_dump()["stop_reason"]) == ("stop", "sat")
    if not stream:
        assert done.usage.completion_tokens == 11, "up to the token that completes the stop string"


def test_an_end_token_stops(client: openai.OpenAI) -> None:
    done = client.completions.create(**asked(prompt=[97, 257, 98], max_tokens=9))
    choice = done.choices[0]
    assert (choice.text, choice.finish_reason) == ("a", "stop")
    assert choice.model_dump()["stop_reason"] == 257
    assert done.usage.completion_tokens == 2


def test_logprobs(client: openai.OpenAI) -> None:
    done = client.completions.create(**asked(prompt="ab", max_tokens=3, logprobs=2))
    found = done.choices[0].logprobs
    assert found.tokens == ["a", "b", "a"]
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    fields = asked(messages=USER_X, max_tokens=3, logprobs=True, top_logprobs=1)
    entry = client.chat.completions.create(**fields).choices[0].logprobs.content[1]
    assert (entry.token, entry.bytes, entry.logprob) == ("u", [117], -0.5)
    assert entry.top_logprobs[0].token == "u"


def test_streamed_logprobs_belong_to_the_text(client: openai.OpenAI) -> None:
    fields = asked(prompt="a€b", max_tokens=9, logprobs=0)
    whole = client.completions.create(**fields).choices[0]
    chunks = [c.choices[0] for c in client.completions.create(**fields, stream=True)]
    assert [token for c in chunks for token in c.logprobs.tokens] == whole.logprobs.tokens
    assert [at for c in chunks for at in c.logprobs.text_offset] == whole.logprobs.text_offset
    at = 0
    for chunk in chunks:
        assert all(at <= offset <= at + len(chunk.text) for offset in chunk.logprobs.text_offset)
        at += len(chunk.text)


def test_lists_of_prompts(client: openai.OpenAI) -> None:
    fields = asked(max_tokens=2)
    texts = client.completions.create(**fields, prompt=["ab", "cd"], n=2)
    assert [(c.index, c.text) for c in texts.choices] == [
        (0, "ab"), (1, "ab"), (2, "cd"), (3, "cd"),
    ]  # fmt: skip
    assert client.completions.create(**fields, prompt=[104, 105]).choices[0].text == "hi"
    lists = client.completions.create(**fields, prompt=[[97], [98]])
    assert [c.text for c in lists.choices] == ["aa", "bb"]


def test_echo(client: openai.OpenAI) -> None:
    fields = asked(prompt="ab", echo=True)
    done = client.completions.create(**fields, max_tokens=2)
    assert done.choices[0].text == "abab"
    scored = client.completions.create(**fields, max_tokens=1, logprobs=1).choices[0]
    assert scored.text == "aba"
    assert scored.logprobs.token_logprobs == [None, -1.0, -0.5]
    assert scored.logprobs.text_offset == [0, 1, 2]
    only = client.completions.create(**fields, max_tokens=0, logprobs=0)
    assert (only.choices[0].text, only.usage.completion_tokens) == ("ab", 0)
    streamed = client.completions.create(**fields, max_tokens=2, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == "abab"


def test_depth(client: openai.OpenAI) -> None:
    def loops(**depth: object) -> list[int]:
        extra = {"return_loops": True, "return_token_ids": True, **depth}
        fields = asked(prompt="ab", max_tokens=4, extra_body=extra)
        done = client.completions.create(**fields)
        choice = done.choices[0].model_dump()
        assert choice["token_ids"] == [97, 98, 97, 98]
        assert sum(choice["loops"]) == done.usage.completion_tokens_details.model_dump()["loops"]
        return choice["loops"]

    assert loops() == [8] * 4
    assert loops(n_loops=3) == [3] * 4
    assert loops(max_loops=5) == [5] * 4
    assert loops(exit_rule="fixed:4") == [4] * 4
    assert loops(exit_rule="gate:0.9", max_loops=3) == [1, 2, 3, 1]
    assert loops(exit_rule="change", max_loops=4, min_loops=3) == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"max_tokens": 300}, openai.BadRequestError, "max_tokens"),
        ({"extra_body": {"tools": []}}, openai.BadRequestError, "tools"),
        ({"extra_body": {"n_loops": 2.5}}, openai.BadRequestError, "n_loops"),
    ],
)
def test_errors(client: openai.OpenAI, change: dict, kind: type, param: str) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**asked(prompt="a", **change) | change)
    assert caught.value.param == param


def test_models(client: openai.OpenAI) -> None:
    model = client.models.list().data[0]
    assert model.id == "toy"
    assert model.model_dump()["validated_depth"] == [2, 12]
    assert model.model_dump()["exit_rules"] == ["none", "gate", "change", "acceleration"]
