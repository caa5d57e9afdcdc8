"""A minute on a laptop: streaming, training, evaluation and checkpoints, without any download.

    python training/debug_cpu.py
    torchrun --nproc_per_node=2 training/debug_cpu.py

The text is the source of Python's standard library, as bytes.
"""

import sys

from open_mythos import mythos_nano
from open_mythos.cli.recipe import run_recipe
from open_mythos.train import DataConfig, DepthConfig, OptimConfig, RunConfig, TrainConfig

RUN = RunConfig(
    model=mythos_nano(),
    data=DataConfig(eval_windows=16),
    depth=DepthConfig(plan="poisson", mean=4.0, max_loops=8),
    optim=OptimConfig(lr=3e-3),
    train=TrainConfig(
        steps=200, seq_len=128, global_batch=8, schedule="cosine", warmup_steps=10, device="cpu",
        eval_every=100, save_every=100, out_dir="runs/debug_cpu",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(
        run_recipe(
            RUN, description="A minute on a laptop.", source="stdlib", tokenizer="byte", workers=1
        )
    )
