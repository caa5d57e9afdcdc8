"""Read a dense model and its tokenizer with transformers: a folder, a hub model or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from open_mythos.errors import DataError, EnvironmentError_
from open_mythos.files import MAX_TEXT_BYTES, read_object
from open_mythos.hub.places import download, first_line, is_hub_id
from open_mythos.interop.provenance import licence_of
from open_mythos.interop.read import FILES
from open_mythos.interop.tokenizer import FILE as TOKENIZER_FILE
from open_mythos.interop.tokenizer import Stored, fitting, read_stored
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.interface import SPECIALS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
READ = ("config.json", "model.safetensors.index.json", "generation_config.json")
"""Objects that ``transformers`` reads of a folder, beside the tokenizer."""


@dataclass(frozen=True)
class DenseSource:
    """A model of transformers, in float32, with its tokenizer."""

    name: str
    """Name of the folder or the GGUF file, or the hub's."""
    model: PreTrainedModel
    tokenizer: Tokenizer | None
    """None if none is stored with the model."""
    gguf_sha256: str
    """Of the GGUF file; "" for other sources."""
    licence: str | None
    """As the source states it; None if it does not."""
    chat_template: str
    """Jinja template of chats; "" if there is none."""
    notes: tuple[str, ...]
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
    folder = _folder(model, gguf)
    if gguf and not (folder / gguf).is_file():
        raise _no_model(str(folder / gguf), "there is no such file")
    _check_files(folder)
    options: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    options["trust_remote_code"] = False  # unless told, transformers asks on the terminal
    found = _read(
        model, lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    )
    digest = ""
    if gguf:
        with (folder / gguf).open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    name = gguf or (folder.resolve().name if Path(model).exists() else model)
    licence = licence_of(folder, {})
    rows = found.config.vocab_size
    if (folder / TOKENIZER_FILE).is_file() and not gguf:
        stored = read_stored(folder, rows, name)
    else:
        stored = _tokenizer(lambda: AutoTokenizer.from_pretrained(folder, **options), name, rows)
    return DenseSource(name, found.eval(), stored.tokenizer, digest, licence, *stored[1:])


def _folder(model: str, gguf: str) -> Path:
    """Return the folder of a model, downloaded if it is one of the hub."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not is_hub_id(model):
        raise _no_model(model, "there is no such folder")
    return download(model, [gguf, *FILES] if gguf else FILES, where="model", verb="retrofit")


def _check_files(folder: Path) -> None:
    """Refuse files that transformers would read whole, whatever they are."""
    for file in (file for pattern in FILES for file in folder.glob(pattern)):
        if not file.is_file():
            raise _no_model(str(file), "not a regular file")
        if file.suffix != ".safetensors" and file.stat().st_size > MAX_TEXT_BYTES:
            raise _no_model(str(file), f"longer than {MAX_TEXT_BYTES:,} bytes")
    for name in READ:
        if (folder / name).exists():
            read_object(folder / name, f"no dense model: {name} cannot be read")


def _tokenizer(read: Callable[[], Any], name: str, rows: int) -> Stored:
    """Return a tokenizer that only transformers can read, as one of this library."""
    try:
        hf = read()
    except Exception as error:  # there is none, or a value in it is of another kind
        return Stored(None, notes=(f"no tokenizer is stored: {first_line(error)}",))
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        return Stored(None, notes=("no tokenizer is stored: it has no fast form",))
    tokens = {part: getattr(hf, f"{part}_token", None) for part in SPECIALS}
    specials = {part: str(token) for part, token in tokens.items() if token}
    tokenizer, notes = fitting(rust, name, specials, rows)
    return Stored(tokenizer, hf.chat_template if isinstance(hf.chat_template, str) else "", notes)


def _read(name: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except ImportError as error:
        raise _unreadable(name, error) from error
    except Exception as error:  # of any kind, where a value is of another kind
        raise _no_model(name, f"transformers cannot read it: {first_line(error)}") from error


def _no_model(name: str, why: str) -> DataError:
    return DataError(
        f"no dense model: {why}", where="model", value=name,
        allowed="a folder with config.json and safetensors, a GGUF file, or owner/name",
        fix="check the path",
    )  # fmt: skip


def _unreadable(name: str, error: ImportError) -> EnvironmentError_:
    return EnvironmentError_(
        f"a package is missing: {first_line(error)}", where="model", value=name,
        allowed="an installation with transformers",
        fix="pip install 'open-mythos[hf]'; GGUF files also need: pip install gguf",
    )  # fmt: skip
