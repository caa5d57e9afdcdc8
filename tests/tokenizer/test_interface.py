"""The interface of every tokenizer: round trips, special ids, rejected input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import small_model
from hypothesis import given, settings

from open_mythos import save_pretrained
from open_mythos.errors import DataError
from open_mythos.hub.places import stored_tokenizer, tokenizer_of_model
from open_mythos.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from tokenizer.samples import BYTE, CORPUS, both, texts


@both
@settings(deadline=None)
@given(text=texts)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)


@both
@pytest.mark.parametrize(
    "text", ["<|bos|><|eos|>", "a<|pad|>b", "\r\n\t ", "\x00", "\ufffd", "👩‍🔬"]
)
def test_special_names_and_odd_characters_are_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_id not in tokenizer.encode(text)


@both
def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    batch = [*CORPUS, "", "é<|eos|>"]
    assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@both
def test_the_interface(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert len(set(specials)) == 3
    assert max(specials) < len(tokenizer) <= tokenizer.vocab_size
    assert tokenizer.vocab_size % 64 == 0
    assert tokenizer.vocab_size - len(tokenizer) < 64
    assert tokenizer.decode([*specials, *tokenizer.encode("x"), tokenizer.vocab_size - 1]) == "x"


@both
def test_ids_may_be_arrays_or_tensors(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode(np.array(ids)) == "the cat"
    assert tokenizer.decode(torch.tensor(ids)) == "the cat"
    assert tokenizer.decode(iter(torch.tensor(ids))) == "the cat"


@both
@pytest.mark.parametrize("ids", [[-1], [1 << 40], [1.5], ["a"], [[1]], torch.zeros(1, 2), 3])
def test_invalid_ids_are_rejected(tokenizer: Tokenizer, ids: object) -> None:
    with pytest.raises(DataError, match="token id"):
        tokenizer.decode(ids)
    with pytest.raises(DataError, match="token id"):
        tokenizer.decode([tokenizer.vocab_size])


@both
def test_the_padding_of_a_model_has_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A model may have more ids than its tokenizer, even rounded up to 64."""
    size = tokenizer.vocab_size + 100
    save_pretrained(small_model(vocab_size=size), tmp_path)
    tokenizer.save(tmp_path / "tokenizer")
    stored = stored_tokenizer(tmp_path)
    ids = [*stored.encode("x"), len(stored), size - 1]
    assert stored.decode(ids) == "x"
    stream = StreamDecoder(stored)
    assert "".join(map(stream.push, ids)) + stream.flush() == "x"
    with pytest.raises(DataError, match="token id"):
        stored.decode([size])
    assert stored.fingerprint == tokenizer.fingerprint
    fresh = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer_of_model(fresh, str(tmp_path), "--tokenizer").vocab_size == size


@both
@pytest.mark.parametrize("text", ["ok \ud800", None, b"bytes", 7])
def test_invalid_text_is_rejected(tokenizer: Tokenizer, text: object) -> None:
    with pytest.raises(DataError, match=r"surrogate|not a string"):
        tokenizer.encode(text)
    with pytest.raises(DataError, match=r"surrogate|not a string"):
        tokenizer.encode_batch(["fine", text])


def test_a_lone_surrogate_is_located() -> None:
    with pytest.raises(DataError, match="character 3"):
        BYTE.encode("ok \ud800")
