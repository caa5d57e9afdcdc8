"""Tokenizers, and files of tokenizers, that several tests use."""

import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from open_mythos.tokenizer import BPETokenizer, ByteTokenizer

CORPUS = [
    "the cat sat on the mat, the cat sat still\n" * 20,
    "def f(x):\n    return x + 12345\n" * 9,
]
BYTE = ByteTokenizer()
BPE = BPETokenizer.train(CORPUS, 320)
TOKENIZERS = [BYTE, BPE]
texts = st.text(st.characters(exclude_categories=["Cs"]))
both = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte", "bpe"])


def foreign(eos: str | None = None) -> RustTokenizer:
    """A tokenizer.json as others make them: without our special tokens."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=[eos] if eos else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        vocab_size=300,
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    return rust
