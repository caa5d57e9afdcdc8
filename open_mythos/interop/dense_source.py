"""Read a dense model and its tokenizer with transformers: a folder, a hub model or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.interface import SPECIALS
from open_mythos.tokenizer.rust_backed import RustBacked

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class DenseSource:
    """A model of transformers, in float32, with its tokenizer."""

    name: str
    """The folder, the hub's name or the GGUF file."""
    model: PreTrainedModel
    tokenizer: Tokenizer | None
    """None if none is stored with the model."""
    gguf_sha256: str = ""
    """Of the GGUF file; "" for other sources."""
    chat_template: str = ""
    """Jinja template of chats; "" if there is none."""


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
    name = str(file) if gguf else model
    try:
        hf = AutoTokenizer.from_pretrained(model, **options)
    except (OSError, ValueError, KeyError):  # the model has none
        return DenseSource(name, found.eval(), None, digest)
    template = hf.chat_template if isinstance(hf.chat_template, str) else ""
    return DenseSource(name, found.eval(), plain_tokenizer(hf, model), digest, template)


def plain_tokenizer(hf: Any, name: str) -> Tokenizer:
    """Return a tokenizer of transformers as one of this library.

    bos, eos and pad must differ here. A role without a token of its own takes the unknown token,
    then the first special token without a role, so that the vocabulary does not grow.

    Raises:
        DataError: The tokenizer does not run in the ``tokenizers`` library.
    """
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        raise DataError(
            "the model's tokenizer does not run in the `tokenizers` library", where="model",
            value=name, fix="save it again with a tokenizer.json",
        )  # fmt: skip
    added = sorted(rust.get_added_tokens_decoder().items())
    free = [hf.unk_token, *(token.content for _, token in added if token.special)]
    specials: dict[str, str] = {}
    for role in ("eos", "bos", "pad"):
        declared = getattr(hf, f"{role}_token", None)
        others = [each for each in free if each and each not in specials.values()]
        if declared is None or declared in specials.values():
            kept = {getattr(hf, f"{each}_token", None) for each in SPECIALS}
            unused = [each for each in others if each not in kept]
            declared = unused[0] if unused else SPECIALS[role]
        specials[role] = str(declared)
    return RustBacked(rust, name, specials)


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
