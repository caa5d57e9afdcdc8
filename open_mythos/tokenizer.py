"""Text to token ids and back: bytes, our own BPE, and tokenizers of the Hugging Face hub.

All of them share the interface :class:`Tokenizer`, and these rules:

* text is only text: ``"<|eos|>"`` inside a string is encoded as ordinary characters, so the ids of
  the special tokens enter a sequence by id alone and ``decode(encode(s)) == s``;
* bos, eos and pad are three different ids below ``len(tokenizer)``;
* ``vocab_size``, by which models are sized, is ``len(tokenizer)`` rounded up to a multiple of 64.

A character may span several tokens, so decoding token by token breaks it: stream through
:class:`StreamDecoder`. Neither torch nor transformers is imported until it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from open_mythos.errors import ConfigError, DataError, EnvironmentError_

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

DEFAULT_MODEL_ID = "openai/gpt-oss-20b"
SPECIALS = {"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}
CONNECT_TIMEOUT_S = 3.0

# Contractions, words, numbers of at most three digits, punctuation, white space.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What the fingerprint encodes: many scripts, white space, digits, emoji, control characters.
_PROBE = "The quick brown fox,\n\t  it's 31415926 naïve Straße 東京 العربية हिन्दी 👩‍🔬 \x00<|eos|>"


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
        """The ids of ``text``, without bos or eos."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``[encode(text) for text in texts]``, faster."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special and padding ids give nothing."""

    def save(self, directory: str | Path) -> None:
        """Write files that ``load_tokenizer(directory)`` reads back."""


class ByteTokenizer:
    """The 256 bytes of UTF-8, then bos, eos and pad: needs no files and no training."""

    name = "byte"
    bos_id, eos_id, pad_id = 256, 257, 258
    vocab_size = 320
    fingerprint = hashlib.sha256(b"open-mythos byte tokenizer 1").hexdigest()

    def __len__(self) -> int:
        return 259

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text``.

        Raises:
            DataError: ``text`` is not a string, or holds a lone surrogate.
        """
        return list(_utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; invalid UTF-8 becomes U+FFFD, ids from 256 on give nothing.

        Raises:
            DataError: An id outside 0..vocab_size - 1.
        """
        return bytes(i for i in _id_list(ids, self.vocab_size) if i < 256).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer_config.json``, which says that this is the byte tokenizer."""
        config = {"tokenizer_class": type(self).__name__, "name_or_path": self.name}
        _write_json(Path(directory) / "tokenizer_config.json", config)


class _RustBacked:
    """Shared by the tokenizers that run in the ``tokenizers`` library."""

    def __init__(self, rust: RustTokenizer, name: str, specials: dict[str, str]) -> None:
        self.name = name
        self._rust = rust
        self._specials = _distinct_specials(specials)
        _register(rust, list(self._specials.values()))
        vocabulary = rust.get_vocab(with_added_tokens=True)
        # ids may have gaps, so the length of a vocabulary does not bound them
        self._length = max(len(vocabulary), max(vocabulary.values()) + 1)
        self.bos_id = vocabulary[self._specials["bos"]]
        self.eos_id = vocabulary[self._specials["eos"]]
        self.pad_id = vocabulary[self._specials["pad"]]
        if len({self.bos_id, self.eos_id, self.pad_id}) < len(SPECIALS):
            raise DataError(
                "bos, eos and pad must differ", where=f"tokenizer {name}", value=self._specials
            )

    def __len__(self) -> int:
        return self._length

    @property
    def vocab_size(self) -> int:
        """``len(self)`` rounded up to a multiple of 64."""
        return -(-self._length // 64) * 64

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the vocabulary, the special ids and the encoding of a fixed text.

        The saved file is not hashed: its layout changes with the version of ``tokenizers``.
        """
        vocabulary = sorted(self._rust.get_vocab(with_added_tokens=True).items())
        content = [vocabulary, [self.bos_id, self.eos_id, self.pad_id], self.encode(_PROBE)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without bos or eos.

        Raises:
            DataError: ``text`` is not a string, or holds a lone surrogate.
        """
        _utf8(text)
        return self._rust.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """``encode`` of every text, on all cores."""
        for text in texts:
            _utf8(text)
        encoded = self._rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special and padding ids give nothing.

        Raises:
            DataError: An id outside 0..vocab_size - 1.
        """
        return self._rust.decode(_id_list(ids, self.vocab_size), skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Write ``tokenizer.json`` and ``tokenizer_config.json``, which transformers reads too."""
        config = {f"{role}_token": token for role, token in self._specials.items()}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "name_or_path": self.name}
        _write_json(Path(directory) / "tokenizer_config.json", config)
        _write_text(Path(directory) / "tokenizer.json", self._rust.to_str(pretty=True))


class BPETokenizer(_RustBacked):
    """Byte-level byte-pair encoding of our own: every string round-trips exactly."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn the merges from ``texts``; the same texts give the same tokenizer.

        Args:
            texts: Any number of strings.
            vocab_size: Number of ids wanted, special tokens included. Little text gives fewer.

        Raises:
            ConfigError: ``vocab_size`` leaves no room for 256 bytes and 3 special tokens.
            DataError: A text is not a string or holds a lone surrogate.
        """
        from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as RustTokenizer

        smallest = 256 + len(SPECIALS)
        if not isinstance(vocab_size, int) or vocab_size < smallest:
            raise ConfigError(
                "the vocabulary is too small for byte-level BPE",
                where="vocab_size",
                value=vocab_size,
                allowed=f"an integer >= {smallest}",
            )
        rust = RustTokenizer(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS.values()),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rust.train_from_iterator(_checked(texts), trainer)
        return cls(rust, f"bpe-{rust.get_vocab_size()}", SPECIALS)

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        """Read a folder that ``save`` wrote, or a ``tokenizer.json``.

        Raises:
            DataError: No such file, or not a tokenizer.
        """
        return cls(*_read_local(Path(path)))


class MythosTokenizer(_RustBacked):
    """The tokenizer of a Hugging Face model, or a local one.

    A hub name goes through ``transformers.AutoTokenizer``, from the local cache when it is there;
    remote code is never run. A path (a ``tokenizer.json``, or a folder with one) needs neither
    transformers nor a network. A tokenizer that lacks one of bos, eos and pad, or that uses one id
    for two of them, gets ``<|bos|>``, ``<|eos|>`` or ``<|pad|>`` added after its own ids; eos keeps
    a shared id before bos, and bos before pad.

    Args:
        model_id: A name on the hub, or a path.

    Raises:
        DataError: The path does not exist or holds no tokenizer.
        EnvironmentError_: transformers is missing, or the hub has no such model or is out of reach.
    """

    def __init__(self, model_id: str | Path = DEFAULT_MODEL_ID) -> None:
        source = _read_local(Path(model_id)) if _is_path(model_id) else _read_hub(str(model_id))
        super().__init__(*source)


class StreamDecoder:
    """Decode token by token without ever cutting a character.

    A character that is still incomplete is held back until its last token, or until ``flush``;
    all pieces joined equal ``tokenizer.decode`` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # decoders such as SentencePiece's drop a leading space, so decode after the previous text
        self._context: list[int] = []
        self._pending: list[int] = []
        self._emitted = 0

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, perhaps none."""
        self._pending.append(token_id)
        text = self._pending_text()
        # a trailing U+FFFD may be the first bytes of a character that later tokens complete
        settled = text.rstrip("\ufffd")
        piece, self._emitted = settled[self._emitted :], len(settled)
        if len(settled) == len(text):
            self._settle(text)
        return piece

    def flush(self) -> str:
        """End the stream: what is still held back, with U+FFFD for an incomplete character."""
        text = self._pending_text()
        piece = text[self._emitted :]
        self._context, self._pending, self._emitted = [], [], 0
        return piece

    def _pending_text(self) -> str:
        before = len(self._tokenizer.decode(self._context))
        return self._tokenizer.decode(self._context + self._pending)[before:]

    def _settle(self, text: str) -> None:
        if text:
            self._context = self._pending
        self._pending, self._emitted = [], 0


def load_tokenizer(name_or_path: str | Path = DEFAULT_MODEL_ID) -> Tokenizer:
    """The tokenizer called ``"byte"``, the one at a path, or the one of a Hugging Face model.

    A string is a path when it exists, starts with ``/``, ``.`` or ``~``, or ends in ``.json``.

    Raises:
        DataError: The path does not exist or holds no tokenizer.
        EnvironmentError_: See :class:`MythosTokenizer`.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    if _is_path(name_or_path):
        path = Path(name_or_path).expanduser()
        config = _read_config(path) if path.is_dir() else {}
        if config.get("tokenizer_class") == ByteTokenizer.__name__:
            return ByteTokenizer()
    return MythosTokenizer(name_or_path)


def get_vocab_size(name_or_path: str | Path = DEFAULT_MODEL_ID) -> int:
    """The ``vocab_size`` that a model for this tokenizer takes.

    Raises:
        DataError, EnvironmentError_: As :func:`load_tokenizer`.
    """
    return load_tokenizer(name_or_path).vocab_size


def _utf8(text: str) -> bytes:
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


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        _utf8(text)
        yield text


def _id_list(ids: Iterable[int], vocab_size: int) -> list[int]:
    """``ids`` (a list, an array, a 1-D tensor) as plain integers, each below ``vocab_size``."""
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


def _distinct_specials(declared: dict[str, str]) -> dict[str, str]:
    """One token per role: the declared one unless it is missing or taken, else our own."""
    chosen: dict[str, str] = {}
    for role in ("eos", "bos", "pad"):
        token = declared.get(role)
        chosen[role] = token if token and token not in chosen.values() else SPECIALS[role]
    return chosen


def _register(rust: RustTokenizer, tokens: list[str]) -> None:
    """Make ``tokens`` special, adding those that are new, and read them in no text."""
    from tokenizers import AddedToken

    rust.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    rust.encode_special_tokens = True
    # a stored truncation or padding would change the length of what is encoded
    rust.no_truncation()
    rust.no_padding()


def _is_path(name: str | Path) -> bool:
    if isinstance(name, Path):
        return True
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise ConfigError(
            "not the name of a tokenizer",
            where="name_or_path",
            value=name,
            allowed='"byte", a path, or the name of a model on the Hugging Face hub',
        )
    return name.startswith(("/", ".", "~")) or name.endswith(".json") or os.path.exists(name)


def _read_config(directory: Path) -> dict[str, Any]:
    """The ``tokenizer_config.json`` of a folder; empty without one."""
    path = directory / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("not a JSON file", where=str(path), value=str(error)) from error
    return config if isinstance(config, dict) else {}


def _read_local(path: Path) -> tuple[RustTokenizer, str, dict[str, str]]:
    from tokenizers import Tokenizer as RustTokenizer

    path = path.expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            "no tokenizer there",
            where=str(file),
            allowed="a tokenizer.json, or a folder with one",
            fix='check the path; "byte" needs no files; convert a SentencePiece model with '
            "transformers' save_pretrained",
        )
    try:
        rust = RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError("the file is not a tokenizer", where=str(file), value=str(error)) from error
    config = _read_config(file.parent)
    name = config.get("name_or_path")
    return rust, name if isinstance(name, str) and name else file.parent.name, _declared(config)


def _declared(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens of a ``tokenizer_config.json``: strings, or objects with ``content``."""
    found = {}
    for role in SPECIALS:
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[role] = content
    return found


def _read_hub(model_id: str) -> tuple[RustTokenizer, str, dict[str, str]]:
    hf = _auto_tokenizer(model_id)
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        raise DataError(
            "the model's tokenizer does not run in the `tokenizers` library",
            where="model_id",
            value=model_id,
            fix="pass a model with a tokenizer.json, or train a BPETokenizer",
        )
    tokens = {role: getattr(hf, f"{role}_token", None) for role in SPECIALS}
    return rust, model_id, {role: str(token) for role, token in tokens.items() if token}


def _auto_tokenizer(model_id: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _unavailable(model_id, "transformers is not installed") from error
    # Whatever goes wrong inside transformers means one thing here: this tokenizer cannot be had.
    try:
        return AutoTokenizer.from_pretrained(
            model_id, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        unreachable = _hub_unreachable()
        if unreachable:
            raise _unavailable(model_id, f"it is not cached, and {unreachable}") from error
    try:
        return AutoTokenizer.from_pretrained(model_id, trust_remote_code=False)
    except Exception as error:
        raise _unavailable(model_id, str(error).partition("\n")[0]) from error


def _hub_unreachable() -> str:
    """Why the hub cannot be reached, or "": a probe, since transformers retries for a minute."""
    for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(switch, "0").upper() in {"1", "ON", "YES", "TRUE"}:
            return f"{switch} is set"
    if urllib.request.getproxies():
        return ""
    hub = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{hub.hostname} cannot be reached ({error})"
    return ""


def _unavailable(model_id: str, reason: str) -> EnvironmentError_:
    return EnvironmentError_(
        f"the tokenizer cannot be loaded: {reason}",
        where="MythosTokenizer(model_id)",
        value=model_id,
        allowed="a public model of the Hugging Face hub, or a local path",
        fix="pip install open-mythos[hf] and connect once to fill the cache; or pass the path of a "
        'tokenizer.json; or use the built-in tokenizer "byte" (ByteTokenizer)',
    )


def _write_json(path: Path, content: dict[str, str]) -> None:
    _write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentError_(
            "the tokenizer cannot be saved",
            where=str(path),
            value=str(error),
            fix="free space, or choose a folder that can be written",
        ) from error
