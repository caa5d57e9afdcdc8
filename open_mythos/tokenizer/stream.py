"""Incremental decoding of token ids, whole characters at a time."""

from __future__ import annotations

from open_mythos.tokenizer.interface import Detokenizer


class StreamDecoder:
    """Decodes token by token without splitting characters.

    A character that is still incomplete is held back until its last token, or until ``flush``;
    all pieces joined equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Detokenizer) -> None:
        self._tokenizer = tokenizer
        # decoders such as SentencePiece's drop a leading space: decode with the previous tokens
        self._context: list[int] = []
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """Return the text that ``token_id`` completes, which may be empty."""
        self._pending.append(token_id)
        text = self._pending_text()
        # a trailing U+FFFD may be the first bytes of a character that later tokens complete
        settled = text.rstrip("\ufffd")
        piece, self._emitted = settled[self._emitted :], len(settled)
        if len(settled) == len(text):
            self._context = self._pending if text else self._context
            self._pending, self._emitted = [], 0
        return piece

    def flush(self) -> str:
        """Return the rest, with U+FFFD for an incomplete character; reset the decoder."""
        text = self._pending_text()
        piece = text[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = len(self._tokenizer.decode(self._context))
        return self._tokenizer.decode(self._context + self._pending)[before:]
