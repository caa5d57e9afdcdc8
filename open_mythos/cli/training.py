"""``open-mythos train``: data, model and trainer put together for one process."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from open_mythos.data import EpochWindows, Loader, TokenShards, prepare
from open_mythos.devices import training_dtype
from open_mythos.distributed import rank, world_size
from open_mythos.errors import ConfigError
from open_mythos.evaluation import evaluate_depths
from open_mythos.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, TOKENIZER_FOLDER
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import RunConfig, Trainer, build_model
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.snapshot import checkpoints
from open_mythos.train.parallel.process_group import first_decides, process_group

DEFAULT_OUT = "runs/train"


def train_run(config: RunConfig, *, resume: str, quiet: bool) -> int:
    """Train as ``config`` says; the run's folder then holds all that the other commands need.

    Under ``torchrun`` all processes do it together.
    """
    config = deepcopy(config)
    config.train.out_dir = out_dir = config.train.out_dir or DEFAULT_OUT
    config.validate()
    out = Path(out_dir)
    if not resume and (out / "checkpoints").exists():
        raise ConfigError(
            "the folder holds a run", where="train.out_dir", value=out_dir,
            fix="go on with it by --resume latest, or name another folder",
        )  # fmt: skip
    with process_group(config.parallel, config.train.device):
        quiet = quiet or rank() > 0
        config.data.path = config.data.path or str(first_decides(lambda: _standard_library(out)))
        with TrainProgress(config.train.steps, quiet) as progress:
            trainer = build_trainer(config, loggers=[progress])
            if resume and not (resume == "auto" and not checkpoints(out / CHECKPOINTS_FOLDER)):
                latest = resume in ("auto", "latest", "strict")
                trainer.resume("latest" if latest else resume, strict=resume == "strict")
            if rank() == 0:
                keep_what_defines_the_run(config, out)
            trainer.fit()
    if not quiet:
        Console(stderr=True).print(f"[bold]{out}[/]: checkpoints, metrics.jsonl, {CONFIG_FILE}")
    return 0


def build_trainer(config: RunConfig, *, loggers: list[Any]) -> Trainer:
    """Loader, untrained model and trainer of a run.

    Raises:
        ConfigError: The vocabulary of the data does not fit the model.
        DataError: ``data.path`` is not a prepared folder.
    """
    shards = TokenShards(config.data.path)
    tokenizer = shards.tokenizer()
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            "the model's vocabulary is smaller than the data's", where="model.vocab_size",
            value=config.model.vocab_size, allowed=f">= {tokenizer.vocab_size} ({tokenizer.name})",
        )  # fmt: skip
    loader = Loader(
        shards, seq_len=config.train.seq_len, global_batch=config.train.global_batch,
        seed=config.train.seed, mask_documents=config.data.document_masks,
        rank=rank(), world_size=world_size(),
    )  # fmt: skip
    return Trainer(
        build_model(config), loader, config, evaluate=evaluation(config), loggers=loggers
    )


def evaluation(config: RunConfig) -> Any:
    """What the trainer calls to measure: loss and bits per byte on the validation split."""
    if "val" not in TokenShards(config.data.path).index.splits:
        return None
    shards = TokenShards(config.data.path, "val")
    windows = EpochWindows(
        shards,
        seq_len=config.train.seq_len,
        global_batch=world_size() * (config.train.micro_batch or config.train.global_batch),
        rank=rank(),
        world_size=world_size(),
        mask_documents=config.data.document_masks,
        max_windows=config.data.eval_windows,
    )

    def evaluate(model: Model, depths: list[int]) -> dict[str, Any]:
        rows = evaluate_depths(
            model, windows, depths, bytes_per_token=shards.bytes_per_token,
            dtype=training_dtype(config.train.dtype, model.head.weight.device),
        )  # fmt: skip
        return {"depths": [asdict(row) for row in rows]}

    return evaluate


class TrainProgress:
    """A live line of progress; a logger for the trainer."""

    def __init__(self, steps: int, quiet: bool = False, label: str = "training") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True), disable=quiet,
        )  # fmt: skip
        self._task = self._progress.add_task(label, total=steps, numbers="")

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Show a line of metrics."""
        if "eval/depths" in metrics:
            self._progress.console.print(f"step {step}: {_measured(metrics['eval/depths'])}")
        if "loss" in metrics:
            numbers = f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tok/s"
            self._progress.update(self._task, completed=step, numbers=numbers)


def _measured(rows: list[dict[str, Any]]) -> str:
    shown = (
        (f"{row['depth']} loops " if row["depth"] else "") + f"{row['bits_per_byte']:.3f}"
        for row in rows
    )
    return "bits per byte: " + ", ".join(shown)


def _standard_library(out: Path) -> Path:
    folder = out / "data"
    if not folder.exists():
        prepare("stdlib", folder, ByteTokenizer())
    return folder


def keep_what_defines_the_run(config: RunConfig, out: Path) -> None:
    """Configuration and tokenizer beside the checkpoints, for generate and evaluate."""
    TokenShards(config.data.path).tokenizer().save(out / TOKENIZER_FOLDER)
    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    (out / CONFIG_FILE).write_text(text, encoding="utf-8")
