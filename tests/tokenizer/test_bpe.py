"""Learning byte-pair encodings, and reading them back."""

import pytest

from open_mythos.errors import ConfigError
from open_mythos.tokenizer import BPETokenizer, load_tokenizer
from tokenizer.samples import BPE, CORPUS


def test_bpe_compresses_and_is_reproducible() -> None:
    assert len(BPE.encode(CORPUS[0])) < len(CORPUS[0]) / 2
    assert BPETokenizer.train(iter(CORPUS), 320).fingerprint == BPE.fingerprint
    assert BPETokenizer.train(CORPUS[:1], 320).fingerprint != BPE.fingerprint
    assert len(BPETokenizer.train([], 259)) == 259


def test_one_text_is_no_collection_of_texts() -> None:
    with pytest.raises(ConfigError, match="not a collection"):
        BPETokenizer.train("abc", 300)


@pytest.mark.parametrize("vocab_size", [258, 0, -1, 300.0, "300"])
def test_bpe_needs_room_for_every_byte(vocab_size: object) -> None:
    with pytest.raises(ConfigError, match="259"):
        BPETokenizer.train(CORPUS, vocab_size)


def test_a_saved_bpe_loads_as_bpe_and_in_transformers(tmp_path) -> None:
    from transformers import AutoTokenizer

    BPE.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == BPE.fingerprint
    hf = AutoTokenizer.from_pretrained(tmp_path)
    assert (hf.eos_token_id, hf.pad_token_id) == (BPE.eos_id, BPE.pad_id)
    assert hf.encode("the cat") == BPE.encode("the cat")
