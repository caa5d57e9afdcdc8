"""Language models trained on Python source: bytes of the standard library, or tokens of packages.

The second text adds packages that PyTorch requires, so that it is on every machine that runs this.
"""

from __future__ import annotations

import math
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments.claim import QUICK, Cell, Place
from experiments.training import build, costs, fit, run_of
from open_mythos.data import Batch, EpochWindows, Loader, TokenShards, prepare, read_documents
from open_mythos.devices import resolve_dtype
from open_mythos.evaluation import evaluate_depths
from open_mythos.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from open_mythos.train import RunConfig
from open_mythos.train.build import Model

VOCABULARY = ByteTokenizer().vocab_size
PACKAGES = ("networkx", "numpy", "sympy")
PACKAGES_VOCABULARY = 2048
_VAL_FRACTION = 0.03
_TRAIN: dict[str, Any] = {
    "global_batch": 8, "device": "cpu", "min_lr_ratio": 0.02, "log_every": 20,
}  # fmt: skip
_TRAIN_AT: dict[str, dict[str, Any]] = {
    "cpu": {},
    "gpu": {"device": "cuda", "dtype": "bfloat16", "steps": 1500, "global_batch": 64,
            "warmup_steps": 100},
    QUICK: {"seq_len": 16, "global_batch": 4, "warmup_steps": 1},
}  # fmt: skip


def standard_library(shared: Path) -> Path:
    """Return the folder of the bytes of the standard library in ``shared``; see :func:`_once`."""
    return _once(shared / f"stdlib-{platform.python_version()}", lambda: "stdlib", ByteTokenizer)


def packages(shared: Path) -> Path:
    """Return the folder of the tokens of the standard library and of :data:`PACKAGES`.

    About 36 MB of source without tests, in tokens of byte-pair encoding trained on it.
    """
    versions = [platform.python_version(), *map(version, PACKAGES)]
    return _once(
        shared / "-".join(["packages", *versions]), _package_sources,
        lambda: BPETokenizer.train(_package_sources(), PACKAGES_VOCABULARY),
    )  # fmt: skip


def _package_sources() -> Iterator[str]:
    yield from read_documents("stdlib")
    for name in PACKAGES:
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "tests" not in path.parts:
                yield path.read_text(encoding="utf-8")


def _once(
    folder: Path, source: Callable[[], str | Iterator[str]], tokenizer: Callable[[], Tokenizer]
) -> Path:
    """Return ``folder``; prepare the text in it on first use."""
    if not folder.exists():
        mine = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")
        prepare(source(), mine, tokenizer(), val_fraction=_VAL_FRACTION)
        try:
            mine.rename(folder)
        except OSError:  # another worker prepared it first
            shutil.rmtree(mine)
    return folder


TEXTS = {"stdlib": standard_library, "packages": packages}


def validation(folder: Path, *, seq_len: int, windows: int, batch: int = 32) -> list[Batch]:
    """Return batches of the first ``windows`` windows of the validation split."""
    shards = TokenShards(folder, "val")
    return list(
        EpochWindows(shards, seq_len=seq_len, global_batch=min(batch, windows), max_windows=windows)
    )


@dataclass(frozen=True)
class Trained:
    """A trained model with its run, validation batches and loss curve."""

    model: Model
    run: RunConfig
    batches: list[Batch]
    curve: list[tuple[int, float]]

    def losses(self, depths: list[int]) -> list[float]:
        """Return the validation loss (nats per token) at each depth; a dense model has one."""
        dtype = resolve_dtype(self.run.train.dtype)
        return [row.loss for row in evaluate_depths(self.model, self.batches, depths, dtype=dtype)]

    def bits_per_byte(self, depths: list[int]) -> list[float]:
        """Return the validation loss in bits per byte of text at each depth."""
        bits = 1 / (math.log(2) * TokenShards(self.run.data.path, "val").bytes_per_token)
        return [loss * bits for loss in self.losses(depths)]

    def costs(self) -> dict[str, Any]:
        """Return non-embedding parameters, tokens, training FLOPs at the mean depth, and curve."""
        return {**costs(self.model, self.run), "curve": self.curve}


def train(cell: Cell, place: Place, change: Callable[[Model], Any] = lambda model: None) -> Trained:
    """Train the language model described by ``cell.settings``.

    Settings: "run" (sections of a :class:`RunConfig`), "val_windows", "save_every" (steps between
    checkpoints to resume from; 0: none), optionally "text" (a key of :data:`TEXTS`, "stdlib" by
    default) and, for a dense model, optionally "n_layers".
    ``change`` modifies the untrained model in place.
    """
    run = run_of(cell)
    run.train.save_every = cell.settings["save_every"]
    run.train.out_dir = str(place.own) if run.train.save_every else None
    run.data.path = str(TEXTS[cell.settings.get("text", "stdlib")](place.shared))
    model = build(run, n_layers=cell.settings.get("n_layers"))
    change(model)
    curves = fit(model, loader(run), run, checkpoints=place.own / "checkpoints")
    batches = validation(
        Path(run.data.path), seq_len=run.train.seq_len, windows=cell.settings["val_windows"]
    )
    return Trained(model, run, batches, curves["loss"])


def loader(run: RunConfig) -> Loader:
    """Return the shuffled training windows of the prepared text at ``run.data.path``."""
    return Loader(
        TokenShards(run.data.path), seq_len=run.train.seq_len, global_batch=run.train.global_batch,
        seed=run.train.seed,
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Sizes of the byte-level models by scale."""

    train: dict[str, Any]
    """Fields of ``RunConfig.train`` at scale "cpu"."""
    widths: dict[str, tuple[int, int]]
    """Scale -> (width, heads)."""
    val_windows: int
    """Validation windows at the scale "cpu"."""
    gpu_seq_len: int
    quick_steps: int

    def settings(
        self, scale: str, *, model: dict[str, Any], depth: dict[str, Any], lr: float, **run: Any
    ) -> dict[str, Any]:
        """Return the settings of :func:`train`; "model" and "train" are merged with defaults."""
        train = _TRAIN | self.train | _TRAIN_AT[scale]
        if scale == "gpu":
            train["seq_len"] = self.gpu_seq_len
        if scale == QUICK:
            train["steps"] = self.quick_steps
        dim, heads = self.widths[scale]
        common = {
            "vocab_size": VOCABULARY, "dim": dim, "n_heads": heads, "n_kv_heads": heads,
            "attn_type": "gqa", "max_seq_len": train["seq_len"], "n_experts": 0, "lora_rank": 0,
            "ffn_dim": 2 * dim, "tie_embeddings": True,
        }  # fmt: skip
        return {
            "run": {
                "model": common | model, "depth": depth, "optim": {"lr": lr}, **run,
                "train": train | run.get("train", {}),
            },
            "val_windows": {"cpu": self.val_windows, "gpu": 512, QUICK: 4}[scale],
            "save_every": 250 if scale == "gpu" else 0,
        }  # fmt: skip
