"""Byte-level byte-pair encoding, trained on texts."""

from __future__ import annotations

from collections.abc import Iterable

from open_mythos.checks import check_count
from open_mythos.tokenizer.interface import SPECIALS, checked_text
from open_mythos.tokenizer.rust_backed import RustBacked

# Contractions, words, numbers of at most three digits, punctuation, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class BPETokenizer(RustBacked):
    """Byte-level byte-pair encoding: every string round-trips exactly."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Train on ``texts``; the same texts result in the same tokenizer.

        Args:
            texts: Any number of strings.
            vocab_size: Number of ids including special tokens, at least 256 bytes + 3 special
                tokens; little text results in fewer.

        Raises:
            ConfigError: ``vocab_size`` is too small.
            DataError: A text is not a string or holds a lone surrogate.
        """
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as RustTokenizer

        check_count("vocab_size", vocab_size, 256 + len(SPECIALS))
        rust = RustTokenizer(models.BPE())
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
        rust.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rust.train_from_iterator(map(checked_text, texts), trainer)
        return cls(rust, f"bpe-{rust.get_vocab_size()}", SPECIALS)
