"""From a ``DataConfig`` to a tokenizer, training batches and validation batches."""

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
from open_mythos.errors import ConfigError, DataError
from open_mythos.hub.pretrained import stored_tokenizer
from open_mythos.run_folder import DATA_FOLDER
from open_mythos.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.parallel.process_group import first_decides

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Batches and where they come from."""

    name: str
    """What is read, for titles and reports."""
    batches: Iterable[Batch]
    """Finite for evaluation, endless for training."""
    bytes_per_token: float
    """Mean bytes of text per token."""


def prepared_folder(data: DataConfig) -> str:
    """Return the folder of token shards that a run trains on; "" if it streams."""
    return data.path or (data.source if is_prepared(data.source) else "")


def is_prepared(source: str) -> bool:
    """Whether ``source`` is a folder that ``open-mythos data prepare`` has written."""
    return bool(source) and (Path(source) / INDEX_FILE).is_file()


def with_default_text(config: RunConfig, out: Path) -> None:
    """Name the text of a run that names none: Python's standard library as bytes.

    It is prepared into the run's folder by the first process.
    """
    if config.data.path or config.data.source:
        return
    folder = out / DATA_FOLDER

    def prepared() -> str:
        if not folder.exists():
            prepare("stdlib", folder, ByteTokenizer())
        return str(folder)

    config.data.path = first_decides(prepared)


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Load the tokenizer of the prepared folder, the one named, or that of the initial weights.

    Raises:
        DataError: There is none.
        EnvironmentError_: The hub cannot be reached.
    """
    data = config.data
    if folder := prepared_folder(data):
        tokenizer = TokenShards(folder).tokenizer()
        if data.tokenizer not in ("", tokenizer.name):
            logger.warning(
                "data.tokenizer is not used: the shards have their own, %s", tokenizer.name
            )
        return tokenizer
    if data.tokenizer or not config.train.init_from:
        return load_tokenizer(data.tokenizer) if data.tokenizer else load_tokenizer()
    return stored_tokenizer(config.train.init_from)


def training_batches(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, global_batch: int, seed: int
) -> Loader | StreamLoader:
    """Open the training text for this process of its group.

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
        listed(data.source, data.text_field), tokenizer, held_out=_share(data),
        num_workers=data.workers, mask_documents=data.document_masks, **shape,
    )  # fmt: skip


def validation_batches(
    data: DataConfig, tokenizer: Tokenizer, *, seq_len: int, batch: int, split: str = "val"
) -> Source | None:
    """Open the text to evaluate on: ``data.val``, a split of the shards, or held-out documents.

    Shards are divided among the processes; of a stream, each process reads all windows.

    Args:
        data: Where the text is; ``eval_windows`` limits it.
        tokenizer: The run's.
        seq_len: Tokens of a sequence.
        batch: Sequences that one process computes at a time.
        split: Of prepared shards without ``data.val``.

    Returns:
        None if the run keeps nothing for evaluation.

    Raises:
        DataError: ``data.val`` is missing, damaged, too short, or of another tokenizer.
    """
    folder = prepared_folder(data)
    if is_prepared(data.val):
        return _split(data, data.val, tokenizer, seq_len=seq_len, batch=batch)
    if data.val:
        return _stream(data, data.val, 1.0, tokenizer, seq_len=seq_len, batch=batch)
    if folder:
        if split not in TokenShards(folder).index.splits:
            return None
        return _split(data, folder, tokenizer, split, seq_len=seq_len, batch=batch)
    if not data.held_out:
        return None
    try:
        return _stream(data, data.source, data.held_out, tokenizer, seq_len=seq_len, batch=batch)
    except TooFewHeldOutError as error:
        logger.warning("nothing will be evaluated: %s", error)
        return None


def listed(source: str, text_field: str) -> Corpus:
    """List a corpus in the first process, so that all see the same files."""
    if not source:
        raise ConfigError(
            "no text is named", where="data.source", value="",
            allowed='a file, a folder, a URL, "stdlib", or prepared shards',
            fix="say --source PATH",
        )  # fmt: skip
    return Corpus.from_json(first_decides(lambda: open_corpus(source, text_field).to_json()))


def _share(data: DataConfig) -> float:
    return 0.0 if data.val else data.held_out


def _split(
    data: DataConfig,
    folder: str,
    tokenizer: Tokenizer,
    split: str = "",
    *,
    seq_len: int,
    batch: int,
) -> Source:
    """Open a split of prepared shards; without a name the validation split, if there is one."""
    if not split:
        split = "val" if "val" in TokenShards(folder).index.splits else "train"
    shards = TokenShards(folder, split)
    if shards.index.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            "the validation text was prepared with another tokenizer", where=folder,
            value=shards.index.tokenizer, allowed=tokenizer.name,
            fix="prepare it with the tokenizer of the run, or name the text itself",
        )  # fmt: skip
    windows = EpochWindows(
        shards, seq_len=seq_len, global_batch=world_size() * batch, rank=rank(),
        world_size=world_size(), mask_documents=data.document_masks,
        max_windows=data.eval_windows,
    )  # fmt: skip
    return Source(split, windows, shards.bytes_per_token)


def _stream(
    data: DataConfig, source: str, share: float, tokenizer: Tokenizer, *, seq_len: int, batch: int
) -> Source:
    """Read the first held-out documents of a corpus; with a share of 1 all documents count."""
    windows = HeldOutWindows(
        listed(source, data.text_field), tokenizer, seq_len=seq_len, windows=data.eval_windows,
        held_out=share, batch=batch, mask_documents=data.document_masks,
    )  # fmt: skip
    return Source("val", windows, windows.bytes_per_token)
