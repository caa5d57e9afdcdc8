"""Read a dense model and its tokenizer with transformers: a folder, a hub model or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.interop.tokenizer import fitting
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.interface import SPECIALS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class DenseSource:
    """A model of transformers, in float32, with its tokenizer."""

    name: str
    """Name of the folder or the GGUF file, or the hub's."""
    model: PreTrainedModel
    tokenizer: Tokenizer | None
    """None if none is stored with the model."""
    gguf_sha256: str = ""
    """Of the GGUF file; "" for other sources."""
    chat_template: str = ""
    """Jinja template of chats; "" if there is none."""
    notes: tuple[str, ...] = ()
    """What differs from the tokenizer of the source."""


def read_dense(model: str, gguf: str = "") -> DenseSource:
    """Read a dense model.

    Args:
        model: A folder in the format of transformers, a hub model (owner/name), or a GGUF file.
        gguf: Name of a GGUF file in that folder or hub model.

    Raises:
        DataError: It is no model, or no causal language model.
        EnvironmentError_: A package is missing, or the hub cannot be reached.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise _unreadable(model, error) from error
    path = Path(model)
    if path.suffix == ".gguf":
        model, gguf = str(path.parent), path.name
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    found = _read(
        model, lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **options)
    )
    file = Path(model) / gguf
    digest = ""
    if gguf and file.is_file():
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    local = Path(model).exists()
    name = gguf or (Path(model).resolve().name if local else model)
    try:
        hf = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError):  # the model has none
        return DenseSource(name, found.eval(), None, digest)
    tokenizer, notes = _tokenizer(hf, name, found.config.vocab_size)
    template = hf.chat_template if isinstance(hf.chat_template, str) else ""
    return DenseSource(name, found.eval(), tokenizer, digest, template, notes)


def _tokenizer(hf: Any, name: str, rows: int) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Return a tokenizer of transformers as one of this library, and what differs."""
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        return None, ("the tokenizer does not run in the `tokenizers` library: none is stored",)
    tokens = {part: getattr(hf, f"{part}_token", None) for part in SPECIALS}
    return fitting(rust, name, {part: str(token) for part, token in tokens.items() if token}, rows)


def _read(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except ImportError as error:
        raise _unreadable(name, error) from error
    except (OSError, ValueError, KeyError) as error:
        local = Path(name).exists()
        kind = DataError if local else EnvironmentError_
        raise kind(
            f"transformers cannot read the model: {str(error).strip().splitlines()[0]}",
            where="model", value=name,
            allowed="a folder with config.json and safetensors, a GGUF file, or owner/name",
            fix="check the path" if local else "check the name, or download the model first: "
            f"hf download {name} --local-dir DIR",
        ) from error  # fmt: skip


def _unreadable(name: str, error: ImportError) -> EnvironmentError_:
    return EnvironmentError_(
        f"a package is missing: {str(error).strip().splitlines()[0]}", where="model", value=name,
        fix="pip install 'open-mythos[hf]'; GGUF files also need: pip install gguf",
    )  # fmt: skip
