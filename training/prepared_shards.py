"""The run of 140 million parameters on token shards that were prepared beforehand.

    open-mythos data prepare my_texts/ my_shards --tokenizer bpe:32768
    python training/prepared_shards.py --source my_shards --dry-run
    python training/prepared_shards.py --source my_shards

Text is tokenised once, the windows of an epoch are shuffled one by one, and a validation split is
there. The tokenizer, and with it the vocabulary, is that of the folder.
"""

import sys

from open_mythos import mythos_small
from open_mythos.cli.recipe import run_recipe
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig

RUN = RunConfig(
    model=mythos_small(),
    depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
    optim=OptimConfig(lr=6e-4, weight_decay=0.1),
    train=TrainConfig(
        seq_len=2048, global_batch=128, micro_batch=16, schedule="cosine", warmup_steps=500,
        dtype="auto", checkpoint_loops=True, eval_every=1000, save_every=1000,
        out_dir="runs/prepared_shards",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_recipe(RUN, description="Training on prepared shards.", tokens=2_800_000_000))
