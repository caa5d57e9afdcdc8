"""Build the tokenizer, training batches and validation batches of a ``DataConfig``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_mythos.data import (
    Batch,
    Corpus,
    EpochWindows,
    HeldOutWindows,
    Loader,
    StreamLoader,
    TokenShards,
    TooFewHeldOutError,
    open_corpus,
    prepare,
)
from open_mythos.data.index import INDEX_FILE
from open_mythos.distributed import rank, world_size
from open_mythos.errors import DataError
from open_mythos.hub.places import stored_tokenizer, tokenizer_of_model
from open_mythos.run_folder import DATA_FOLDER
from open_mythos.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from open_mythos.train.config import DataConfig, RunConfig, no_text
from open_mythos.train.parallel.process_group import first_decides

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Batches (finite for evaluation, endless for training) and their origin."""

    name: str
    batches: Iterable[Batch]
    bytes_per_token: float


def prepared_folder(data: DataConfig) -> str:
    """Return the folder of the run's token shards; "" if the run streams."""
    return data.path or (data.source if is_prepared(data.source) else "")


def is_prepared(source: str) -> bool:
    """Return whether ``source`` is a folder written by ``open-mythos data prepare``."""
    return bool(source) and (Path(source) / INDEX_FILE).is_file()


def with_default_text(config: RunConfig, out: Path) -> None:
    """Without a text, prepare Python's standard library as bytes in the run's folder ``out``."""
    if config.data.path or config.data.source:
        return
    folder = out / DATA_FOLDER

    def prepared() -> str:
        if not folder.exists():
            prepare("stdlib", folder, ByteTokenizer())
        return str(folder)

    config.data.path = first_decides(prepared)


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer: of the shards, of ``data.tokenizer``, or of ``train.init_from``.

    Raises:
        DataError: The tokenizer is missing or damaged.
        EnvironmentError_: The hub cannot be reached.
    """
    data = config.data
    if folder := prepared_folder(data):
        tokenizer = TokenShards(folder).tokenizer()
        if data.tokenizer not in ("", tokenizer.name):
            logger.warning(
                "data.tokenizer is ignored: the shards have a tokenizer, %s", tokenizer.name
            )
        return tokenizer_of_model(tokenizer, config.train.init_from, folder)
    if data.tokenizer:
        tokenizer = load_tokenizer(data.tokenizer)
        return tokenizer_of_model(tokenizer, config.train.init_from, "data.tokenizer")
    return stored_tokenizer(config.train.init_from) if config.train.init_from else load_tokenizer()


def training_batches(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, global_batch: int, seed: int
) -> Loader | StreamLoader:
    """Open the training text of this rank.

    Raises:
        DataError: The text is missing or damaged.
        EnvironmentError_: The hub cannot be reached, or a package is missing.
    """
    shape: dict[str, Any] = {
        "seq_len": seq_len, "global_batch": global_batch, "seed": seed, "rank": rank(),
        "world_size": world_size(),
    }  # fmt: skip
    if folder := prepared_folder(data):
        return Loader(TokenShards(folder), mask_documents=data.document_masks, **shape)
    return StreamLoader(
        _list_files(data, "source"), tokenizer,
        held_out=0.0 if data.val else data.held_out, num_workers=data.workers,
        mask_documents=data.document_masks, **shape,
    )  # fmt: skip


def validation_batches(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, batch: int, split: str = "val"
) -> Source | None:
    """Open the validation text: ``data.val``, a split of the shards, or held-out documents.

    Shards are divided among the ranks; of a stream, each rank reads all windows.

    Args:
        data: The text; ``eval_windows`` limits the number of sequences.
        tokenizer: Tokenizer of the run.
        seq_len: Tokens per sequence.
        batch: Sequences per rank and forward pass.
        split: Split of prepared shards, if ``data.val`` is empty.

    Returns:
        None if there is no validation text.

    Raises:
        DataError: ``data.val`` is missing, damaged, too short, or of another tokenizer.
    """
    sizes = {"seq_len": seq_len, "batch": batch}
    if is_prepared(data.val):
        name = "val" if "val" in TokenShards(data.val).index.splits else "train"
        return _split(data, data.val, tokenizer, name, **sizes)
    if data.val:
        return _stream(data, "val", 1.0, tokenizer, **sizes)
    if folder := prepared_folder(data):
        if split not in TokenShards(folder).index.splits:
            return None
        return _split(data, folder, tokenizer, split, **sizes)
    if not data.held_out:
        return None
    try:
        return _stream(data, "source", data.held_out, tokenizer, **sizes)
    except TooFewHeldOutError as error:
        logger.warning("there will be no evaluation: %s", error)
        return None


def _list_files(data: DataConfig, name: str) -> Corpus:
    """List the files that field ``name`` refers to on rank 0, so that all ranks read the same."""
    source, where = getattr(data, name), f"data.{name}"
    if not source:
        raise no_text(where)
    return first_decides(lambda: open_corpus(source, data.text_field, where=where))


def _split(
    data: DataConfig, folder: str, tokenizer: Tokenizer, split: str, *, seq_len: int, batch: int
) -> Source:
    shards = TokenShards(folder, split)
    if shards.index.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            "the validation text was prepared with another tokenizer", where=folder,
            value=shards.index.tokenizer, allowed=tokenizer.name,
            fix="prepare it with the tokenizer of the run, or pass the text unprepared",
        )  # fmt: skip
    windows = EpochWindows(
        shards, seq_len=seq_len, global_batch=world_size() * batch, rank=rank(),
        world_size=world_size(), mask_documents=data.document_masks,
        max_windows=data.eval_windows,
    )  # fmt: skip
    return Source(split, windows, shards.bytes_per_token)


def _stream(
    data: DataConfig, name: str, share: float, tokenizer: Tokenizer, *, seq_len: int, batch: int
) -> Source:
    """Open the first documents of the held-out ``share`` of the corpus in field ``name``."""
    windows = HeldOutWindows(
        _list_files(data, name), tokenizer, seq_len=seq_len, windows=data.eval_windows,
        held_out=share, batch=batch, mask_documents=data.document_masks,
    )  # fmt: skip
    return Source("val", windows, windows.bytes_per_token)
