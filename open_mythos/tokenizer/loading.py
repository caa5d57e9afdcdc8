"""Load a tokenizer by name: "byte", a path, or a model on the hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from open_mythos.checks import checked
from open_mythos.errors import ConfigError
from open_mythos.tokenizer.byte_level import ByteTokenizer
from open_mythos.tokenizer.files import is_path, read_config
from open_mythos.tokenizer.hub import DEFAULT_MODEL_ID, MythosTokenizer
from open_mythos.tokenizer.interface import Tokenizer
from open_mythos.tokenizer.rust_backed import MOST_IDS, BPETokenizer


@checked
def load_tokenizer(name_or_path: str | Path = DEFAULT_MODEL_ID) -> Tokenizer:
    """Load the byte tokenizer (``"byte"``), a tokenizer at a path, or one of a Hugging Face model.

    A string is a path when it exists, starts with ``/``, ``.`` or ``~``, or ends in ``.json``.

    Raises:
        DataError: The path does not exist or holds no tokenizer.
        EnvironmentError_: See :class:`MythosTokenizer`.
    """
    if name_or_path == "byte":
        return ByteTokenizer()
    if is_path(name_or_path):
        path = Path(name_or_path).expanduser()
        if path.is_dir() and read_config(path).get("tokenizer_class") == ByteTokenizer.__name__:
            return ByteTokenizer()
    return MythosTokenizer(name_or_path)


def load_or_train(name: str, documents: Iterable[str]) -> Tokenizer:
    """Load a tokenizer (:func:`load_tokenizer`); "bpe:N" trains a BPE of N ids on ``documents``.

    Raises:
        ConfigError: N is not a number.
    """
    kind, _, size = name.partition(":")
    if kind != "bpe":
        return load_tokenizer(name)
    if not (size.isascii() and size.isdecimal() and len(size) <= len(str(MOST_IDS))):
        raise ConfigError(
            "no vocabulary size", where="tokenizer", value=name,
            allowed=f"bpe:N, N an integer up to {MOST_IDS:,}", fix="write bpe:8192, for example",
        )  # fmt: skip
    return BPETokenizer.train(documents, int(size))


@checked
def get_vocab_size(name_or_path: str | Path = DEFAULT_MODEL_ID) -> int:
    """Return the ``vocab_size`` of a model for this tokenizer (see :func:`load_tokenizer`)."""
    return load_tokenizer(name_or_path).vocab_size
