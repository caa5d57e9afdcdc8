"""Go on with a trained model on other text, with a schedule of its own.

    python training/continue_run.py --checkpoint runs/140m_fine_web_edu --source my_texts/ \\
        --tokens 200000000 --dry-run

Weights, architecture and tokenizer are those of the checkpoint; moments, data position and step
begin anew. The learning rate rises again, to less than in a first run, and falls linearly towards
zero over the last steps. To go on with the same run, call its own recipe with --resume latest.
"""

import sys

from open_mythos.cli.recipe import run_recipe
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig

RUN = RunConfig(
    depth=DepthConfig(plan="poisson", mean=8.0, max_loops=16),
    optim=OptimConfig(lr=1e-4, weight_decay=0.1),
    train=TrainConfig(
        seq_len=2048, global_batch=64, micro_batch=8, schedule="wsd", warmup_steps=100,
        decay_steps=500, min_lr_ratio=0.0, dtype="auto", checkpoint_loops=True, eval_every=500,
        save_every=500, out_dir="runs/continued",
    ),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(
        run_recipe(
            RUN, description="Continued training from a checkpoint.", tokens=200_000_000,
            from_checkpoint=True,
        )
    )  # fmt: skip
