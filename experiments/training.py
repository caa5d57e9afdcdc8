"""Shared training helpers: run, model, logged metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from experiments.claim import Cell
from experiments.tasks.loader import ChainLoader
from open_mythos.accounting import account
from open_mythos.errors import DataError
from open_mythos.model.dense import DenseTransformer
from open_mythos.seeding import derive_seed
from open_mythos.train import RunConfig, Trainer, build_model, find_checkpoint
from open_mythos.train.build import Model


def run_of(cell: Cell) -> RunConfig:
    """Build the RunConfig from ``cell.settings["run"]`` with the cell's seed."""
    run = RunConfig.from_dict(cell.settings["run"])
    run.train.seed = cell.seed
    return run


@contextmanager
def seeded(seed: int, stream: str = "init") -> Iterator[None]:
    """Seed torch's default CPU generator inside the block and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, stream))
        yield


def build(run: RunConfig, *, n_layers: int | None = None, unrolled: int | None = None) -> Model:
    """Build the untrained model of a run.

    Args:
        run: Configuration of the run.
        n_layers: Build a dense model with this many layers instead.
        unrolled: Build a dense model as deep as this many loops instead.
    """
    if n_layers is None and unrolled is None:
        return build_model(run)
    with seeded(run.train.seed):
        if n_layers is not None:
            return DenseTransformer(run.model, n_layers)
        return DenseTransformer.like(run.model, match="depth", n_loops=unrolled)


class Curves:
    """A trainer logger that keeps selected metrics as (step, value) points."""

    def __init__(self, *names: str) -> None:
        self.points: dict[str, list[tuple[int, Any]]] = {name: [] for name in names}

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the selected metrics."""
        for name, points in self.points.items():
            if name in metrics:
                points.append((step, metrics[name]))


def fit(
    model: Model,
    loader: Any,
    run: RunConfig,
    *names: str,
    evaluate: Any = None,
    checkpoints: Path | None = None,
) -> dict[str, list[tuple[int, Any]]]:
    """Train ``model`` in place and return the curves of "loss" and the metrics ``names``.

    Resume from the newest complete checkpoint in ``checkpoints``, if there is one.
    """
    curves = Curves("loss", *names)
    trainer = Trainer(model, loader, run, evaluate=evaluate, loggers=[curves])
    if checkpoints is not None:
        with suppress(DataError):  # killed before its first checkpoint
            trainer.resume(find_checkpoint(checkpoints))
    trainer.fit()
    return curves.points


def costs(
    model: Model, run: RunConfig, *, tokens: int | None = None, context: int | None = None
) -> dict[str, Any]:
    """Return non-embedding parameters, tokens and training FLOPs at the mean depth.

    The loops of long steps are included.

    Args:
        model: Trained model.
        run: Its run.
        tokens: Tokens of training; steps, batch and sequence length of ``run`` by default.
        context: Positions that a token attends to; the sequence length by default.
    """
    train, depth = run.train, run.depth
    if tokens is None:
        tokens = train.steps * train.global_batch * train.seq_len
    counts = account(model, context=context or train.seq_len)
    per_token = counts.training_flops(depth.expected + depth.expected_further, depth.expected)
    return {
        "parameters": counts.parameters_without_embedding,
        "tokens": tokens,
        "training_flops": tokens * per_token,
    }


def chain_costs(model: Model, run: RunConfig, loader: ChainLoader, hops: int) -> dict[str, Any]:
    """Return the :func:`costs` of a run on chains of ``hops``, each a context of its own."""
    length = hops + 1
    return costs(model, run, tokens=loader.drawn(run.train.steps) * length, context=length)
