"""Decoding token by token."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from open_mythos.tokenizer import StreamDecoder, Tokenizer
from open_mythos.tokenizer.rust_backed import RustBacked
from tokenizer.samples import BYTE, both, texts


@both
@settings(deadline=None)
@given(text=texts, cut=st.integers(0, 200))
def test_streaming_equals_decoding_at_once(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = tokenizer.encode(text)[cut:]  # the cut may begin inside a character
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_streaming_holds_a_character_until_it_is_complete() -> None:
    stream = StreamDecoder(BYTE)
    assert [stream.push(i) for i in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert stream.flush() == ""
    assert [stream.push(i) for i in "€".encode()[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert stream.push(0xAC) + stream.flush() == "\ufffd"  # nothing left of the stream before


def test_streaming_keeps_the_spaces_of_sentencepiece_like_decoders() -> None:
    rust = RustTokenizer(models.BPE(vocab={"▁a": 0, "▁b": 1}, merges=[]))
    rust.decoder = decoders.Metaspace()
    tokenizer = RustBacked(rust, "metaspace", {})
    stream = StreamDecoder(tokenizer)
    ids = [tokenizer.bos_id, 0, 1, tokenizer.eos_id, 1]
    assert [stream.push(i) for i in ids] == ["", "a", " b", "", " b"]
    assert stream.flush() == ""
    assert stream.push(1) == "b"  # a new stream


class Chunks:
    """Decodes chunks of bytes that begin and end inside characters, as merged tokens may."""

    chunks = (b"a\xe2", b"\x82", b"\xac\xe2", b"\x82\xacb", b"\xff")

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.chunks[i] for i in ids).decode(errors="replace")


def test_streaming_gives_the_whole_characters_of_a_token_once() -> None:
    stream = StreamDecoder(Chunks())
    assert [stream.push(i) for i in range(5)] == ["a", "", "€", "€b", ""]
    assert stream.flush() == "\ufffd"


@settings(deadline=None)
@given(ids=st.lists(st.sampled_from([0xFF, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41, 257])))
def test_streaming_any_bytes(ids: list[int]) -> None:
    stream = StreamDecoder(BYTE)
    pieces = [stream.push(i) for i in ids * 3]
    assert "".join(pieces) + stream.flush() == BYTE.decode(ids * 3)


def test_endless_bytes_of_no_character_are_not_held() -> None:
    class Counting:
        most = 0

        def decode(self, ids: list[int]) -> str:
            self.most = max(self.most, len(ids))
            return BYTE.decode(ids)

    for endless in ([0xFF], [0x80], [0xE2], [0xF0, 0x9F], [0xFF, 257]):
        counting = Counting()
        stream = StreamDecoder(counting)
        ids = [65, *endless * 200]
        pieces = [stream.push(i) for i in ids]
        assert counting.most < 100
        assert len(BYTE.decode(ids)) - len("".join(pieces)) <= 3
        assert "".join(pieces) + stream.flush() == BYTE.decode(ids)


class Spaced:
    """Decodes as SentencePiece does: "_" is a space, and the first one of a text is dropped."""

    def decode(self, ids: list[int]) -> str:
        return "".join(["_", "_a", "b", "_cd"][i] for i in ids).replace("_", " ").removeprefix(" ")


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 12))
def test_the_space_after_a_prompt_is_kept(ids: list[int], cut: int) -> None:
    tokenizer = Spaced()
    prompt, new = ids[:cut], ids[cut:]
    stream = StreamDecoder(tokenizer, prompt)
    text = "".join([*map(stream.push, new), stream.flush()])
    assert text == tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
