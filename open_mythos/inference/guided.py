"""Structured output: the tokens that may come next so that the text fits a JSON schema.

Grammars and masks are those of llguidance, the extra ``guided``; this module loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from open_mythos.errors import ConfigError, EnvironmentError_
from open_mythos.inference.request import Request
from open_mythos.inference.sequence import Sequence
from open_mythos.tokenizer import ByteTokenizer, Tokenizer
from open_mythos.tokenizer.rust_backed import RustBacked

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_JSON: Any = {"whitespace_pattern": r"[ \t\n]{1,16}"}
"""Without a bound, a weak model may fill its answer with white space."""
NO_TOKEN_FITS = "no_token_fits_schema"
"""Error of a text that cannot go on: its vocabulary lacks the bytes that the schema asks for."""
_MOST_KEPT = 32
"""Compiled schemas that are kept."""


def grammar_of(schema: str) -> str:
    """Return a JSON schema as a grammar.

    Raises:
        ValueError: It is no JSON object.
    """
    from llguidance import LLMatcher

    return str(LLMatcher.grammar_from_json_schema(schema, defaults=_JSON))


class Guide:
    """Where the text of one sequence stands in its schema.

    Args:
        matcher: llguidance's, at the start of the text.
        ends: Tokens that end the text, allowed where it is complete.
        n_tokens: Vocabulary of the model.
        end: The tokenizer's own end token.
    """

    def __init__(self, matcher: Any, ends: list[int], n_tokens: int, end: int) -> None:
        self._matcher, self._n_tokens, self._ends, self._end = matcher, n_tokens, ends, end
        self.allowed_V = self._allowed()
        """Which tokens may come next, (V,) booleans."""

    def take(self, token: int) -> bool:
        """Follow a chosen token that does not end the text; return whether any may follow."""
        if not self._matcher.consume_token(token):
            return False
        self.allowed_V = self._allowed()
        return bool(self.allowed_V.any())

    def _allowed(self) -> NDArray[np.bool_]:
        import numpy as np

        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, count=self._n_tokens, bitorder="little").astype(bool)
        if self._end < self._n_tokens:
            allowed_V[self._end] = False  # may not be an end of this request
        allowed_V[self._ends] = self._matcher.is_accepting()
        return allowed_V if not self._matcher.is_error() else np.zeros_like(allowed_V)


class Guides:
    """The guides of an engine's sequences.

    Args:
        tokenizer: The model's; without one, schemas are refused.
        n_tokens: Vocabulary of the model.
        follows_rows: The host reads a row's token before it chooses the next one.
    """

    def __init__(self, tokenizer: Tokenizer | None, n_tokens: int, follows_rows: bool) -> None:
        self._tokenizer, self._n_tokens, self._follows_rows = tokenizer, n_tokens, follows_rows
        self._vocabulary: Any = None
        self._guides: dict[int, Guide] = {}
        # several choices of an answer share their schema
        self._matcher = lru_cache(_MOST_KEPT)(self._compile)

    def make(self, request: Request) -> Guide | None:
        """Return a guide at the start of a request's text; None if it has no schema.

        Raises:
            ConfigError: The schema cannot be followed.
            EnvironmentError_: llguidance is missing.
        """
        if request.schema is None:
            return None
        if not self._follows_rows:
            what = "an engine with ticks of constant shape, where tokens are masked too late"
            raise _refused(what, "start the engine with constant_shapes=False")
        if self._tokenizer is None:
            raise _refused("an engine without a tokenizer", "pass tokenizer= to the engine")
        ends = [end for end in request.ends if end < self._n_tokens]
        if not ends:
            raise _refused("no end token", "name a token that ends the text: its eos_token_id")
        matcher = self._matcher(request.schema).deep_copy()
        guide = Guide(matcher, ends, self._n_tokens, self._tokenizer.eos_id)
        if not guide.allowed_V.any():
            raise _refused("no token can begin the text", "use a tokenizer that has all bytes")
        return guide

    def start(self, sequence: Sequence, guide: Guide | None) -> None:
        """Let ``guide`` follow a sequence."""
        if guide is not None:
            self._guides[sequence.serial] = guide

    def restrict(
        self, sequences: Iterable[Sequence], apply: Callable[[Sequence, NDArray[np.bool_]], None]
    ) -> None:
        """Apply the masks of the sequences that have a guide."""
        for sequence in sequences:
            if (guide := self._guides.get(sequence.serial)) is not None:
                apply(sequence, guide.allowed_V)

    def take(self, sequence: Sequence, token: int) -> bool:
        """Follow a token that does not end the text; return whether any may follow it."""
        guide = self._guides.get(sequence.serial)
        return guide is None or guide.take(token)

    def end(self, sequence: Sequence) -> None:
        """Forget a sequence's guide."""
        self._guides.pop(sequence.serial, None)

    def _compile(self, schema: str) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise EnvironmentError_(
                "guided output needs a package", where="schema", value="llguidance",
                allowed="an installation with llguidance",
                fix="pip install open-mythos[guided]",
            ) from error  # fmt: skip
        assert self._tokenizer is not None
        if self._vocabulary is None:
            self._vocabulary = _vocabulary(self._tokenizer, self._n_tokens)
        try:
            matcher = LLMatcher(self._vocabulary, grammar_of(schema), log_level=0)
        except ValueError as error:
            raise _refused(str(error), "pass a JSON schema as text") from error
        if matcher.is_error():
            raise _refused(matcher.get_error(), "see which keywords llguidance supports")
        return matcher


def _refused(value: str, fix: str) -> ConfigError:
    return ConfigError(
        "the schema cannot be followed", where="schema", value=value,
        allowed="a JSON schema, with a tokenizer and an end token", fix=fix,
    )  # fmt: skip


def _vocabulary(tokenizer: Tokenizer, n_tokens: int) -> Any:
    """Return llguidance's view of a tokenizer: the bytes of every token."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if isinstance(tokenizer, ByteTokenizer):
        return LLTokenizer(TokenizerWrapper(_Bytes(tokenizer)))
    if not isinstance(tokenizer, RustBacked):
        raise _refused(f"a {type(tokenizer).__name__}", "use a tokenizer of the tokenizers library")
    return LLTokenizer(
        tokenizer.to_json(), n_vocab=max(n_tokens, len(tokenizer)), eos_token=tokenizer.eos_id,
        slices=LLTokenizer.json_slices(),
    )  # fmt: skip


class _Bytes:
    """What llguidance asks of a tokenizer that is not one of the ``tokenizers`` library."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        names = {id: name for name, id in tokenizer.special_tokens.items()}
        others = range(256, tokenizer.vocab_size)
        self.special_token_ids = list(others)
        self.tokens = [bytes([i]) for i in range(256)]
        self.tokens += [b"\xff" + names.get(i, f"<|{i}|>").encode() for i in others]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())
