"""Read a dense model and its tokenizer with transformers: a folder, a hub model or a GGUF file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from open_mythos.errors import DataError, EnvironmentError_, shown_value
from open_mythos.files import MAX_TEXT_BYTES, read_object
from open_mythos.hub.places import download, first_line, is_hub_id
from open_mythos.interop.provenance import licence_of
from open_mythos.interop.read import FILES
from open_mythos.interop.tokenizer import FILE as TOKENIZER_FILE
from open_mythos.interop.tokenizer import Stored, fitting
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.files import read_local, rust_failures
from open_mythos.tokenizer.interface import SPECIALS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
OBJECTS = ("config.json", "model.safetensors.index.json")
TOKENIZER_FILES = (
    TOKENIZER_FILE, "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
OTHERS = ("generation_config.json", "chat_template.jinja", "chat_template.json")
"""Files that ``transformers`` reads of a folder, beside the weights."""


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
    stored = _stored(
        folder, lambda: AutoTokenizer.from_pretrained(folder, **options), name,
        found.config.vocab_size, needs_file=not gguf,
    )  # fmt: skip
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
    weights = folder.glob("*.safetensors")
    for file in (*weights, *(folder / name for name in (*OBJECTS, *TOKENIZER_FILES, *OTHERS))):
        if file.exists() and not file.is_file():
            raise _no_model(str(file), "not a regular file")
        is_small = file.suffix != ".safetensors" and file.exists()
        if is_small and file.stat().st_size > MAX_TEXT_BYTES:
            raise _no_model(str(file), f"longer than {MAX_TEXT_BYTES:,} bytes")
    for name in OBJECTS:
        if (folder / name).exists():
            read_object(folder / name, f"no dense model: {name} cannot be read")


def _stored(
    folder: Path, read: Callable[[], Any], name: str, rows: int, *, needs_file: bool
) -> Stored:
    """Return the tokenizer that transformers reads as one of this library, or why there is none."""
    if needs_file and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return Stored(None, notes=("the source has no tokenizer",))
    try:
        if (folder / TOKENIZER_FILE).exists():
            read_local(folder)  # bounds what it makes of a text
        with rust_failures("no tokenizer", str(folder), "one that transformers reads"):
            hf = read()
    except DataError as error:
        why = shown_value(error.value)
        return Stored(None, notes=(f"no tokenizer is stored: {Path(error.where).name}: {why}",))
    rust = getattr(hf, "backend_tokenizer", None)
    if rust is None:
        return Stored(None, notes=("no tokenizer is stored: transformers has no fast one",))
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
