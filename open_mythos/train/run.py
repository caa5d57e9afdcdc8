"""Build and train the run of a configuration.

>>> from open_mythos import mythos_nano
>>> from open_mythos.train import RunConfig, TrainConfig, train_run
>>> config = RunConfig(model=mythos_nano(), train=TrainConfig(steps=2, out_dir="runs/two"))
>>> train_run(config)                                                   # doctest: +SKIP
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from open_mythos.checks import checked
from open_mythos.data import Loader, StreamLoader
from open_mythos.distributed import rank, world_size
from open_mythos.errors import ConfigError
from open_mythos.evaluation import evaluate_depths
from open_mythos.files import locked, refuse_link, replacing
from open_mythos.hub.places import model_directory, weights_of
from open_mythos.hub.pretrained import describe, from_pretrained
from open_mythos.model.dense import DenseTransformer
from open_mythos.run_folder import (
    CHECKPOINTS_FOLDER,
    LOCK_FILE,
    ORIGIN_FILES,
    TOKENIZER_FOLDER,
    find_beside,
    write_config,
)
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.build import Model, build_model
from open_mythos.train.checkpoint.find import checkpoints, find_checkpoint
from open_mythos.train.config import RunConfig, fitting_micro_batch
from open_mythos.train.monitoring.metrics import MetricsLogger
from open_mythos.train.parallel.process_group import process_group
from open_mythos.train.setting import Setting
from open_mythos.train.state import TrainState
from open_mythos.train.text import (
    Source,
    open_tokenizer,
    training_batches,
    with_default_text,
)
from open_mythos.train.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train, on this rank."""

    config: RunConfig
    """The configuration with the actual vocabulary, micro-batch and text."""
    tokenizer: Tokenizer
    loader: Loader | StreamLoader
    trainer: Trainer

    def describe(self, out: Path) -> None:
        """Write configuration and tokenizer to the run's folder, and the model's origin."""
        refuse_link(out / TOKENIZER_FOLDER, "the tokenizer cannot be saved")
        self.tokenizer.save(out / TOKENIZER_FOLDER)
        write_config(out, self.config.to_dict())
        source = self.config.train.init_from
        for name in ORIGIN_FILES if source else ():
            if (found := find_beside(model_directory(source), name)) is not None:
                with replacing(out / name) as new:
                    shutil.copyfile(found, new)

    def close(self) -> None:
        """Stop the worker processes of the loader."""
        if isinstance(self.loader, StreamLoader):
            self.loader.close()


@checked
def build_run(
    config: RunConfig, *, loggers: Sequence[MetricsLogger] = (), fit_vocabulary: bool = False
) -> Run:
    """Build tokenizer, loader, model, evaluation and trainer of a run.

    Under a launcher, call it within :func:`~open_mythos.train.process_group`.

    Args:
        config: The run; copied.
        loggers: Additional receivers of metrics, besides ``metrics.jsonl``.
        fit_vocabulary: Set the model's vocabulary to the tokenizer's.

    Raises:
        ConfigError: The configuration is invalid, or the vocabulary is too small.
        DataError: Text, tokenizer or initial weights are missing or damaged.
        EnvironmentError_: The hub cannot be reached.
    """
    config = deepcopy(config)
    config.validate()
    config.model.require_causal("model.causal")
    train = config.train
    if train.global_batch % world_size() == 0:  # else the loader raises
        local = train.global_batch // world_size()
        fitting = fitting_micro_batch(train.micro_batch, local)
        if fitting != train.micro_batch and rank() == 0:
            logger.warning(
                "train.micro_batch is lowered from %s to %s, a divisor of the %d sequences per "
                "process", train.micro_batch, fitting, local,
            )  # fmt: skip
        train.micro_batch = fitting
    if train.warmup_steps >= train.steps and rank() == 0:
        logger.warning(
            "the learning rate never arrives: train.warmup_steps is %d, train.steps %d",
            train.warmup_steps, train.steps,
        )  # fmt: skip
    tokenizer = open_tokenizer(config)
    if fit_vocabulary and not train.init_from:
        config.model.vocab_size = tokenizer.vocab_size
    elif config.model.vocab_size < len(tokenizer):
        raise ConfigError(
            "the model's vocabulary is smaller than the tokenizer's", where="model.vocab_size",
            value=config.model.vocab_size, allowed=f">= {len(tokenizer)} ({tokenizer.name})",
            fix="leave it out, or use the tokenizer of the model",
        )  # fmt: skip
    loader = training_batches(
        config.data, tokenizer, seq_len=train.seq_len, global_batch=train.global_batch,
        seed=train.seed,
    )  # fmt: skip
    setting = Setting.of(config, tokenizer)
    validation = setting.validation()
    evaluate = None if validation is None else partial(_evaluate, setting, validation)
    trainer = Trainer(initial_model(config), loader, config, evaluate=evaluate, loggers=loggers)
    return Run(config, tokenizer, loader, trainer)


@checked
def train_run(
    config: RunConfig,
    *,
    resume: str = "",
    allow: Sequence[str] = (),
    loggers: Sequence[MetricsLogger] = (),
    fit_vocabulary: bool = False,
) -> TrainState:
    """Train a run and write all that the other commands need to its folder.

    Under ``torchrun``, call it in all processes.

    Args:
        config: The run. The default text is Python's standard library as bytes.
        resume: "" starts a new run; "latest" continues from the newest valid checkpoint, "strict"
            raises if the newest is damaged, "auto" starts a new run if there is none; a path
            continues from that checkpoint.
        allow: Fields such as "optim.lr" that may differ from those of the checkpoint.
        loggers: See :func:`build_run`.
        fit_vocabulary: See :func:`build_run`.

    Raises:
        ConfigError: The folder contains a run and ``resume`` is empty; see also
            :func:`build_run`.
        DataError: There is no checkpoint to resume from; see also :func:`build_run`.
        EnvironmentError_: Another process trains in the folder.
        PreemptedError: The run was interrupted and has saved its state.
    """
    config = deepcopy(config)
    if config.train.out_dir is None:
        raise ConfigError(
            "the run has no folder", where="train.out_dir", value=None, allowed="a folder",
            fix="add --train.out_dir runs/NAME",
        )  # fmt: skip
    config.validate()
    out = Path(config.train.out_dir)
    has_saved = bool(checkpoints(out / CHECKPOINTS_FOLDER))
    if has_saved and not resume:
        raise ConfigError(
            "the folder holds a run", where="train.out_dir", value=str(out),
            allowed="a new folder, or --resume",
            fix="continue it with --resume latest, or choose another folder",
        )  # fmt: skip
    if allow and not resume:
        raise ConfigError(
            "only a run that is resumed has saved settings", where="--allow", value=list(allow),
            allowed="together with --resume", fix="leave it out, or add --resume latest",
        )  # fmt: skip
    if not has_saved and resume in ("latest", "strict"):
        find_checkpoint(out / CHECKPOINTS_FOLDER)  # raises, before any text is prepared
    with (
        process_group(config.parallel, config.train.device),
        locked(out / LOCK_FILE, active=rank() == 0),
    ):
        with_default_text(config, out)
        run = build_run(config, loggers=loggers, fit_vocabulary=fit_vocabulary)
        try:
            if resume and (has_saved or resume != "auto"):
                newest = resume in ("auto", "latest", "strict")
                run.trainer.resume(
                    "latest" if newest else resume, strict=resume == "strict", allow=allow
                )
            if rank() == 0:
                run.describe(out)
                step = run.trainer.state.step
                if step >= config.train.steps:
                    logger.warning(
                        "nothing is left to train: the run has %d steps, train.steps is %d",
                        step, config.train.steps,
                    )  # fmt: skip
            return run.trainer.fit()
        finally:
            run.close()


def initial_model(config: RunConfig) -> Model:
    """Build the model of a run, with the weights of ``train.init_from`` if it is set.

    Raises:
        ConfigError: The configuration is not that of the stored model.
    """
    model = build_model(config)
    if config.train.init_from:
        stored = from_pretrained(config.train.init_from)
        if weights_of(model_directory(config.train.init_from)) == "averaged" and rank() == 0:
            logger.warning(
                "starts from the raw weights of %s; open-mythos export writes its averages",
                config.train.init_from,
            )
        if (
            config.architecture == "dense"
            and isinstance(stored, DenseTransformer)
            and config.model == stored.cfg  # as --checkpoint sets it, not the looped counterpart
        ):
            model = DenseTransformer(stored.cfg, stored.n_layers)
        if describe(stored) != describe(model):
            raise ConfigError(
                "the configuration is not that of the stored model", where="train.init_from",
                value=describe(model), allowed=str(describe(stored)),
                fix="leave --model.* and --architecture as the checkpoint has them",
            )  # fmt: skip
        model.load_state_dict(stored.state_dict())
    return model


def _evaluate(setting: Setting, source: Source, model: Model, depths: list[int]) -> dict[str, Any]:
    """Return loss and bits per byte at the given depths."""
    rows = evaluate_depths(model, source.batches, depths, **setting.options(source, model))
    return {"depths": [asdict(row) for row in rows]}
