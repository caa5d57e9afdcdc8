"""Load models, tokenizers and text of stored runs for the commands."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_mythos.checks import check_count, pick
from open_mythos.data import TokenShards
from open_mythos.data.corpus import STDLIB
from open_mythos.devices import resolve_device
from open_mythos.errors import ConfigError, DataError
from open_mythos.files import read_object
from open_mythos.hub.places import is_sharded, model_directory, stored_tokenizer
from open_mythos.inference.loading import load_model, quantized
from open_mythos.model.causal_lm import CausalLM
from open_mythos.model.depth import Depth
from open_mythos.model.exit_rules import AtLeast, exit_rule
from open_mythos.model.mythos import OpenMythos
from open_mythos.run_folder import (
    AVERAGE_FILE,
    CONFIG_FILE,
    GATE_FILE,
    PROVENANCE_FILE,
    TOKENIZER_FOLDER,
    find_beside,
    read_config,
)
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.checkpoint.restore import holds_file
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.optimizers.ema import averaged_model
from open_mythos.train.text import (
    Source,
    prepared_folder,
    tokenizer_of_model,
    training_batches,
    validation_batches,
)

SEQ_LEN = 256
"""Length of the sequences of a model without a run."""


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
            raise ConfigError(
                "a dense model has no loops", where=option, value=value, allowed="looped models"
            )
    return Depth()


def copy_run_files(checkpoint: str, folder: Path) -> None:
    """Copy the tokenizer and configuration of a model's run into ``folder``."""
    for name in (TOKENIZER_FOLDER, CONFIG_FILE):
        found = find_beside(model_directory(checkpoint), name)
        if found is not None and found.is_dir():
            shutil.copytree(found, folder / name)
        elif found is not None:
            shutil.copy(found, folder / name)


@dataclass(frozen=True)
class Setting:
    """How a stored model is evaluated: the options of a command, else the setting of its run."""

    data: DataConfig
    tokenizer: Tokenizer
    seq_len: int
    batch: int
    dtype: str

    def described(self) -> dict[str, Any]:
        """Return what a number depends on, JSON-ready."""
        data = self.data
        return {
            "data": data.val or data.path or data.source, "seq_len": self.seq_len,
            "windows": data.eval_windows, "document_masks": data.document_masks,
            "dtype": self.dtype,
        }  # fmt: skip


def setting_of(
    checkpoint: str, data: str = "", *, seq_len: int | None = None, windows: int | None = None,
    batch: int | None = None, dtype: str = "",
) -> Setting:  # fmt: skip
    """Return the evaluation of the run that ``checkpoint`` belongs to, where no option changes it.

    Document masks are always those of the run: a model that was trained with them has seen no
    other text in front of a document.

    Raises:
        DataError: The text does not exist, or is of another tokenizer than the model.
    """
    folder = model_directory(checkpoint)
    run = find_beside(folder, CONFIG_FILE)
    values = read_config(run) if run is not None else {}
    known = RunConfig.from_dict({"data": values.get("data") or {}})
    train: Any = values.get("train") if isinstance(values.get("train"), dict) else {}
    if data:
        text = DataConfig(path=data, document_masks=known.data.document_masks)
    elif run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint, value=CONFIG_FILE,
            allowed=f"{CONFIG_FILE} beside the model or in its run",
            fix="pass prepared shards with --data",
        )  # fmt: skip
    else:
        text = _found(known.data, run.parent, str(train.get("out_dir") or ""))
    text.eval_windows = check_count("--windows", _first(windows, known.data.eval_windows))
    prepared = prepared_folder(text)
    if prepared:
        tokenizer = tokenizer_of_model(TokenShards(prepared).tokenizer(), checkpoint, prepared)
    else:
        tokenizer = stored_tokenizer(checkpoint)
    sizes = train.get("micro_batch"), train.get("global_batch")
    return Setting(
        text, tokenizer,
        seq_len=check_count("--seq_len", _first(seq_len, train.get("seq_len"), SEQ_LEN)),
        batch=check_count("--batch", _first(batch, *sizes, 16)),
        dtype=dtype or str(train.get("dtype") or "float32"),
    )  # fmt: skip


def _first(*values: Any) -> Any:
    """Return the first that is not None."""
    return next(value for value in values if value is not None)


def _found(data: DataConfig, run: Path, out_dir: str) -> DataConfig:
    """Return ``data`` with paths that exist: relative ones are meant from where the run began."""
    for name in ("path", "source", "val"):
        text = getattr(data, name)
        if text and text != STDLIB and "://" not in text:
            setattr(data, name, _find(text, run.resolve(), out_dir))
    return data


def _find(text: str, run: Path, out_dir: str) -> str:
    path, out = Path(text), Path(out_dir)
    places = []
    if out_dir and path.is_relative_to(out):  # inside of the run, which may have moved
        places.append(run / path.relative_to(out))
    if not path.is_absolute():
        if out_dir and not out.is_absolute() and run.parts[-len(out.parts) :] == out.parts:
            places.append(Path(*run.parts[: -len(out.parts)]) / path)
        places += [parent / path for parent in (run, *list(run.parents)[:3])]
    places.append(path.absolute())
    for place in places:
        if place.exists():
            return str(place)
    raise DataError(
        "the text of the run is not there", where=str(run / CONFIG_FILE), value=text,
        allowed=" or ".join(dict.fromkeys(map(str, places))),
        fix="pass prepared shards with --data",
    )  # fmt: skip


def evaluation_source(setting: Setting, split: str) -> Source:
    """Open the evaluation batches of a setting.

    Raises:
        DataError: The text or its split does not exist.
    """
    config, source = replace(setting.data), None
    if split != "val":
        config.val = ""
    if split == "val" or prepared_folder(config):
        source = validation_batches(
            config, setting.tokenizer, split=split, seq_len=setting.seq_len, batch=setting.batch
        )
    if source is None:
        raise DataError(
            f"the text has no split {split!r}", where="--split", value=split,
            allowed="a split of prepared shards; val of a run with held-out text",
            fix="name another split, or pass prepared shards that have it with --data",
        )  # fmt: skip
    return source


def training_source(setting: Setting, seed: int) -> Source:
    """Open endless training batches of a setting.

    Raises:
        DataError: The text does not exist.
    """
    config = replace(setting.data, workers=0)
    batches = training_batches(
        config, setting.tokenizer, seq_len=setting.seq_len, global_batch=setting.batch, seed=seed
    )
    return Source("train", batches, 0.0)


def stored_model(
    checkpoint: str, device: str, quantize: str = "", weights: str = ""
) -> tuple[CausalLM, str]:
    """Load a model and say which weights it has: "averaged" or "raw".

    By default the averages where a run keeps them: the run's own evaluations use them.

    Raises:
        ConfigError: ``weights`` is neither, or there are no averages.
    """
    pick(("", "raw", "averaged"), weights, "--weights", what="kind of weights")
    folder = model_directory(checkpoint)
    single = (folder / AVERAGE_FILE).is_file()
    has_averages = single or (is_sharded(folder) and holds_file(folder, AVERAGE_FILE))
    if weights == "raw" or not (weights or has_averages):
        return load_model(checkpoint, device, quantize), "raw"
    target = resolve_device(device)
    model = averaged_model(folder).to(target).eval()
    return quantized(model, quantize), "averaged"


def say_weights(weights: str) -> None:
    """Say that the averaged weights are used, on standard error."""
    if weights == "averaged":
        print("weights: the run's averages (--weights raw for the others)", file=sys.stderr)


def say_untrained_gate(checkpoint: str, exit: str) -> None:
    """Say that nobody trained the gate that an exit rule asks, on standard error."""
    folder = model_directory(checkpoint)
    if exit.partition(":")[0] != "gate" or find_beside(folder, GATE_FILE):
        return
    origin = folder / PROVENANCE_FILE
    if origin.is_file() and read_object(origin, "the provenance cannot be read").get("gate"):
        return
    print("note: the gate of this model was never trained: open-mythos train gate", file=sys.stderr)
