"""Load models, tokenizers and text of stored runs for the commands."""

from __future__ import annotations

import shutil
from pathlib import Path

from open_mythos.checks import check_count
from open_mythos.data import TokenShards
from open_mythos.errors import ConfigError, DataError
from open_mythos.hub.places import model_directory, stored_tokenizer
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import CONFIG_FILE, TOKENIZER_FOLDER, find_beside, read_config
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.text import (
    Source,
    prepared_folder,
    tokenizer_of_model,
    training_batches,
    validation_batches,
)


def depth_of(
    model: CausalLM, n_loops: int | None, exit: str, min_loops: int | None = None
) -> Depth:
    """Return the depth that ``--n-loops``, ``--exit`` and ``--min-loops`` request."""
    if isinstance(model, OpenMythos):
        rule = exit_rule(exit, model) if exit else None
        if min_loops is None:
            return Depth(n_loops, rule)
        most = model.cfg.max_loop_iters if n_loops is None else n_loops
        if rule is None or min_loops > most:
            raise ConfigError(
                "nothing to keep from exiting earlier", where="--min-loops", value=min_loops,
                allowed=f"at most {most} loops, together with --exit", fix="omit --min-loops",
            )  # fmt: skip
        return Depth(n_loops, AtLeast(rule, min_loops))
    for option, value in (
        ("--n-loops", n_loops), ("--exit", exit or None), ("--min-loops", min_loops),
    ):  # fmt: skip
        if value is not None:
            raise ConfigError("a dense model has no loops", where=option, value=value)
    return Depth()


def copy_run_files(checkpoint: str, folder: Path) -> None:
    """Copy the tokenizer and configuration of a model's run into ``folder``."""
    for name in (TOKENIZER_FOLDER, CONFIG_FILE):
        found = find_beside(model_directory(checkpoint), name)
        if found is not None and found.is_dir():
            shutil.copytree(found, folder / name)
        elif found is not None:
            shutil.copy(found, folder / name)


def evaluation_source(
    checkpoint: str, data: str, split: str, *, seq_len: int, windows: int, batch: int
) -> Source:
    """Open evaluation batches of the shards ``data``, or of the run's text if it is empty.

    Raises:
        DataError: The text or its split does not exist.
    """
    config, tokenizer = _text(checkpoint, data)
    if split != "val":
        config.val = ""
    config.eval_windows = check_count("--windows", windows)
    sizes = {"seq_len": check_count("--seq_len", seq_len), "batch": check_count("--batch", batch)}
    source = None
    if split == "val" or prepared_folder(config):
        source = validation_batches(config, tokenizer, split=split, **sizes)
    if source is None:
        raise DataError(
            f"the text has no split {split!r}", where="--split", value=split,
            fix="name another split, or pass prepared shards that have it with --data",
        )  # fmt: skip
    return source


def training_source(checkpoint: str, data: str, *, seq_len: int, batch: int, seed: int) -> Source:
    """Open endless training batches of the shards ``data``, or of the run's text if it is empty.

    Raises:
        DataError: The text does not exist.
    """
    config, tokenizer = _text(checkpoint, data)
    config.workers = 0
    batches = training_batches(
        config, tokenizer, seq_len=check_count("--seq_len", seq_len),
        global_batch=check_count("--batch", batch), seed=seed,
    )  # fmt: skip
    return Source("train", batches, 0.0)


def _text(checkpoint: str, data: str) -> tuple[DataConfig, Tokenizer]:
    """Return the text, prepared shards or that of the model's run, and its tokenizer.

    Raises:
        DataError: The shards are of another tokenizer than the one stored with the model.
    """
    config = DataConfig(path=data) if data else _data_of_run(checkpoint)
    folder = prepared_folder(config)
    if not folder:
        return config, stored_tokenizer(checkpoint)
    return config, tokenizer_of_model(TokenShards(folder).tokenizer(), checkpoint, folder)


def _data_of_run(checkpoint: str) -> DataConfig:
    run = find_beside(model_directory(checkpoint), CONFIG_FILE)
    if run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint,
            allowed=f"{CONFIG_FILE} beside the model or in its run",
            fix="pass prepared shards with --data",
        )  # fmt: skip
    return RunConfig.from_dict({"data": read_config(run).get("data", {})}).data
