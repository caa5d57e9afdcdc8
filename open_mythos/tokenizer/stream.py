"""Incremental decoding of token ids, whole characters at a time."""

from __future__ import annotations

from collections.abc import Sequence

from open_mythos.checks import checked
from open_mythos.tokenizer.interface import Detokenizer

_MOST_INCOMPLETE = 3
"""U+FFFD at the end that later tokens may change: bytes of an incomplete character."""
_MOST_PENDING = 32
"""Tokens that are decoded again with the next one, unless no place to cut is found."""


class StreamDecoder:
    """Decodes token by token without splitting characters.

    A character that is still incomplete is held back until its last token, or until ``flush``;
    all pieces joined equal ``tokenizer.decode`` of all ids; those after the ids ``after``, if
    there are any, as decoding all of them together has them.
    """

    @checked
    def __init__(self, tokenizer: Detokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        # decoders such as SentencePiece's drop a leading space: decode with the previous tokens
        self._context: list[int] = list(after)[-_MOST_PENDING:]
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, which may be empty."""
        self._pending.append(token_id)
        text = self._pending_text()
        # a trailing U+FFFD may be the first bytes of a character that later tokens complete
        start = len(text) - _MOST_INCOMPLETE
        settled = text[: max(start, 0)] + text[max(start, 0) :].rstrip("\ufffd")
        piece, self._emitted = settled[self._emitted :], len(settled)
        if len(settled) == len(text):
            # tokens without text stay: a decoder may owe the space that they begin with
            if text:
                self._context, self._pending = self._pending, []
            elif len(self._pending) >= _MOST_PENDING:
                self._pending = []
            self._emitted = 0
        elif len(self._pending) >= _MOST_PENDING:
            self._shift(text)
        return piece

    def flush(self) -> str:
        """Return the rest, with U+FFFD for an incomplete character; reset the decoder."""
        text = self._pending_text()
        piece = text[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _shift(self, text: str) -> None:
        """Keep only the later half of ``text``, which has no end for long: bytes of no character.

        A place where the two parts decode to something else than the whole is no place to cut.
        """
        middle = len(self._pending) // 2
        first, last = self._pending[:middle], self._pending[middle:]
        head = self._text(self._context, first)
        if len(head) <= self._emitted and head + self._text(first, last) == text:
            self._context, self._pending = first, last
            self._emitted -= len(head)

    def _pending_text(self) -> str:
        return self._text(self._context, self._pending)

    def _text(self, context: list[int], ids: list[int]) -> str:
        """Return the text of ``ids`` after ``context``."""
        before = len(self._tokenizer.decode(context))
        return self._tokenizer.decode(context + ids)[before:]
