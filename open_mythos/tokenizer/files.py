"""Tokenizer files: which names are paths, reading and writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_object
from open_mythos.files import write_text as write_file
from open_mythos.tokenizer.interface import SPECIALS

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

CONFIG_FILE = "tokenizer_config.json"
NO_TOKENIZER = "the file is not a tokenizer"
MOST_GROWTH = 100
"""Times as long as before that replacements may make a text."""


def is_path(name: str | Path) -> bool:
    """Return whether ``name`` is a path on disk, not a model on the hub."""
    if isinstance(name, Path):
        return True
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        allowed = '"byte", a path, or the name of a model on the Hugging Face hub'
        raise ConfigError("not a tokenizer", where="name_or_path", value=name, allowed=allowed)
    return name.startswith(("/", ".", "~")) or name.endswith(".json") or os.path.exists(name)


def read_config(directory: Path, name: str = CONFIG_FILE) -> dict[str, Any]:
    """Read the ``tokenizer_config.json`` of a folder, or another such; empty if there is none."""
    path = directory / name
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
    layout = read_object(file, NO_TOKENIZER)
    _check_growth(layout, file)
    with rust_failures(NO_TOKENIZER, str(file), "a tokenizer.json of the tokenizers library"):
        rust = RustTokenizer.from_str(json.dumps(layout))
    config = read_config(file.parent)
    stated = read_config(file.parent, "special_tokens_map.json")
    name, specials = config.get("name_or_path"), {}
    for role in SPECIALS:
        token = config.get(f"{role}_token") or stated.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[role] = token
    return rust, name if isinstance(name, str) and name else file.parent.name, specials


@contextmanager
def rust_failures(what: str, where: str, allowed: str, value: Any = None) -> Iterator[None]:
    """Turn what the library raises, its panics among them, into a DataError.

    A panic, as of a regular expression that finds no end, is no ``Exception``.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        shown = str(error) if value is None else value
        fix = "use another tokenizer.json; this one was damaged or made to fail"
        raise DataError(what, where=where, value=shown, allowed=allowed, fix=fix) from error


def _check_growth(layout: dict[str, Any], file: Path) -> None:
    """Refuse replacements that, one after another, make a text many times as long."""
    for part in ("normalizer", "decoder"):
        growth = 1.0
        for step in _steps(layout.get(part)):
            pattern, content = step.get("pattern"), step.get("content")
            if step.get("type") == "Replace" and isinstance(content, str):
                found = pattern.get("String") if isinstance(pattern, dict) else None
                growth *= max(1.0, len(content) / max(1, len(found or "")))
        if growth > MOST_GROWTH:
            raise DataError(
                "the tokenizer makes texts too long", where=f"{file}: {part}",
                value=f"{growth:.3g} times as long", allowed=f"at most {MOST_GROWTH} times",
                fix="use another tokenizer.json; this one was damaged or made to fail",
            )  # fmt: skip


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a part of a layout, or the parts of its sequence."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "decoders"):
            inner = part.get(name)
            for each in inner if isinstance(inner, list) else ():
                yield from _steps(each)


def write_config(directory: Path, config: dict[str, str]) -> None:
    """Write the ``tokenizer_config.json`` of a folder."""
    write_text(directory / CONFIG_FILE, json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text``, creating the folder."""
    write_file(path, text, "the tokenizer cannot be saved")
