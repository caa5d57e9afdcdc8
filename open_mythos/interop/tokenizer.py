"""Read the tokenizer and the chat template of a checkpoint of another library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from open_mythos.errors import MythosError, shown_value
from open_mythos.files import read_text, write_text
from open_mythos.run_folder import TEMPLATE_FILE, TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer
from open_mythos.tokenizer.files import read_config, read_local
from open_mythos.tokenizer.rust_backed import RustBacked

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

FILE = "tokenizer.json"


class Stored(NamedTuple):
    """What a checkpoint says about text."""

    tokenizer: Tokenizer | None
    chat_template: str = ""
    """In Jinja; "" if there is none."""
    notes: tuple[str, ...] = ()
    """What the caller should know."""

    def write(self, folder: Path) -> None:
        """Store both in the folder of a model; a template needs a tokenizer."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder / TOKENIZER_FOLDER)
            if self.chat_template:
                write_text(folder / TEMPLATE_FILE, self.chat_template)


def read_stored(folder: Path, rows: int) -> Stored:
    """Read the ``tokenizer.json`` of a checkpoint, and its chat template.

    Here bos, eos and pad are three tokens. Where a checkpoint gives one token several of these
    parts, eos keeps it, and the others get special tokens that have no part yet. What cannot be
    read is left out and noted.

    Args:
        folder: The checkpoint.
        rows: Tokens that the model has; a tokenizer that has more is left out.
    """
    if not (folder / FILE).is_file():
        return Stored(None, notes=(f"the source has no {FILE}: no tokenizer is stored",))
    try:
        rust, name, specials = read_local(folder)
        template = read_config(folder).get("chat_template")
    except MythosError as error:
        file = Path(str(error.where)).name
        return Stored(None, notes=(f"the tokenizer is not stored: {file}: {error.what}",))
    tokenizer, notes = fitting(rust, name, specials, rows)
    if (folder / TEMPLATE_FILE).is_file():
        try:
            template = read_text(folder / TEMPLATE_FILE)
        except (OSError, ValueError) as error:
            template, notes = "", (*notes, f"the chat template is not stored: {error}")
    return Stored(tokenizer, template if isinstance(template, str) else "", notes)


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
            before = "none" if token is None else shown_value(token)
            notes.append(f"{part} is {shown_value(parts[part])}; the source has {before}")
        elif token is not None:
            parts[part] = token
    return parts, tuple(notes)
