"""Batches of what a model was made for: the token shards of its run, or chains of relations.

A file ``task.json`` beside the model, {"task": "permhop", "entities": 16, "relations": 8,
"seed": 0}, says that it is chains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from open_mythos.cli.trace.chain import read_chains
from open_mythos.config import check_count
from open_mythos.data import Batch, EpochWindows, Loader, PermHop, TokenShards
from open_mythos.errors import DataError
from open_mythos.hub.pretrained import model_directory
from open_mythos.run_folder import CONFIG_FILE, TASK_FILE, find_beside

HOPS = 10
"""Relations of every chain; each prefix is a question, so that 1 to 10 hops are mixed."""
_FRESH = 1 << 20
"""First step of the chains a gate learns from: far beyond those of a training run."""


@dataclass(frozen=True)
class Source:
    """Where batches come from."""

    name: str
    """What they are, in a few words."""
    batches: Iterable[Batch]
    """For evaluation a finite sequence, for training an endless stream."""
    bytes_per_token: float | None
    """Bytes of text that a token stands for on average; None where there is no text."""


def beside(checkpoint: str, name: str) -> Path | None:
    """``name`` in the model's folder, or in the run's folder two levels up; None if absent."""
    return find_beside(model_directory(checkpoint), name)


def task_of(checkpoint: str) -> PermHop | None:
    """The task kept with a model; None where it is text.

    Raises:
        DataError: ``task.json`` does not describe a task.
    """
    path = beside(checkpoint, TASK_FILE)
    return None if path is None else read_chains(path).task


def evaluation_batches(
    checkpoint: str, data: str, split: str, *, seq_len: int, windows: int, batch: int
) -> Source:
    """Sequences to measure on: ``windows`` windows of a split, or as many tokens in chains.

    Of chains the held-out prefixes are asked, which no training has seen.

    Raises:
        DataError: There is neither a task nor a prepared folder.
    """
    task = None if data else task_of(checkpoint)
    if task is None:
        shards = TokenShards(data or _data_of_the_run(checkpoint), split)
        cut = EpochWindows(shards, seq_len=seq_len, global_batch=batch, max_windows=windows)
        return Source(split, cut, shards.bytes_per_token)
    rows, steps = _rows(batch, seq_len), -(-check_count("--windows", windows) // batch)
    chains = [
        task.batch(step, global_batch=rows, hops=HOPS, held_out=True) for step in range(steps)
    ]
    return Source(f"unseen chains of up to {HOPS} relations", chains, None)


def training_batches(checkpoint: str, data: str, *, seq_len: int, batch: int, seed: int) -> Source:
    """An endless stream to train a gate on: the training split, or chains that training draws.

    Raises:
        DataError: There is neither a task nor a prepared folder.
    """
    task = None if data else task_of(checkpoint)
    if task is None:
        shards = TokenShards(data or _data_of_the_run(checkpoint))
        windows = Loader(shards, seq_len=seq_len, global_batch=batch, seed=seed)
        return Source("train", windows, shards.bytes_per_token)
    stream = _chains(task, _rows(batch, seq_len), seed)
    return Source(f"chains of up to {HOPS} relations", stream, None)


def _rows(batch: int, seq_len: int) -> int:
    """Chains that have as many tokens as ``batch`` sequences."""
    tokens = check_count("--batch", batch) * check_count("--seq_len", seq_len)
    return max(1, tokens // (HOPS + 1))


def _chains(task: PermHop, rows: int, seed: int) -> Iterator[Batch]:
    step = _FRESH * (1 + seed)
    while True:
        yield task.batch(step, global_batch=rows, hops=HOPS)
        step += 1


def _data_of_the_run(checkpoint: str) -> str:
    run = beside(checkpoint, CONFIG_FILE)
    if run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint, value=CONFIG_FILE,
            allowed=f"{CONFIG_FILE} or {TASK_FILE} beside the model or in its run",
            fix="name prepared shards with --data",
        )  # fmt: skip
    return str(yaml.safe_load(run.read_text(encoding="utf-8"))["data"]["path"])
