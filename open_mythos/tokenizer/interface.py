"""What the library asks of a tokenizer, and the checks of text and ids that all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Protocol, runtime_checkable

from open_mythos.errors import DataError

SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}


@runtime_checkable
class Tokenizer(Protocol):
    """What the library asks of a tokenizer."""

    @property
    def name(self) -> str:
        """What ``load_tokenizer`` was called with, or a description."""

    @property
    def bos_id(self) -> int:
        """The id that begins a sequence."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    @property
    def pad_id(self) -> int:
        """The id that fills a batch up."""

    @property
    def vocab_size(self) -> int:
        """``len(self)`` rounded up to a multiple of 64: the vocabulary of a model."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits; equal for two tokenizers that give the same ids."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos or eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ``ids``; special and padding ids are dropped."""

    def save(self, directory: str | Path) -> None:
        """Write files that ``load_tokenizer(directory)`` reads back."""


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of ``text``, or raise a :class:`DataError` if there are none."""
    if not isinstance(text, str):
        raise DataError("a tokenizer encodes strings", where="text", value=text, allowed="str")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds a lone surrogate, which no UTF-8 can express",
            where=f"text, character {error.start}",
            value=text[error.start],
            fix="drop it: text.encode(errors='replace').decode()",
        ) from error


def id_list(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Convert ``ids`` (a list, an array, a 1-D tensor) to integers, each below ``vocab_size``."""
    allowed = f"a flat sequence of integers in 0..{vocab_size - 1}"
    try:
        plain = [index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise DataError("not token ids", where="ids", value=ids, allowed=allowed) from error
    for position, token_id in enumerate(plain):
        if not 0 <= token_id < vocab_size:
            raise DataError(
                "not a token id", where=f"ids[{position}]", value=token_id, allowed=allowed
            )
    return plain
