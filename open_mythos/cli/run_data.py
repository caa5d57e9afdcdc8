"""Models, tokenizers and text of a stored run, as the commands read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from open_mythos.checks import check_count
from open_mythos.data import TokenShards
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError, DataError
from open_mythos.hub.pretrained import from_pretrained, model_directory, stored_tokenizer
from open_mythos.inference.quantization import quantize
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import CONFIG_FILE, TOKENIZER_FOLDER, find_beside, read_config
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.config import DataConfig
from open_mythos.train.text import Source, prepared_folder, training_batches, validation_batches


def beside(checkpoint: str, name: str) -> Path | None:
    """Find ``name`` in the model's folder or in its run (two levels up); None if absent."""
    return find_beside(model_directory(checkpoint), name)


def load_model(checkpoint: str, device: str, quantised: str) -> CausalLM:
    """Load a model, quantized if ``quantised`` says how: "int8", "int4" or "int4:GROUP"."""
    model = from_pretrained(checkpoint, resolve_device(device))
    if not quantised:
        return model
    kind, colon, group = quantised.partition(":")
    if colon and not group.isdecimal():
        raise ConfigError(
            "not a group size", where="--quantize", value=quantised,
            allowed="int8, int4, or int4 with the size of its groups: int4:64",
        )  # fmt: skip
    return quantize(model, kind, group_size=int(group) if colon else None)


def depth_of(model: CausalLM, n_loops: int | None, exit: str) -> Depth:
    """Return the loops of every token, as the options say."""
    if isinstance(model, OpenMythos):
        return Depth(n_loops, exit_rule(exit, model) if exit else None)
    for option, value in (("--n-loops", n_loops), ("--exit", exit or None)):
        if value is not None:
            raise ConfigError("a dense model has no loops", where=option, value=value)
    return Depth()


def copy_run_files(checkpoint: str, folder: Path) -> None:
    """Copy what the other commands look for beside a model."""
    for name in (TOKENIZER_FOLDER, CONFIG_FILE):
        found = beside(checkpoint, name)
        if found is not None and found.is_dir():
            shutil.copytree(found, folder / name)
        elif found is not None:
            shutil.copy(found, folder / name)


def evaluation_source(
    checkpoint: str, data: str, split: str, *, seq_len: int, windows: int, batch: int
) -> Source:
    """Read windows of ``data``, by default of the text that the model's run evaluates on.

    Args:
        checkpoint: A model, a checkpoint or a run.
        data: Prepared shards; "" for those of the run.
        split: "val" or "train"; a stream has only the first.
        seq_len: Tokens of a sequence.
        windows: Sequences at most.
        batch: Sequences at a time.

    Raises:
        DataError: There is no such text.
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
            fix="name prepared shards with --data",
        )  # fmt: skip
    return source


def training_source(checkpoint: str, data: str, *, seq_len: int, batch: int, seed: int) -> Source:
    """Read ``data``, by default the text that the model's run was trained on, without end.

    Raises:
        DataError: There is no such text.
    """
    config, tokenizer = _text(checkpoint, data)
    config.workers = 0
    batches = training_batches(
        config, tokenizer, seq_len=check_count("--seq_len", seq_len),
        global_batch=check_count("--batch", batch), seed=seed,
    )  # fmt: skip
    return Source("train", batches, 0.0)


def _text(checkpoint: str, data: str) -> tuple[DataConfig, Tokenizer]:
    """Return prepared shards, or the text of the model's run, with its tokenizer."""
    config = DataConfig(path=data) if data else _data_of_run(checkpoint)
    if folder := prepared_folder(config):
        return config, TokenShards(folder).tokenizer()
    return config, stored_tokenizer(checkpoint)


def _data_of_run(checkpoint: str) -> DataConfig:
    run = beside(checkpoint, CONFIG_FILE)
    if run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint, value=CONFIG_FILE,
            allowed=f"{CONFIG_FILE} beside the model or in its run",
            fix="name prepared shards with --data",
        )  # fmt: skip
    values: dict[str, Any] = read_config(run).get("data", {})
    return DataConfig(**values)
