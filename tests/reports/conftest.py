"""A small trained run."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import small_config

from open_mythos.data import prepare
from open_mythos.tokenizer import ByteTokenizer
from open_mythos.train import (
    DataConfig,
    DepthConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    train_run,
)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of four steps with an evaluation and a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    for i in range(6):
        (folder / "text" / f"{i}.py").write_text(f"# {i}\ndef add(a, b):\n    return a + b\n" * 400)
    prepare(str(folder / "text"), folder / "shards", ByteTokenizer(), val_fraction=0.4)
    config = RunConfig(
        model=small_config(vocab_size=320),
        data=DataConfig(path=str(folder / "shards"), eval_windows=4),
        depth=DepthConfig(mean=2.0, max_loops=4), optim=OptimConfig(lr=1e-3),
        train=TrainConfig(
            steps=4, warmup_steps=1, seq_len=16, global_batch=4, log_every=1, device="cpu",
            eval_depths=[1, 2, 4], out_dir=str(folder / "run"),
        ),
    )  # fmt: skip
    train_run(config)
    return folder / "run"
