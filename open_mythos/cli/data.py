"""``open-mythos data prepare``."""

from __future__ import annotations

from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from open_mythos.data import prepare, read_documents
from open_mythos.errors import ConfigError
from open_mythos.tokenizer import BPETokenizer, Tokenizer, load_tokenizer


def prepare_shards(
    source: str, out: str, tokenizer: str, *, quiet: bool, text_field: str, **options: Any
) -> int:
    """Make the folder and say what is in it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=quiet) as progress:
        task = progress.add_task("tokenizer")
        tok = tokenizer_named(tokenizer, source, text_field)

        def show(documents: int, tokens: int) -> None:
            progress.update(task, description=f"{documents:,} documents, {tokens:,} tokens")

        index = prepare(source, out, tok, text_field=text_field, progress=show, **options)
    for name, split in index.splits.items():
        print(
            f"{name:5s}  {split.documents:>9,} documents  {split.tokens:>13,} tokens  "
            f"{split.text_bytes:>13,} bytes  "
            f"{split.text_bytes / max(1, split.tokens):.2f} bytes/token"
        )
    print(f"tokenizer {tok.name}, vocabulary {tok.vocab_size}: {out}")
    return 0


def tokenizer_named(name: str, source: str, text_field: str = "text") -> Tokenizer:
    """The tokenizer called ``name``; "bpe:N" is trained on ``source``."""
    if not name.startswith("bpe:"):
        return load_tokenizer(name)
    size = name.removeprefix("bpe:")
    if not size.isdigit():
        raise ConfigError(
            "not a vocabulary size", where="--tokenizer", value=name, allowed="bpe:N, N an integer"
        )
    return BPETokenizer.train(read_documents(source, text_field), int(size))
