"""Tokenizers that run in the ``tokenizers`` library, among them a trained byte-level BPE."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.checks import check_count, is_int
from open_mythos.errors import ConfigError, DataError
from open_mythos.tokenizer.files import rust_failures, write_config, write_text
from open_mythos.tokenizer.interface import SPECIALS, checked_text, id_list

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

# Contractions, words, numbers of at most three digits, punctuation, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Text of the fingerprint: many scripts, white space, digits, emoji, control characters.
_PROBE = "The quick brown fox,\n\t  it's 31415926 naïve Straße 東京 العربية हिन्दी 👩‍🔬 \x00<|eos|>"

MOST_IDS = 10_000_000
"""Of a vocabulary: above it, training a BPE allocates more than any machine has."""
MOST_LETTERS = 4096
"""Of the spelling of a special token."""


class RustBacked:
    """Base of the tokenizers that run in the ``tokenizers`` library."""

    vocab_size: int = 0
    """Number of ids, rounded up to a multiple of 64."""

    def __init__(self, rust: RustTokenizer, name: str, specials: dict[str, str]) -> None:
        self.name = name
        self._rust = rust
        self._specials: dict[str, str] = {}
        for role in ("eos", "bos", "pad"):  # the first of them keeps a token that two declare
            token = specials.get(role) or SPECIALS[role]
            taken = token in self._specials.values()
            self._specials[role] = SPECIALS[role] if taken else token
        _register(rust, list(self._specials.values()))
        vocabulary = rust.get_vocab(with_added_tokens=True)
        # ids may have gaps, so the length of a vocabulary does not bound them
        self._length = max(len(vocabulary), max(vocabulary.values()) + 1)
        longest = max(map(len, self._specials.values()))
        if self._length > MOST_IDS or longest > MOST_LETTERS:
            raise DataError(
                "no model has such a vocabulary", where=f"tokenizer {name}",
                value=f"{self._length:,} ids, a special token of {longest:,} characters",
                allowed=f"at most {MOST_IDS:,} ids, and {MOST_LETTERS:,} characters",
                fix="use another tokenizer.json; this one was damaged or made to fail",
            )  # fmt: skip
        self.vocab_size = -(-self._length // 64) * 64
        ids = self.bos_id, self.eos_id, self.pad_id = [
            vocabulary[self._specials[role]] for role in ("bos", "eos", "pad")
        ]
        if len(set(ids)) < len(ids):
            raise DataError(
                "bos, eos and pad must differ",
                where=f"tokenizer {name}",
                value=self._specials,
                allowed="three different tokens",
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # pickling drops the setting that text is never read as special tokens
        _register(self._rust, list(self._specials.values()))

    def __len__(self) -> int:
        return self._length

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that no text is encoded to, bos, eos and pad among them."""
        added = self._rust.get_added_tokens_decoder().items()
        return {token.content: id for id, token in added if token.special}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the vocabulary, the special ids and the encoding of a fixed text.

        The layout of the saved file depends on the version of ``tokenizers``, so it is not hashed.
        """
        vocabulary = sorted(self._rust.get_vocab(with_added_tokens=True).items())
        content = [vocabulary, [self.bos_id, self.eos_id, self.pad_id], self.encode(_PROBE)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def most_token_bytes(self) -> int | None:
        """Most bytes of a text in UTF-8 that one token stands for; None if there is no bound.

        Only a byte-level vocabulary that keeps every byte has one: normalizers, removed white
        space and unknown words let a token stand for any number of bytes.
        """
        layout = json.loads(self._rust.to_str())
        before = layout["pre_tokenizer"] or {}
        steps = before.get("pretokenizers", [before])
        vocabulary = self._rust.get_vocab(with_added_tokens=True)
        strips = any(
            (each["lstrip"] or each["rstrip"]) and not each["special"]
            for each in layout["added_tokens"]
        )
        if (
            layout["normalizer"] is not None or layout["model"]["type"] != "BPE" or strips
            or not any(step.get("type") == "ByteLevel" for step in steps)
            or any(step.get("behavior") == "Removed" for step in steps)
            or not all(letter in vocabulary for letter in _byte_letters())
        ):  # fmt: skip
            return None
        # a letter stands for a byte, and in an added token for itself
        return max(len(token.encode()) for token in vocabulary)

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos or eos.

        Raises:
            DataError: ``text`` is not a string, holds a lone surrogate, or a word that is not in
                the vocabulary.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode every text, on all cores."""
        checked = [checked_text(text) for text in texts]
        with rust_failures(
            "the tokenizer cannot encode the text", f"tokenizer {self.name}",
            "words of the vocabulary, which its rules can divide",
            texts[0] if len(texts) == 1 else f"{len(texts)} texts",
        ):  # fmt: skip
            encoded = self._rust.encode_batch_fast(checked, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ``ids``; special and padding ids are dropped.

        Raises:
            DataError: An id outside 0..vocab_size - 1.
        """
        given = id_list(ids, self.vocab_size)
        with rust_failures(
            "the tokenizer cannot decode the ids", f"tokenizer {self.name}", "ids that it can"
        ):
            return self._rust.decode(given, skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``."""
        return self._rust.to_str(pretty=True)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too."""
        config = {f"{role}_token": token for role, token in self._specials.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "name_or_path": self.name}
        write_config(Path(directory), config)
        write_text(Path(directory) / "tokenizer.json", self.to_json())


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
        if is_int(vocab_size) and vocab_size > MOST_IDS:
            raise ConfigError(
                "no vocabulary could be so large", where="vocab_size", value=vocab_size,
                allowed=f"at most {MOST_IDS:,}", fix="choose a smaller one",
            )  # fmt: skip
        if isinstance(texts, str | bytes):  # whose items are letters
            raise ConfigError(
                "one text is not a collection of texts", where="texts", value=texts,
                allowed="an iterable of strings", fix="pass [text]",
            )  # fmt: skip
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


def _byte_letters() -> list[str]:
    """Return the letters that stand for bytes in a byte-level vocabulary."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _register(rust: RustTokenizer, tokens: list[str]) -> None:
    """Make ``tokens`` special, adding new ones, and never read them from text."""
    from tokenizers import AddedToken

    rust.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    rust.encode_special_tokens = True
    # a stored truncation or padding would change the ids of a text
    rust.no_truncation()
    rust.no_padding()
