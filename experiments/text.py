"""Language models on text that every machine has: Python's own standard library, as bytes."""

from __future__ import annotations

import platform
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.claim import Cell, Place
from experiments.synthetic import Curves
from open_mythos.accounting import account
from open_mythos.data import Batch, EpochWindows, Loader, TokenShards, prepare
from open_mythos.devices import resolve_dtype
from open_mythos.errors import DataError
from open_mythos.evaluation import evaluate_depths
from open_mythos.model.dense import DenseTransformer
from open_mythos.seeding import derive_seed
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import RunConfig, Trainer, build_model, find_checkpoint
from open_mythos.train.build import Model

VOCABULARY = ByteTokenizer().vocab_size
_VAL_FRACTION = 0.03


def standard_library(shared: Path) -> Path:
    """The prepared text in ``shared``, made at the first call on a machine."""
    folder = shared / f"stdlib-{platform.python_version()}"
    if not folder.exists():
        mine = shared / f".stdlib-{secrets.token_hex(4)}"
        prepare("stdlib", mine, ByteTokenizer(), val_fraction=_VAL_FRACTION)
        try:
            mine.rename(folder)
        except OSError:  # another worker was first
            shutil.rmtree(mine)
    return folder


def validation(folder: Path, *, seq_len: int, windows: int, batch: int = 32) -> list[Batch]:
    """The first windows of unseen files."""
    shards = TokenShards(folder, "val")
    return list(
        EpochWindows(shards, seq_len=seq_len, global_batch=min(batch, windows), max_windows=windows)
    )


@dataclass(frozen=True)
class Trained:
    """A trained model, its text and what it cost."""

    model: Model
    run: RunConfig
    batches: list[Batch]
    curve: list[tuple[int, float]]

    def losses(self, depths: list[int]) -> list[float]:
        """Validation loss at each depth, nats per byte; a dense model has one."""
        dtype = resolve_dtype(self.run.train.dtype)
        return [row.loss for row in evaluate_depths(self.model, self.batches, depths, dtype=dtype)]

    def costs(self) -> dict[str, Any]:
        """Parameters without embedding and head, tokens, and training FLOPs at the mean depth."""
        counts = account(self.model, context=self.run.train.seq_len)
        tokens = self.run.train.steps * self.run.train.global_batch * self.run.train.seq_len
        return {
            "parameters": counts.parameters_without_embedding,
            "tokens": tokens,
            "training_flops": tokens * counts.training_flops(self.run.depth.expected),
            "curve": self.curve,
        }


def train(cell: Cell, place: Place, change: Callable[[Model], Any] = lambda model: None) -> Trained:
    """Train the language model that ``cell.settings`` describe.

    The settings hold "run", the sections of a :class:`RunConfig`; "val_windows"; "save_every",
    steps between two checkpoints, from which an interrupted training goes on (0: none); and, for a
    dense model of a certain depth, "n_layers".

    Args:
        cell: What to train; the seed is the cell's.
        place: Where text and checkpoints are.
        change: Alters the untrained model.
    """
    run = RunConfig.from_dict(cell.settings["run"])
    run.train.seed = cell.seed
    run.train.save_every = cell.settings["save_every"]
    run.train.out_dir = str(place.own) if run.train.save_every else None
    run.data.path = str(standard_library(place.shared))
    loader = Loader(
        TokenShards(run.data.path), seq_len=run.train.seq_len, global_batch=run.train.global_batch,
        seed=cell.seed,
    )  # fmt: skip
    model = _build(run, cell.settings.get("n_layers"))
    change(model)
    curves = Curves("loss")
    trainer = Trainer(model, loader, run, loggers=[curves])
    with suppress(DataError):  # a run that was killed early has no whole checkpoint
        trainer.resume(find_checkpoint(place.own / "checkpoints"))
    trainer.fit()
    batches = validation(
        Path(run.data.path), seq_len=run.train.seq_len, windows=cell.settings["val_windows"]
    )
    return Trained(trainer.model, run, batches, curves.points["loss"])


def _build(run: RunConfig, n_layers: int | None) -> Model:
    if n_layers is None:
        return build_model(run)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(run.train.seed, "init"))
        return DenseTransformer(run.model, n_layers)
