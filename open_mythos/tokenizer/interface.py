"""The interface of a tokenizer, and checks of text and ids that all tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from open_mythos.errors import DataError

SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}


@runtime_checkable
class Detokenizer(Protocol):
    """The part of a tokenizer that stop strings require."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``."""


@runtime_checkable
class Tokenizer(Protocol):
    """What the library needs of a tokenizer."""

    @property
    def name(self) -> str:
        """The argument of ``load_tokenizer``, or a description."""

    @property
    def bos_id(self) -> int:
        """The id that begins a sequence."""

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""

    @property
    def pad_id(self) -> int:
        """The id that pads a batch."""

    @property
    def vocab_size(self) -> int:
        """``len(self)`` rounded up to a multiple of 64: the vocabulary of a model.

        Of a tokenizer that is stored with a model of more ids, that model's. Ids from ``len(self)``
        on stand for no text.
        """

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that no text is encoded to, bos, eos and pad among them."""

    @property
    def most_token_bytes(self) -> int | None:
        """Most bytes of a text in UTF-8 that one token stands for; None if there is no bound."""

    @property
    def fingerprint(self) -> str:
        """64 hex digits; equal for tokenizers that produce the same ids."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos or eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``[encode(text) for text in texts]``, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ``ids``; special and padding ids are dropped."""

    def save(self, directory: str | Path) -> None:
        """Write files that ``load_tokenizer(directory)`` reads."""


def padded_to(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """Return ``tokenizer``, changed to take all ids of a model: the last of them are padding."""
    if vocab_size > tokenizer.vocab_size:
        own: Any = tokenizer
        own.vocab_size = vocab_size
    return tokenizer


def checked_text(text: Any, where: str = "text") -> str:
    """Return ``text``; raise a DataError unless it is a string without lone surrogates."""
    if not isinstance(text, str):
        raise DataError("the text is not a string", where=where, value=text, allowed="str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "the text holds a lone surrogate, which UTF-8 cannot encode",
            where=f"{where}, character {error.start}", value=text[error.start],
            allowed="text that UTF-8 can encode",
            fix="drop it: text.encode(errors='replace').decode()",
        ) from error  # fmt: skip
    return text


def id_list(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Convert ``ids`` (a list, an array, a 1-D tensor) to integers; check that they are ids."""
    allowed = f"a flat sequence of integers in 0..{vocab_size - 1}"
    try:
        plain = [index(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
    except TypeError as error:
        raise DataError("not token ids", where="ids", value=ids, allowed=allowed) from error
    for place, token in enumerate(plain):
        if not 0 <= token < vocab_size:
            raise DataError("not a token id", where=f"ids[{place}]", value=token, allowed=allowed)
    return plain
