"""``open-mythos data prepare``: tokenize text into shards."""

from __future__ import annotations


def prepare_shards(
    source: str,
    out: str,
    tokenizer: str = "byte",
    val_fraction: float = 0.01,
    shard_tokens: int = 1 << 27,
    text_field: str = "text",
    overwrite: bool = False,
    quiet: bool = False,
) -> int:
    """Tokenize SOURCE into the folder OUT.

    Args:
        source: A text, JSONL or Parquet file, a folder of such, or "stdlib": the source of the
            running Python's standard library.
        out: The folder to create.
        tokenizer: "byte"; "bpe:N" trains a byte-level BPE of N tokens on the source; a path; or a
            Hugging Face model such as openai/gpt-oss-20b.
        val_fraction: Share of the documents kept for validation.
        shard_tokens: Tokens per shard.
        text_field: JSON key or Parquet column that holds the text.
        overwrite: Replace a folder that was prepared before.
        quiet: Show no progress.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from open_mythos.data import prepare, read_documents
    from open_mythos.data.documents import check_share
    from open_mythos.tokenizer.loading import load_or_train

    check_share("--val-fraction", val_fraction)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, transient=True, disable=quiet) as progress:
        task = progress.add_task("tokenizer")
        tok = load_or_train(tokenizer, read_documents(source, text_field))

        def show(documents: int, tokens: int) -> None:
            progress.update(task, description=f"{documents:,} documents, {tokens:,} tokens")

        index = prepare(
            source, out, tok, text_field=text_field, val_fraction=val_fraction,
            shard_tokens=shard_tokens, overwrite=overwrite, progress=show,
        )  # fmt: skip
    for name, split in index.splits.items():
        print(
            f"{name:5s}  {split.documents:>9,} documents  {split.tokens:>13,} tokens  "
            f"{split.text_bytes:>13,} bytes  "
            f"{split.text_bytes / max(1, split.tokens):.2f} bytes/token"
        )
    print(f"tokenizer {tok.name}, vocabulary {tok.vocab_size}: {out}")
    return 0
