"""UTF-8 bytes as tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from open_mythos.tokenizer.files import write_config
from open_mythos.tokenizer.interface import SPECIALS, checked_text, id_list

if TYPE_CHECKING:
    from open_mythos.tokenizer.rust_backed import RustBacked

_PLAIN = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = tuple(byte for byte in range(256) if byte not in _PLAIN)


class ByteTokenizer:
    """The 256 byte values, then bos, eos and pad; needs neither files nor training."""

    name = "byte"
    bos_id, eos_id, pad_id = 256, 257, 258
    vocab_size = 320
    most_token_bytes = 1
    fingerprint = hashlib.sha256(b"open-mythos byte tokenizer 1").hexdigest()

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of bos, eos and pad."""
        return {token: getattr(self, f"{role}_id") for role, token in SPECIALS.items()}

    def __len__(self) -> int:
        return 259

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of ``text``.

        Raises:
            DataError: ``text`` is not a string, or holds a lone surrogate.
        """
        return list(checked_text(text).encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ``ids``; invalid UTF-8 becomes U+FFFD, ids from 256 on are dropped.

        Raises:
            DataError: An id outside 0..vocab_size - 1.
        """
        return bytes(i for i in id_list(ids, self.vocab_size) if i < 256).decode(errors="replace")

    def to_rust(self) -> RustBacked:
        """Return the same ids as a tokenizer that other libraries read.

        Each byte is a token of a byte-level vocabulary without merges.
        """
        from tokenizers import Tokenizer as RustTokenizer
        from tokenizers import decoders, models, pre_tokenizers

        from open_mythos.tokenizer.rust_backed import RustBacked

        tokens = [_letter(byte) for byte in range(256)] + list(self.special_tokens)
        rust = RustTokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rust.decoder = decoders.ByteLevel()
        return RustBacked(rust, self.name, SPECIALS)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer_config.json``, which names this class."""
        config = {"tokenizer_class": type(self).__name__, "name_or_path": self.name}
        write_config(Path(directory), config)


def _letter(byte: int) -> str:
    """Return the letter that stands for a byte in byte-level vocabularies, as GPT-2 chose it."""
    return chr(byte) if byte in _PLAIN else chr(256 + _OTHERS.index(byte))
