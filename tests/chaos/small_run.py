"""The run that things happen to: tiny, but with everything a real one has.

Dropout, random initial states, drawn depths with a curriculum, micro-batches, balanced experts, an
average of the weights, evaluations, masks between documents, several epochs of several shards.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from open_mythos.config import MythosConfig
from open_mythos.data import EpochWindows, Loader, TokenShards, prepare
from open_mythos.evaluation import evaluate_depths
from open_mythos.run_folder import CHECKPOINTS_FOLDER
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import (
    DataConfig,
    DepthConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    Trainer,
    build_model,
)
from open_mythos.train.checkpoint.find import checkpoints
from open_mythos.train.optimizers.ema import WeightAverage

STEPS = 12
SAVE_EVERY = 3
JOURNAL = "journal.jsonl"

MODEL = MythosConfig(
    vocab_size=320, dim=16, n_heads=2, n_kv_heads=1, max_seq_len=16, max_loop_iters=4,
    prelude_layers=1, coda_layers=1, attn_type="gqa", n_experts=4, n_shared_experts=1,
    n_experts_per_tok=2, expert_dim=8, lora_rank=2, dropout=0.2, initial_state="normal",
)  # fmt: skip


def make_data(folder: Path, seed: int = 0, shard_tokens: int = 120) -> Path:
    """Token shards in ``folder``: several of them, and more than one epoch in a run."""
    texts = [f"{seed} is text {i}: " + "abc " * (i % 7) for i in range(24)]
    prepare(texts, folder, ByteTokenizer(), shard_tokens=shard_tokens, val_fraction=0.2)
    return folder


def run_config(out: Path | str | None, data: Path | str, changes: Any = None) -> RunConfig:
    """The run, saved in ``out``; ``changes`` are by section and field."""
    run = RunConfig(
        model=MODEL,
        data=DataConfig(path=str(data), document_masks=True),
        depth=DepthConfig(mean=2.5, curriculum_start=1.0, curriculum_steps=6),
        optim=OptimConfig(lr=3e-3, ema_decay=0.9),
        train=TrainConfig(
            steps=STEPS, seq_len=8, global_batch=4, micro_batch=2, warmup_steps=2, schedule="wsd",
            decay_steps=4, balance_coefficient=0.01, balance_speed=0.01, log_every=1, eval_every=4,
            eval_depths=[1, 3], save_every=SAVE_EVERY if out else 0, keep=2, device="cpu",
            out_dir=None if out is None else str(out),
        ),
    )  # fmt: skip
    for section, fields in (changes or {}).items():
        run = replace(run, **{section: replace(getattr(run, section), **fields)})
    return run


def new_trainer(
    run: RunConfig, kind: type[Trainer] = Trainer, loggers: Any = (), **loading: Any
) -> Trainer:
    """Its trainer, at the first step."""
    train = run.train
    loader = Loader(
        TokenShards(run.data.path), seq_len=train.seq_len, global_batch=train.global_batch,
        seed=train.seed, mask_documents=run.data.document_masks, **loading,
    )  # fmt: skip
    windows = EpochWindows(
        TokenShards(run.data.path, "val"), seq_len=train.seq_len, global_batch=2,
        mask_documents=run.data.document_masks, max_windows=4,
    )  # fmt: skip

    def evaluate(model: Any, depths: list[int]) -> dict[str, Any]:
        return {"depths": [asdict(row) for row in evaluate_depths(model, windows, depths)]}

    return kind(build_model(run), loader, run, evaluate=evaluate, loggers=loggers)


def warm_up() -> None:
    """What the fork server does before it forks: a step, an evaluation, on one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        short = {"train": {"steps": 2, "warmup_steps": 0, "decay_steps": 1}}
        new_trainer(run_config(None, make_data(Path(folder) / "data"), short)).fit()


class Journal:
    """Appends what a run computes, so that it outlives the run's death."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / JOURNAL, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def watch(self, trainer: Trainer) -> None:
        """Note every step and evaluation of ``trainer``."""
        batches: list[str] = []
        fetch, step, evaluate = trainer.loader.next_batch, trainer.train_step, trainer.evaluate

        def next_batch(number: int) -> Any:
            batch = fetch(number)
            batches.append(digest_of_batch(batch))
            return batch

        def train_step(number: int) -> Any:
            batches.clear()
            result = step(number)
            self._write(
                number,
                loss=exact(result.loss), balance=exact(result.balance), lr=exact(result.lr),
                grad_norm=exact(result.grad_norm), skipped=result.skipped,
                depths=result.depths.tolist(), batch=list(batches),
            )  # fmt: skip
            return result

        def evaluated(model: Any, depths: list[int]) -> Any:
            found = evaluate(model, depths)
            losses = [[row["depth"], exact(row["loss"])] for row in found["depths"]]
            self._write(trainer.state.step, evaluated=depths, losses=losses)
            return found

        trainer.loader.next_batch = next_batch
        trainer.train_step = train_step
        trainer.evaluate = evaluated

    def _write(self, step: int, **values: Any) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        assert os.write(self._file, line.encode()) == len(line)


def exact(value: float) -> str:
    """Every bit of a float."""
    return float(value).hex()


def digest_of_batch(batch: Any) -> str:
    digest = hashlib.sha256()
    for each in (batch.input_ids, batch.targets, batch.document_ids, batch.sample_index):
        digest.update(each.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def averages(trainer: Trainer) -> WeightAverage:
    """The trainer's average of its weights."""
    (found,) = (each for each in vars(trainer.stepper).values() if isinstance(each, WeightAverage))
    return found


def tensors(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights, buffers, moments and averages, by name."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found: dict[str, Tensor] = dict(trainer.model.state_dict())
    for parameter, state in trainer.optimizer.state.items():
        found |= {f"{names[id(parameter)]}/{key}": value for key, value in state.items()}
    found |= {f"average/{key}": value for key, value in averages(trainer).state_dict().items()}
    return {name: value.detach().clone() for name, value in found.items()}


def fingerprint(trainer: Trainer) -> dict[str, Any]:
    """Of everything that the rest of a run follows from."""
    hashes = {
        name: hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()
        for name, value in tensors(trainer).items()
    }
    return {
        "tensors": hashes,
        "state": json.loads(json.dumps(asdict(trainer.state))),
        "data": trainer.loader.state_dict(),
    }


def differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    odd = sorted(a.keys() ^ b.keys())
    return odd + [name for name in a if name in b and not same_bits(a[name], b[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals itself here, and 0 does not equal -0."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (a, b)))


def read_journal(out: Path) -> list[dict[str, Any]]:
    path = out / JOURNAL
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_checkpoint(out: Path) -> bool:
    return bool(checkpoints(out / CHECKPOINTS_FOLDER))
