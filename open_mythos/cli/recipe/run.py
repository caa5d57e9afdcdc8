"""Training as a recipe says."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from open_mythos.cli.recipe.options import Recipe, fitting_micro_batch
from open_mythos.cli.recipe.text import Text, recipe_text, recipe_tokenizer
from open_mythos.cli.training import TrainProgress
from open_mythos.data import StreamLoader
from open_mythos.distributed import rank, world_size
from open_mythos.errors import ConfigError
from open_mythos.hub.pretrained import describe, from_pretrained
from open_mythos.run_folder import CHECKPOINTS_FOLDER, CONFIG_FILE, TOKENIZER_FOLDER
from open_mythos.tokenizer import Tokenizer
from open_mythos.train import MetricsLogger, RunConfig, Trainer, TrainState, build_model
from open_mythos.train.build import Model
from open_mythos.train.checkpoint.snapshot import checkpoints
from open_mythos.train.parallel.process_group import process_group

SOURCE_FILE = "source.json"
"""In the run's folder: which text it was trained on."""


def train_recipe(recipe: Recipe) -> TrainState:
    """Train; the run's folder then holds all that the other commands need.

    Raises:
        ConfigError: The configuration does not fit the tokenizer, or the folder holds a run.
        DataError, EnvironmentError_: The source or the tokenizer cannot be had.
        PreemptedError: The run was told to stop, and has saved.
    """
    config = deepcopy(recipe.config)
    out = _folder(config)
    has_checkpoints = bool(checkpoints(out / CHECKPOINTS_FOLDER))
    if not recipe.resume and has_checkpoints:
        raise ConfigError(
            "the folder holds a run", where="train.out_dir", value=str(out),
            fix="go on with it by --resume latest, or name another folder",
        )  # fmt: skip
    with process_group(config.parallel, config.train.device):
        if config.train.global_batch % world_size() == 0:  # the trainer refuses it otherwise
            local = config.train.global_batch // world_size()
            config.train.micro_batch = fitting_micro_batch(config.train.micro_batch, local)
        tokenizer = recipe_tokenizer(recipe)
        set_vocabulary(config, tokenizer, fixed=recipe.vocabulary_given or bool(recipe.checkpoint))
        text = recipe_text(recipe, config, tokenizer)
        try:
            with _progress(config.train.steps, recipe.quiet) as loggers:
                trainer = Trainer(
                    _model(recipe, config), text.loader, config, evaluate=text.evaluate,
                    loggers=loggers,
                )  # fmt: skip
                if recipe.resume and not (recipe.resume == "auto" and not has_checkpoints):
                    newest = recipe.resume in ("auto", "latest", "strict")
                    trainer.resume(
                        "latest" if newest else recipe.resume, strict=recipe.resume == "strict"
                    )
                if rank() == 0:
                    _keep_what_defines_the_run(config, text, out)
                return trainer.fit()
        finally:
            if isinstance(text.loader, StreamLoader):
                text.loader.close()


def set_vocabulary(config: RunConfig, tokenizer: Tokenizer, *, fixed: bool) -> None:
    """Make the model's vocabulary that of the tokenizer; one that is fixed has to hold it.

    Raises:
        ConfigError: It does not.
    """
    if not fixed:
        config.model.vocab_size = tokenizer.vocab_size
    elif config.model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's", where="model.vocab_size",
            value=config.model.vocab_size, allowed=f">= {tokenizer.vocab_size} ({tokenizer.name})",
            fix="leave it out, or name the tokenizer that the model was made for",
        )  # fmt: skip


def _folder(config: RunConfig) -> Path:
    if config.train.out_dir is None:
        raise ConfigError(
            "the run has no folder", where="train.out_dir", value=None, allowed="a folder",
            fix="say --train.out_dir runs/NAME",
        )  # fmt: skip
    return Path(config.train.out_dir)


def _model(recipe: Recipe, config: RunConfig) -> Model:
    model = build_model(config)
    if recipe.checkpoint:
        stored = from_pretrained(recipe.checkpoint)
        if describe(stored) != describe(model):
            raise ConfigError(
                "the configuration is not that of the checkpoint", where="--checkpoint",
                value=describe(model), allowed=str(describe(stored)),
                fix="leave --model.* and --architecture as the checkpoint has them",
            )  # fmt: skip
        model.load_state_dict(stored.state_dict())
    return model


def _keep_what_defines_the_run(config: RunConfig, text: Text, out: Path) -> None:
    """Configuration, tokenizer and source beside the checkpoints."""
    text.tokenizer.save(out / TOKENIZER_FOLDER)
    run = yaml.safe_dump(config.to_dict(), sort_keys=False)
    (out / CONFIG_FILE).write_text(run, encoding="utf-8")
    (out / SOURCE_FILE).write_text(json.dumps(text.about, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _progress(steps: int, quiet: bool) -> Iterator[list[MetricsLogger]]:
    """A live line at a terminal, else a line of text each time."""
    if quiet or rank() > 0:
        yield []
    elif sys.stderr.isatty():
        with TrainProgress(steps) as progress:
            yield [progress]
    else:
        yield [Lines(steps)]


class Lines:
    """Prints metrics to standard error, for the logs of clusters."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Print a line."""
        words = [f"step {step:,}/{self._steps:,}"]
        if "loss" in metrics:
            words += [
                f"loss {metrics['loss']:.4f}", f"lr {metrics['lr']:.3g}",
                f"gradient {metrics['grad_norm']:.3g}",
                f"{metrics['tokens_per_second']:,.0f} tokens/s",
            ]  # fmt: skip
        for row in metrics.get("eval/depths", []):
            depth = "" if row["depth"] is None else f" at {row['depth']} loops"
            words.append(f"held-out loss {row['loss']:.4f}{depth}")
        if len(words) > 1:
            print("  ".join(words), file=sys.stderr, flush=True)
