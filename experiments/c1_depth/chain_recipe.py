"""Recipe of a model that answers longer chains than in training by looping more (two minutes).

Ingredients (arms of this claim remove each but the last):

- 5 to 10 loops for chains of 5 hops: with fewer loops than hops, a loop learns several hops at
  once and extra loops no longer extend the chain.
- Two chains per row once single ones are learned. The second one has positions and preceding
  tokens that a single chain never has; without it attention fails beyond the trained length.
- A share of steps that start from the state after many loops, so that an answer is kept.
- A small rotary base, so that neighboring positions stay distinct beyond the trained length.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments.tasks import ChainLoader, PermHop
from experiments.tasks.accuracy import answered
from open_mythos.config import MythosConfig
from open_mythos.train import DepthConfig, OptimConfig, RunConfig, TrainConfig
from open_mythos.train.build import Model

TASK = PermHop(entities=16, relations=8)
TRAINED_HOPS = 5
ASKED_HOPS = 10
CHOSEN_LOOPS = 24
"""Depth for chains of twice the trained length, fixed before any run."""
STEPS = 320
PAIRS_AFTER = 0.6
"""Share of the steps after which rows hold two chains."""


def recipe(seed: int = 0, *, quick: bool = False) -> RunConfig:
    """Return the run configuration; ``quick`` makes it tiny for smoke tests."""
    dim, batch, steps = (32, 8, 5) if quick else (128, 256, STEPS)
    model = MythosConfig(
        vocab_size=TASK.vocab_size, dim=dim, n_heads=4, n_kv_heads=4, attn_type="gqa",
        max_seq_len=64, max_loop_iters=10, prelude_layers=1, coda_layers=1, n_experts=0,
        ffn_dim=2 * dim, lora_rank=0, rope_theta=10.0,
    )  # fmt: skip
    return RunConfig(
        model=model,
        depth=DepthConfig(plan="uniform", low=5, high=10, long_share=0.3, long_loops=32),
        optim=OptimConfig(lr=2e-3, beta2=0.98),
        train=TrainConfig(
            seed=seed, steps=steps, warmup_steps=steps // 16, seq_len=2 * (TRAINED_HOPS + 1),
            global_batch=batch, min_lr_ratio=0.02, grad_loops=10, log_every=max(1, steps // 32),
            device="cpu",
        ),
    )  # fmt: skip


def chains(run: RunConfig) -> ChainLoader:
    """Return the training data: chains of five hops, single and later in pairs."""
    return ChainLoader(
        TASK,
        global_batch=run.train.global_batch,
        hops=TRAINED_HOPS,
        pair_from=round(PAIRS_AFTER * run.train.steps),
    )


def accuracy_grid(
    model: Model, hops: Sequence[int], loops: Sequence[int], programs: int = 4096
) -> list[list[float]]:
    """Return accuracy on ``TASK.questions`` (hops, rising loops); one column for dense models."""
    return [answered(model, *TASK.questions(each, programs), loops) for each in hops]
