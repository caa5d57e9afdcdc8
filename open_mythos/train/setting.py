"""How a run is evaluated: one definition, for its trainer and for all that looks at it later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from open_mythos.checks import check_count
from open_mythos.data import TokenShards
from open_mythos.data.corpus import STDLIB
from open_mythos.devices import training_dtype
from open_mythos.errors import DataError
from open_mythos.hub.places import model_directory, stored_tokenizer, tokenizer_of_model
from open_mythos.model.causal_lm import CausalLM
from open_mythos.run_folder import CONFIG_FILE, find_beside, read_config
from open_mythos.tokenizer import Tokenizer
from open_mythos.train.config import DataConfig, RunConfig
from open_mythos.train.text import (
    Source,
    prepared_folder,
    training_batches,
    validation_batches,
)

_READ = {
    "train": ("seq_len", "global_batch", "micro_batch", "dtype", "out_dir"), "optim": ("ema_decay",)
}  # fmt: skip
"""Section -> fields on which an evaluation depends, beside the text."""


@dataclass(frozen=True)
class Setting:
    """The evaluation of a run: text and masks, length and number of sequences, dtype."""

    data: DataConfig
    tokenizer: Tokenizer
    seq_len: int
    batch: int
    """Sequences per process and forward pass."""
    dtype: str

    @classmethod
    def of(cls, config: RunConfig, tokenizer: Tokenizer) -> Setting:
        """Return the evaluation of the run ``config``."""
        train = config.train
        batch = train.micro_batch or train.global_batch
        return cls(config.data, tokenizer, train.seq_len, batch, train.dtype)

    def validation(self) -> Source | None:
        """Open the validation text of the run; None if there is none.

        Raises:
            DataError: It is missing, damaged, too short, or of another tokenizer.
        """
        return validation_batches(self.data, self.tokenizer, seq_len=self.seq_len, batch=self.batch)

    def source(self, split: str) -> Source:
        """Open the evaluation batches of the text.

        Raises:
            DataError: The text or its split does not exist.
        """
        found = None
        if split == "val":
            found = self.validation()
        elif prepared_folder(self.data):
            found = validation_batches(
                replace(self.data, val=""), self.tokenizer, split=split, seq_len=self.seq_len,
                batch=self.batch,
            )  # fmt: skip
        if found is None:
            raise DataError(
                f"the text has no split {split!r}", where="--split", value=split,
                allowed="a split of prepared shards; val of a run with held-out text",
                fix="name another split, or pass prepared shards that have it with --data",
            )  # fmt: skip
        return found

    def training_source(self, seed: int) -> Source:
        """Open endless training batches of the text.

        Raises:
            DataError: The text does not exist.
        """
        batches = training_batches(
            replace(self.data, workers=0), self.tokenizer, seq_len=self.seq_len,
            global_batch=self.batch, seed=seed,
        )  # fmt: skip
        return Source("train", batches, 0.0)

    def options(self, source: Source, model: CausalLM) -> dict[str, Any]:
        """Return the keyword arguments of ``evaluate_depths`` and ``evaluate_exits``."""
        dtype = training_dtype(self.dtype, model.final_norm.weight.device)
        return {"bytes_per_token": source.bytes_per_token, "dtype": dtype}

    def described(self) -> dict[str, Any]:
        """Return what a number depends on, JSON-ready."""
        return _described(self.data, self.seq_len, self.dtype)


def described_run(values: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return :meth:`Setting.described` of a run's configuration, and the weights it evaluates.

    None if the configuration does not hold them.
    """
    try:
        known = _evaluated(values or {})
    except (TypeError, ValueError):
        return None
    weights = "averaged" if known.optim.ema_decay else "raw"
    return _described(known.data, known.train.seq_len, known.train.dtype) | {"weights": weights}


def _described(data: DataConfig, seq_len: int, dtype: str) -> dict[str, Any]:
    return {
        "data": data.val or data.path or data.source, "seq_len": seq_len,
        "windows": data.eval_windows, "document_masks": data.document_masks, "dtype": dtype,
    }  # fmt: skip


def _evaluated(values: Mapping[str, Any]) -> RunConfig:
    """Return the fields of a stored configuration on which an evaluation depends.

    Other fields may be of another release.
    """
    return RunConfig.from_dict(
        {"data": values.get("data") or {}}
        | {name: _only(values.get(name) or {}, fields) for name, fields in _READ.items()}
    )


def _only(section: Any, fields: Sequence[str]) -> Any:
    if not isinstance(section, Mapping):
        return section  # refused as a section of a configuration
    return {name: section[name] for name in fields if name in section}


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
    known = _evaluated(values)
    if data:
        text = DataConfig(path=data, document_masks=known.data.document_masks)
    elif run is None:
        raise DataError(
            f"no {CONFIG_FILE} is stored with the model", where=checkpoint, value=CONFIG_FILE,
            allowed=f"{CONFIG_FILE} beside the model or in its run",
            fix="pass prepared shards with --data",
        )  # fmt: skip
    else:
        text = _found(known.data, run.parent, known.train.out_dir or "")
    text.eval_windows = known.data.eval_windows
    if windows is not None:
        text.eval_windows = check_count("--windows", windows)
    prepared = prepared_folder(text)
    if prepared:
        tokenizer = tokenizer_of_model(TokenShards(prepared).tokenizer(), checkpoint, prepared)
    else:
        tokenizer = stored_tokenizer(checkpoint)
    own = Setting.of(known, tokenizer)
    return Setting(
        text, tokenizer,
        seq_len=own.seq_len if seq_len is None else check_count("--seq_len", seq_len),
        batch=own.batch if batch is None else check_count("--batch", batch),
        dtype=dtype or own.dtype,
    )  # fmt: skip


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
