"""Text of a stream of tokens: characters, stop strings, and the tokens that belong to each."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from open_mythos.inference.request import Token
from open_mythos.inference.text import Piece, TextStream, begun, token_texts
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer

BYTES = ByteTokenizer()
SAMPLE = ["the cat sat on the mat; naïve Straße 東京 👩‍🔬 " * 4, "abababab cababa" * 3]


def tokens(ids: list[int]) -> list[Token]:
    return [Token("r", token, i + 1, -0.5, ()) for i, token in enumerate(ids)]


def run(stream: TextStream, ids: list[int]) -> list[Piece]:
    """Pieces until the stop string or the end, as a server makes them."""
    pieces = []
    for token in tokens(ids):
        pieces.append(stream.push(token))
        if stream.stopped_by is not None:
            return pieces
    return [*pieces, stream.finish()]


def joined(pieces: list[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole.join(piece)
    return whole


@cache
def small_bpe() -> BPETokenizer:
    return BPETokenizer.train(SAMPLE, 290)


@given(st.text(max_size=30))
def test_all_text_and_all_tokens_arrive_once(text: str) -> None:
    ids = BYTES.encode(text)
    whole = joined(run(TextStream(BYTES), ids))
    assert whole.text == text
    assert [each.loops for each in whole.tokens] == list(range(1, len(ids) + 1))


@given(st.lists(st.integers(0, 319), max_size=12))
def test_invalid_bytes_and_special_tokens(ids: list[int]) -> None:
    whole = joined(run(TextStream(BYTES), ids))
    assert whole.text == BYTES.decode(ids)
    assert [each.token for each in whole.tokens] == ids


@given(
    st.text("abc€", max_size=25),
    st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_ends_the_text_where_it_first_completes(text: str, stops: list[str]) -> None:
    """Against searching the whole text after each token."""
    for tok in (BYTES, small_bpe()):
        ids = tok.encode(text)
        stream = TextStream(tok, stops)
        whole = joined(run(stream, ids))
        for n in range(len(ids) + 1):
            seen = tok.decode(ids[:n]).rstrip("\ufffd")
            cuts = [seen.find(stop) for stop in stops if stop in seen]
            if cuts:
                assert whole.text == seen[: min(cuts)]
                assert len(whole.tokens) == n
                assert stream.stopped_by in stops
                break
        else:
            assert whole.text == text
            assert stream.stopped_by is None
            assert len(whole.tokens) == len(ids)


def test_only_what_may_become_a_stop_string_is_held() -> None:
    stream = TextStream(BYTES, ["abab!"])
    shown = [piece.text for piece in run(stream, BYTES.encode("xababab!y"))]
    assert shown == ["x", "", "", "", "", "ab", "", ""]
    assert stream.stopped_by == "abab!"


def test_tokens_wait_for_their_text() -> None:
    stream = TextStream(BYTES)
    pieces = run(stream, BYTES.encode("a€b"))
    assert [(p.text, len(p.tokens)) for p in pieces] == [
        ("a", 1), ("", 0), ("", 0), ("€", 3), ("b", 1), ("", 0),
    ]  # fmt: skip
    held = TextStream(small_bpe(), ["the mat"])
    for piece in run(held, small_bpe().encode("on the cat")):
        assert bool(piece.tokens) <= bool(piece.text), "a token never runs ahead of its text"


def test_nothing_comes_after_a_stop_string() -> None:
    stream = TextStream(BYTES, ["b"])
    run(stream, BYTES.encode("ab"))
    assert not stream.push(tokens([99])[0])
    assert not stream.finish()


@pytest.mark.parametrize(
    ("text", "stop", "length"),
    [("xab", "abc", 2), ("xabc", "abc", 0), ("aa", "aab", 2), ("aaa", "aab", 2), ("", "a", 0)],
)
def test_begun(text: str, stop: str, length: int) -> None:
    assert begun(text, stop) == length


@given(st.text(max_size=20))
def test_texts_of_tokens(text: str) -> None:
    texts, offsets = token_texts(BYTES, BYTES.encode(text))
    assert "".join(texts) == text
    assert offsets == [len("".join(texts[:i])) for i in range(len(texts))]
