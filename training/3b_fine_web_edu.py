"""The 3B variant on FineWeb-Edu, 30 billion tokens.

    python training/3b_fine_web_edu.py --dry-run
    python training/3b_fine_web_edu.py
    torchrun --nproc_per_node=8 training/3b_fine_web_edu.py --subset sample-100BT

The tokenizer is that of gpt-oss-20b. Its vocabulary of 200,064 makes 4.2 B parameters of the
variant, whose name counts a vocabulary of 32,000; with --model.tie_embeddings true they are 3.6 B.
Weights, gradients and two moments in float32 are 16 bytes a parameter: 67 GB, or 57 GB tied, and
activations come on top. One process needs a GPU that holds them (fewer activations:
--train.micro_batch 1); several share them by FSDP2.

The default subset has 10 B tokens: 30 B are three epochs of it. sample-100BT repeats nothing.
"""

import sys

from open_mythos import mythos_3b
from open_mythos.cli.recipe import run_recipe
from open_mythos.data import fineweb_edu
from open_mythos.train import (
    DataConfig,
    DepthConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)

RUN = RunConfig(
    model=mythos_3b(),
    data=DataConfig(eval_windows=128),
    depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
    optim=OptimConfig(lr=3e-4, weight_decay=0.1),
    train=TrainConfig(
        seq_len=2048, global_batch=256, micro_batch=4, schedule="cosine", warmup_steps=2000,
        dtype="auto", checkpoint_loops=True, log_every=10, eval_every=1000, save_every=500,
        out_dir="runs/3b_fine_web_edu",
    ),
    parallel=ParallelConfig(kind="fsdp"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(
        run_recipe(
            RUN, description="The 3B variant on FineWeb-Edu.", tokens=30_000_000_000,
            subsets={
                name: fineweb_edu(name)
                for name in ("sample-10BT", "sample-100BT", "sample-350BT", "default")
            },
        )
    )  # fmt: skip
