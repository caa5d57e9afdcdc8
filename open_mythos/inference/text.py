"""From tokens to text while they arrive: whole characters, and stop strings.

Tokens travel with the text that they complete (this module loads no torch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from open_mythos.inference.request import Token
from open_mythos.tokenizer import StreamDecoder, Tokenizer


@dataclass
class Piece:
    """New text, and the tokens that it completes."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Where the text of each token begins, in characters from the start of the new text."""

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)

    def join(self, later: Piece) -> None:
        """Append the piece that follows."""
        self.text += later.text
        self.tokens += later.tokens
        self.offsets += later.offsets


class TextStream:
    """Turns the tokens of one sequence into pieces of text.

    Held back are incomplete characters, and the longest end of the text that begins a stop string.

    Args:
        tokenizer: Decodes the tokens.
        stops: Strings that end the text; they are no part of it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self._waiting: list[tuple[Token, int, int]] = []  # token, start and end of its text
        self._length = 0  # of the decoded text
        self._unfinished = 0  # tokens at the end of _waiting whose text is still to come
        self.stopped_by: str | None = None
        """The stop string that ended the text."""

    def push(self, token: Token) -> Piece:
        """Return what ``token`` completes; after a stop string, nothing."""
        if self.stopped_by is not None:
            return Piece()
        text = self._decoder.push(token.token)
        self._waiting.append((token, self._length, self._length))
        self._unfinished += 1
        if text:
            self._grow(text)
        return self._release(self._search(text))

    def finish(self) -> Piece:
        """Return the rest: incomplete characters, and ends that did not become a stop string."""
        if self.stopped_by is not None:
            return Piece()
        text = self._decoder.flush()
        self._grow(text)
        cut = self._search(text)
        return self._release(len(self._held) if self.stopped_by is None else cut, everything=True)

    def _grow(self, text: str) -> None:
        """Add ``text``, the end of all tokens that had none."""
        self._held += text
        self._length += len(text)
        for i in range(len(self._waiting) - self._unfinished, len(self._waiting)):
            token, start, _ = self._waiting[i]
            self._waiting[i] = (token, start, self._length)
        self._unfinished = 0

    def _search(self, new: str) -> int:
        """Return how many held characters may be shown; note a stop string, the earliest one."""
        if not self._stops:
            return len(self._held)
        found = [(at, stop) for stop in self._stops if (at := self._find(stop, new)) >= 0]
        if found:
            cut, self.stopped_by = min(found, key=lambda each: each[0])
            return cut
        return len(self._held) - max(begun(self._held, stop) for stop in self._stops)

    def _find(self, stop: str, new: str) -> int:
        """Find ``stop`` where it ends within ``new``, the end of the held text."""
        return self._held.find(stop, max(0, len(self._held) - len(new) - len(stop) + 1))

    def _release(self, characters: int, everything: bool = False) -> Piece:
        """Return the first held characters and their tokens.

        A stop string, too, releases all tokens: they have been computed.
        """
        piece = Piece(self._held[:characters])
        self._held = self._held[characters:]
        shown = self._length - len(self._held)
        everything = everything or self.stopped_by is not None
        ready = len(self._waiting) - self._unfinished
        while self._waiting and (everything or (ready > 0 and self._waiting[0][2] <= shown)):
            token, start, _ = self._waiting.pop(0)
            piece.tokens.append(token)
            piece.offsets.append(start)
            ready -= 1
        return piece


def begun(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``, but is not all of it.

    ``text`` is no longer than the text since the last such end, so this takes time
    O(len(stop)^2) at most.
    """
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], list[int]]:
    """Return the text of each token in context, and where it begins in the whole text.

    A character of several tokens belongs to the last of them; special tokens have no text.
    """
    decoder, texts, offsets, length = StreamDecoder(tokenizer), [], [], 0
    for token in ids:
        offsets.append(length)
        texts.append(decoder.push(token))
        length += len(texts[-1])
    if texts:
        texts[-1] += decoder.flush()
    return texts, offsets
