"""Tokenizer files: which names are paths, reading and writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_object
from open_mythos.files import write_text as write_file
from open_mythos.tokenizer.interface import SPECIALS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

CONFIG_FILE = "tokenizer_config.json"


def is_path(name: str | Path) -> bool:
    """Return whether ``name`` is a path on disk, not a model on the hub."""
    if isinstance(name, Path):
        return True
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        allowed = '"byte", a path, or the name of a model on the Hugging Face hub'
        raise ConfigError("not a tokenizer", where="name_or_path", value=name, allowed=allowed)
    return name.startswith(("/", ".", "~")) or name.endswith(".json") or os.path.exists(name)


def read_config(directory: Path) -> dict[str, Any]:
    """Read the ``tokenizer_config.json`` of a folder; empty if there is none."""
    path = directory / CONFIG_FILE
    return read_object(path, "not a JSON file") if path.is_file() else {}


def read_local(path: Path) -> tuple[RustTokenizer, str, dict[str, str]]:
    """Read the tokenizer at ``path``, its name, and the special tokens that it declares."""
    from tokenizers import Tokenizer as RustTokenizer

    path = path.expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            "no tokenizer there", where=str(file), value="no such file",
            allowed="a tokenizer.json, or a folder with one",
            fix='check the path; "byte" needs no files; convert a SentencePiece model with '
            "transformers' save_pretrained",
        )  # fmt: skip
    try:
        rust = RustTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            "the file is not a tokenizer",
            where=str(file),
            value=str(error),
            allowed="a tokenizer.json of the tokenizers library",
        ) from error
    config = read_config(file.parent)
    name, specials = config.get("name_or_path"), {}
    for role in SPECIALS:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[role] = token
    return rust, name if isinstance(name, str) and name else file.parent.name, specials


def write_config(directory: Path, config: dict[str, str]) -> None:
    """Write the ``tokenizer_config.json`` of a folder."""
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, creating the folder."""
    write_file(path, text, "the tokenizer cannot be saved")
