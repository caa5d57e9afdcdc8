"""Copy the tokenizer of a checkpoint to the folder of a converted model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from open_mythos.errors import MythosError
from open_mythos.files import write_text
from open_mythos.interop.read import Source
from open_mythos.run_folder import TEMPLATE_FILE, TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.files import read_config, read_local
from open_mythos.tokenizer.rust_backed import RustBacked

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

FILE = "tokenizer.json"


def copy_tokenizer(source: Source, out: Path, rows: int) -> tuple[str, ...]:
    """Store the tokenizer of ``source`` in ``out``, if it fits the model, and its chat template.

    Here bos, eos and pad are three tokens. Where a checkpoint gives one token several of these
    parts, eos keeps it, and the others get special tokens that have no part yet.

    Args:
        source: The checkpoint.
        out: Folder of the model.
        rows: Tokens that the model has.

    Returns:
        What the caller should know.
    """
    if not (source.folder / FILE).is_file():
        return (f"the source has no {FILE}: no tokenizer is stored",)
    try:
        rust, name, specials = read_local(source.folder)
    except MythosError as error:
        return (f"the tokenizer is not stored: {error.what}",)
    tokenizer, notes = fitting(rust, name, specials, rows)
    if tokenizer is not None:
        tokenizer.save(out / TOKENIZER_FOLDER)
    template = read_config(source.folder).get("chat_template")
    if (source.folder / TEMPLATE_FILE).is_file():
        template = (source.folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    if tokenizer is not None and isinstance(template, str):
        write_text(out / TEMPLATE_FILE, template)
    return notes


def fitting(
    rust: RustTokenizer, name: str, specials: dict[str, str], rows: int
) -> tuple[Tokenizer | None, tuple[str, ...]]:
    """Return a tokenizer with distinct bos, eos and pad, and what the caller should know.

    Args:
        rust: The tokenizer.
        name: Its name.
        specials: Part ("bos", "eos", "pad") -> token; parts may be missing or share one.
        rows: Tokens that the model has; None is returned if they do not suffice.
    """
    parts, notes = _distinct(rust, specials)
    tokenizer = RustBacked(rust, name, parts)
    if len(tokenizer) > rows:
        more = f"the tokenizer is not stored: it has {len(tokenizer)} ids, the model {rows}"
        return None, (more,)
    return tokenizer, notes


def _distinct(
    rust: RustTokenizer, specials: dict[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Give bos, eos and pad a token each."""
    added = rust.get_added_tokens_decoder()
    free = [
        token.content for _, token in sorted(added.items(), reverse=True)
        if token.special and token.content not in specials.values()
    ]  # fmt: skip
    parts, notes = dict[str, str](), []
    for part in ("eos", "bos", "pad"):
        token = specials.get(part)
        if (token is None or token in parts.values()) and free:
            parts[part] = free.pop(0)
            notes.append(f"{part} is {parts[part]}; the source has {token or 'none'}")
        elif token is not None:
            parts[part] = token
    return parts, tuple(notes)
