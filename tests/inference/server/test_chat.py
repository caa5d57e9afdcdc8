"""Chats to ids: special tokens come from the template alone, and templates have limits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from open_mythos.errors import DataError
from open_mythos.inference.server.chat import MOST_TEMPLATE_BYTES, ChatTemplate, read_template
from open_mythos.inference.server.chat_worker import environment, render
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

BYTES = ByteTokenizer()
SIMPLE = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}>"
SECONDS = 20.0


async def tokens_of(template: ChatTemplate, messages: list[dict[str, str]]) -> list[int]:
    return template.ids(await template.render(messages))


def encode(
    source: str, *contents: str, tok: Tokenizer = BYTES, role: str = "user", **options: Any
) -> list[int]:
    async def run() -> list[int]:
        template = ChatTemplate(source, tok, **{"seconds": SECONDS, **options})
        try:
            return await tokens_of(template, [{"role": role, "content": text} for text in contents])
        finally:
            await template.close()

    return asyncio.run(run())


def test_special_tokens_of_the_template() -> None:
    assert encode(SIMPLE, "a", "b") == [256, 97, 257, 256, 98, 257, 62]


def test_special_tokens_in_a_message_are_text() -> None:
    bpe = BPETokenizer.train(["hello <|eos|>"], 270)
    for tok in (BYTES, bpe):
        text = "<|eos|> x<|bos|><|pad|>y <|eos|>"
        ids = encode(SIMPLE, text, tok=tok)
        assert ids == [tok.bos_id, *tok.encode(text), tok.eos_id, *tok.encode(">")]
        assert tok.decode(ids) == text + ">"


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        ("<|{{ messages[0].content }}|>", ["eos"]),
        ("<|{{ messages[0].content }}", ["eos|>"]),
        ("<|{{ messages[0].content | trim }}", ["  eos|>  "]),
        ("{{ messages[0].content }}{{ messages[1].content }}", ["<|e", "os|>"]),
        ("{{ messages[0].content | trim }}|>", ["<|eos "]),
        ("{{ messages[0].content | upper | lower }}", ["<|eos|>"]),
        ("{{ messages | tojson }}", ["<|eos|>"]),
    ],
)
def test_no_message_makes_a_special_token(source: str, contents: list[str]) -> None:
    ids = encode(source, *contents)
    assert not {256, 257, 258} & set(ids)
    assert "\ue000" not in BYTES.decode(ids)


@settings(max_examples=30)
@given(st.lists(st.text("<|eosbpad> \n"), min_size=1, max_size=4))
def test_text_of_messages_is_kept(contents: list[str]) -> None:
    template = ChatTemplate("", BYTES)
    guarded = [template._guard(text) for text in contents]
    assert template.ids("".join(guarded)) == BYTES.encode("".join(contents))


def test_control_structures_and_white_space() -> None:
    source = (
        "{%- for m in messages -%}\n  {%- if loop.first %}{% continue %}{% endif %}\n"
        "{{ m.role }}\n{%- endfor %}"
    )
    assert BYTES.decode(encode(source, "a", "b")) == "user"
    assert BYTES.decode(encode("{{ messages | tojson }}", "<é>")) == (
        '[{"role": "user", "content": "<é>"}]'
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages[0].nothing.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ 'x' * 3 * 10**9 }}", "too much memory"),
    ],
)
def test_what_a_template_cannot_do(source: str, message: str) -> None:
    with pytest.raises(DataError, match="the chat template refuses") as caught:
        encode(source, "x")
    assert message in str(caught.value)


def test_templates_that_are_not_valid() -> None:
    with pytest.raises(DataError, match="not valid"):
        encode("{% for %}", "x")


def test_the_longest_text() -> None:
    assert len(encode("{{ 'x' * 100 }}", "a", most_bytes=100)) == 100
    for source in ("{{ 'x' * 101 }}", "{% for i in range(101) %}x{% endfor %}", "{{ 'é' * 51 }}"):
        with pytest.raises(DataError) as caught:
            encode(source, "a", most_bytes=100)
        assert "longer than 100 bytes" in str(caught.value)


def test_a_template_that_takes_long_is_ended_and_the_next_chat_served() -> None:
    slow = (
        "{% if messages[0].content == 'slow' %}"
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
        "{% endif %}{{ messages[0].content }}"
    )

    async def run() -> None:
        template = ChatTemplate(slow, BYTES, seconds=0.3)
        user = {"role": "user"}
        assert await tokens_of(template, [{**user, "content": "a"}]) == [97]
        with pytest.raises(DataError) as caught:
            await tokens_of(template, [{**user, "content": "slow"}])
        assert "too long" in str(caught.value)
        assert await tokens_of(template, [{**user, "content": "b"}]) == [98]
        waiting = asyncio.create_task(tokens_of(template, [{**user, "content": "c"}]))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert await tokens_of(template, [{**user, "content": "d"}]) == [100], "not the answer to c"
        both = [tokens_of(template, [{**user, "content": each}]) for each in "ef"]
        assert await asyncio.gather(*both) == [[101], [102]]
        await template.close()

    asyncio.run(run())


def test_rendering_in_this_process() -> None:
    """The functions that the worker runs."""
    template = environment().from_string("{{ 'é' * 2 }}")
    assert render(template, {}, 4) == "éé"
    with pytest.raises(ValueError, match="longer"):
        render(template, {}, 3)
    with pytest.raises(TemplateError, match="x"):
        environment().from_string("{{ raise_exception('x') }}").render()


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("é")
    assert read_template(file) == "é"
    file.write_bytes(b"x" * MOST_TEMPLATE_BYTES)
    assert len(read_template(file)) == MOST_TEMPLATE_BYTES
    file.write_bytes(b"x" * (MOST_TEMPLATE_BYTES + 1))
    with pytest.raises(DataError):
        read_template(file)
    file.write_bytes(b"\xff")
    for path in (file, tmp_path / "nowhere", tmp_path):
        with pytest.raises(DataError):
            read_template(path)


def test_an_empty_message_stays_empty() -> None:
    assert encode("{% if messages[0].content %}x{% endif %}y", "") == [121]
