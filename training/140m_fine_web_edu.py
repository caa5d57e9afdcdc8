"""A reference run of 140 million parameters on FineWeb-Edu, 20 tokens per parameter, for one GPU.

    python training/140m_fine_web_edu.py --dry-run
    python training/140m_fine_web_edu.py

The small variant with GPT-2's vocabulary of 50,304.
"""

import sys

from open_mythos import mythos_small
from open_mythos.cli.recipe import run_recipe
from open_mythos.data import fineweb_edu
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig

RUN = RunConfig(
    model=mythos_small(),
    depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
    optim=OptimConfig(lr=6e-4, weight_decay=0.1),
    train=TrainConfig(
        seq_len=2048, global_batch=128, micro_batch=16, schedule="cosine", warmup_steps=500,
        dtype="auto", checkpoint_loops=True, eval_every=1000, save_every=1000,
        out_dir="runs/140m_fine_web_edu",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(
        run_recipe(
            RUN, description="140 million parameters on FineWeb-Edu.", tokens=2_800_000_000,
            tokenizer="openai-community/gpt2",
            subsets={name: fineweb_edu(name) for name in ("sample-10BT", "sample-100BT")},
        )
    )  # fmt: skip
