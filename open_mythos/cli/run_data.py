"""The files of a run as the commands read them: what lies beside a model, and its token shards."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from open_mythos.checks import check_count
from open_mythos.data import Batch, EpochWindows, Loader, TokenShards
from open_mythos.errors import DataError
from open_mythos.hub.pretrained import model_directory
from open_mythos.run_folder import CONFIG_FILE, find_beside


@dataclass(frozen=True)
class Source:
    """Batches and where they come from."""

    name: str
    """The split, for titles and reports."""
    batches: Iterable[Batch]
    """Finite for evaluation, endless for training."""
    bytes_per_token: float
    """Mean bytes of text per token."""


def beside(checkpoint: str, name: str) -> Path | None:
    """Find ``name`` in the model's folder or in its run (two levels up); None if absent."""
    return find_beside(model_directory(checkpoint), name)


def evaluation_batches(
    checkpoint: str, data: str, split: str, *, seq_len: int, windows: int, batch: int
) -> Source:
    """Read ``windows`` windows of a split of ``data``, by default of the model's own run.

    Raises:
        DataError: There is no prepared folder.
    """
    shards = TokenShards(data or _data_of_the_run(checkpoint), split)
    cut = EpochWindows(
        shards, seq_len=check_count("--seq_len", seq_len),
        global_batch=check_count("--batch", batch),
        max_windows=check_count("--windows", windows),
    )  # fmt: skip
    return Source(split, cut, shards.bytes_per_token)


def training_batches(checkpoint: str, data: str, *, seq_len: int, batch: int, seed: int) -> Source:
    """Read the training split of ``data``, by default of the model's own run, without end.

    Raises:
        DataError: There is no prepared folder.
    """
    shards = TokenShards(data or _data_of_the_run(checkpoint))
    windows = Loader(
        shards, seq_len=check_count("--seq_len", seq_len),
        global_batch=check_count("--batch", batch), seed=seed,
    )  # fmt: skip
    return Source("train", windows, shards.bytes_per_token)


def _data_of_the_run(checkpoint: str) -> str:
    run = beside(checkpoint, CONFIG_FILE)
    if run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint, value=CONFIG_FILE,
            allowed=f"{CONFIG_FILE} beside the model or in its run",
            fix="name prepared shards with --data",
        )  # fmt: skip
    return str(yaml.safe_load(run.read_text(encoding="utf-8"))["data"]["path"])
